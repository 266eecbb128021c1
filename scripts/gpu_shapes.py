"""The sizes of scripts/gpu_check.py: those of a GPU, and small ones for a dry run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dare_hf.benchmark.random_llava import Setting


@dataclass(frozen=True)
class Shapes:
    """What is run.

    Attributes:
        law: The small model that is held to the laws.
        large: The model that is timed.
        lengths: Prompt tokens of its time to the first token.
        decode: Prompt tokens of its decode.
        batches: Rows of its decode.
        room: Bytes beside the weights for the largest batch.
        most: Rows that are tried at most.
        steps: Timed decode steps.
        nf4_layers: Layers of the model in nf4, which goes through a file.
        patience: Times the seconds a section may take; nobody waits for a dry run.
    """

    law: Setting
    large: Setting
    lengths: tuple[int, ...]
    decode: int
    batches: tuple[int, ...]
    room: int
    most: int
    steps: int
    nf4_layers: int
    patience: float = 1.0


# Nine prompt tokens in ten are vision: 1k, 4k and 16k of them.
_LAW = Setting(tokens=160, layers=4, hidden=256, intermediate=512, vocab=1000, pairs=2, hops=3)
_7B = Setting(
    tokens=1138,
    layers=32,
    hidden=4096,
    intermediate=14336,
    head_dim=128,
    kv_heads=8,
    device="cuda",
    dtype="bfloat16",
    pairs=3,
    check_tokens=400,
)
FULL = Shapes(
    law=replace(_LAW, device="cuda"),
    large=_7B,
    lengths=(1138, 4552, 18205),
    decode=2276,
    batches=(1, 8, 32),
    room=12 * 2**30,
    most=128,
    steps=24,
    nf4_layers=4,
)
_SMALL = Setting(
    tokens=60,
    layers=2,
    hidden=64,
    intermediate=96,
    head_dim=16,
    kv_heads=2,
    vocab=300,
    pairs=1,
    check_tokens=100,
)
DRY = Shapes(
    law=replace(_SMALL, hops=1),
    large=_SMALL,
    lengths=(40, 60),
    decode=40,
    batches=(1, 2),
    room=2**20,
    most=4,
    steps=2,
    nf4_layers=2,
    patience=100.0,
)
