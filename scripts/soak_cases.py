"""The cases of `make soak`: drawn from a seed and a number, and what each is made of."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dare_hf import DareConfig, register_scorer
from dare_hf.architectures.locate import locate
from dare_hf.conformance.subject import Subject
from dare_hf.testing.families import family_of
from dare_hf.testing.models import FIRST_TEXT_ID
from dare_hf.testing.samples import Sample, batch_of, samples
from dare_hf.testing.shrink import shrunk_model

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.testing.samples import Batch

SEES = (
    *("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"),
    *("idefics3", "smolvlm", "mistral3", "paligemma", "chameleon", "aya_vision"),
    *("deepseek_vl", "glm4v", "mllama"),
)
SHARES_KEYS = ("gemma3n", "gemma4", "gemma4_text")
HYBRIDS = ("qwen3_5", "lfm2_vl", "qwen3_next", "lfm2", "granitemoehybrid")
READS = ("llama", "qwen3", "gemma3_text", "mixtral", "deepseek_v3", "gpt2", "phi3", "smollm3")
ARCHITECTURES = (*SEES, *SHARES_KEYS, *HYBRIDS, *READS)
"""Images and text; keys shared between layers; other layers beside attention; text alone."""

BIDIRECTIONAL = ("gemma3", "gemma3n", "gemma4", "paligemma")
"""Their image tokens see each other: a chunk that ends inside an image cuts that, in HF as well."""

MODES = {"greedy": 40, "sample": 16, "beam": 12, "lookup": 14, "inject": 14, "refused": 4}
DTYPES = {"wide": 78, "float32": 14, "bfloat16": 8}
"""Wide is float64 where the architecture can run in it."""

SCORER = "soak_content"
LAST_WORD = 80


def content_scores(
    hidden: Tensor, modality: Tensor, *, layer: int, hop: Tensor, positions: Tensor
) -> Tensor:
    """Float[B, S] in [0, 1]: by the content of a token, computed in float64 whatever the model.

    So one word twice is an exact tie in layer 0, whatever the shape of the batch it is in.
    """
    generator = torch.Generator().manual_seed(200 + layer)
    weight = torch.randn(hidden.shape[-1], generator=generator).double()
    wide = hidden.double()
    return torch.sigmoid(3 * (wide * weight).sum(-1) / wide.norm(dim=-1).clamp(min=1e-6))


register_scorer(SCORER, content_scores)


@dataclass(frozen=True)
class Case:
    """One run and how it is made.

    Attributes:
        number: Its number; with the seed it tells all else.
        arch: model_type.
        dtype: A key of `DTYPES`.
        images: Pictures of each row.
        words: Words of each row.
        pad: Further columns of padding.
        mode: A key of `MODES`.
        new: Sampled tokens.
        allowed: The words the model may write.
        fields: Of DareConfig.
        chunk: prefill_chunk_size, None for a prefill in one piece.
        turns: Turns on one carried cache.
        ends: Ids that end a row.
        seed: Of prompts and sampling.
    """

    number: int
    arch: str
    dtype: str
    images: tuple[int, ...]
    words: tuple[int, ...]
    pad: int
    mode: str
    new: int
    allowed: tuple[int, ...]
    fields: dict[str, Any]
    chunk: int | None
    turns: int
    ends: tuple[int, ...]
    seed: int


@functools.cache
def subject_of(arch: str, dtype: str) -> Subject:
    """The tiny model of an architecture; no case leaves it patched."""
    if dtype == "wide":
        subject = Subject.of(arch)
    else:
        model = shrunk_model(arch, dtype=getattr(torch, dtype))
        subject = Subject(model, [], {}, False)
    batch = batch_of(subject.model, samples(subject.model, family_of(arch).images[-1:]))
    with torch.no_grad():  # lets HF install its capture hooks
        subject.model(**batch.inputs, output_hidden_states=True)
    return subject


def draw(seed: int, number: int) -> Case:
    """The case of a seed and a number."""
    rng = random.Random(f"{seed}:{number}")
    arch = ARCHITECTURES[number % len(ARCHITECTURES)]
    family, mode = family_of(arch), _one(rng, MODES)
    # transformers: no state can be taken back; of mllama it crops the keys of the image too, and
    # a prompt of paligemma sees the candidates that come with it
    if mode == "lookup" and (arch in HYBRIDS or arch in ("mllama", "paligemma")):
        mode = "greedy"
    if mode == "beam" and family.flat:  # nor does it repeat features that are one tensor for all
        mode = "sample"
    if mode == "inject" and family.zeros:  # type ids that mark no image tokens: refused
        mode = "greedy"
    # A recurrent layer cannot leave out the padding beside another row's injected tokens.
    lone = mode == "lookup" or (mode == "inject" and arch in HYBRIDS)
    rows = 1 if lone else rng.randint(1, 4)
    least = int(family.needs_picture or family.separate is not None)
    few = rng.choice([1, 1, 3])
    images = [rng.randint(least, max(few, least)) if family.sees else 0 for _ in range(rows)]
    words = [rng.randint(4, 18)] * rows if family.even else [rng.randint(4, 18) for _ in images]
    allowed = rng.sample(range(FIRST_TEXT_ID, LAST_WORD), rng.choice([6, 12, 50]))
    again = mode in ("greedy", "sample") and not family.watched  # masks per image are one turn's
    turns = 2 if again and rng.random() < 0.18 else 1
    ends = rng.sample(allowed, 2) if turns == 1 and rng.random() < 0.15 else []
    return Case(
        number=number,
        arch=arch,
        dtype=_one(rng, DTYPES),
        images=tuple(images),
        words=tuple(words),
        pad=0 if family.even else rng.choice([0, 0, 0, 5]),
        mode=mode,
        new=rng.randint(3, 12) if turns == 1 else rng.randint(3, 7),
        allowed=tuple(sorted(allowed)),
        fields=_fields(rng, arch, allowed),
        chunk=_chunk(rng, arch, turns, mode),
        turns=turns,
        ends=tuple(ends) if mode != "inject" else (),
        seed=rng.randrange(10**6),
    )


def _one(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _chunk(rng: random.Random, arch: str, turns: int, mode: str) -> int | None:
    # transformers leaves chunks out under prompt lookup.
    no_chunks = arch in BIDIRECTIONAL or arch == "mllama"  # whose pixels cannot be split
    if mode == "lookup" or no_chunks or turns > 1 or rng.random() < 0.88:
        return None
    return rng.choice([3, 7, 16])


def _fields(rng: random.Random, arch: str, allowed: list[int]) -> dict[str, Any]:
    """Fields of a DareConfig, each out of its whole range."""
    rates = (0.08, 0.25, 0.4, 0.5, 0.75, 1.0)
    model = subject_of(arch, "wide").model
    layers = len(locate(model).layers)
    pairs = tuple((rng.choice(rates), rng.choice(rates)) for _ in range(layers))
    scorers = {SCORER: 60, "attention": 27, "random": 8, "key_norm": 12, "position": 8}
    ends: list[Any] = rng.sample(allowed, rng.randint(1, 3))
    if rng.random() < 0.3:
        ends += [tuple(rng.choices(allowed, k=2)) for _ in range(4)]
    fields = {
        "vision_retention": rng.choice(rates),
        "text_retention": rng.choice(rates[1:]),
        "schedule": rng.choice(["constant", "constant", "two_stage", "safe", pairs]),
        "plan_every": rng.choice([1, 1, 2, 3]),
        "batch_budget": rng.choice(["row"] * 6 + ["equal"]),
        "uniform_share": rng.choice([0.0] * 6 + [0.25, 1.0]),
        "cut_layer": rng.choice(["auto", "auto", 0, 0.3]),
        "prefix_tokens": rng.choice([0, 1, 2, 2, 4]),
        "pruned": rng.choice(["bypass", "drop"]),
        "scorer": _one(rng, scorers),
        "hop_delimiters": tuple(ends) if rng.random() < 0.7 else (),
        "hop_aware": rng.random() < 0.9,
        "max_hops": rng.choice([1, 2, 3, 8]),
        "hop_decay": rng.choice([1.0, 0.7, 0.3]),
        "hop_score": rng.choice([None, None, None, "stored", "observed"]),
        "hop_budget": rng.choice([None, "pooled", "per_hop"]),
        "max_kv_tokens": rng.choice([None] * 7 + [1, 4, 8, 12, 20, 40]),
        "decode_window": rng.choice([None, None, 1, 2, 3, 5]),
        "always_keep_token_ids": tuple(rng.sample(range(FIRST_TEXT_ID, LAST_WORD), 6)),
        "seed": rng.randrange(1000),
    }
    if rng.random() < 0.7:
        fields["always_keep_token_ids"] = ()
    return fields


def config_of(case: Case, **other: Any) -> DareConfig:
    """The case's settings, with other fields."""
    return DareConfig(**{**case.fields, **other})


def rows_of(case: Case) -> list[Sample]:
    """The case's prompts; each depends on its own place only."""
    model = subject_of(case.arch, case.dtype).model
    if family_of(case.arch).even:
        return samples(model, case.images, text=case.words[0], seed=case.seed)
    pairs = enumerate(zip(case.images, case.words, strict=True))
    return [
        samples(model, (images,), text=words, seed=case.seed + row)[0]
        for row, (images, words) in pairs
    ]


def batch(case: Case, rows: list[Sample], *, pad: int = 0, width: int | None = None) -> Batch:
    """Prompts as one left-padded batch, with more padding or of a given width."""
    model = subject_of(case.arch, case.dtype).model
    return batch_of(model, rows, pad_to=width or max(len(row.ids) for row in rows) + pad)
