"""What `scripts/fuzz.py` makes of good files: adapters, configurations, recipes, rows, models."""

from __future__ import annotations

import json
import pickle
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


_VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([float("nan"), float("inf"), -float("inf"), 1e308, -1e-320, 1e-30]),
    lambda r: r.choice([0, -1, 1, 2, 7, 255, 32767, 32768, 10**6, 2**31, 2**63, 2**64]),
    lambda r: r.choice([10**30, 10**400, -(10**400), 10**4000]),
    lambda r: round(r.uniform(-1, 2), 3),
    lambda r: r.choice(["", "auto", "safe", "router", "learned", "two_stage", "x" * 2000, "\0é"]),
    lambda r: [
        r.choice([None, 0.5, "a", -1, 10**12, [1], [0.5, 0.5]]) for _ in range(r.randint(0, 6))
    ],
    lambda r: [[round(r.random(), 2), round(r.random(), 2)] for _ in range(r.choice([1, 4, 4000]))],
    lambda r: {"a": r.choice([1, None, {}])},
    lambda r: nested(r.choice([3, 60, 700])),
    lambda r: list(range(r.choice([3, 5000, 100_000]))),
]


def value(rng: random.Random) -> Any:
    """Something that JSON can say, seldom what a field expects."""
    return rng.choice(_VALUES)(rng)


def object_text(good: dict[str, Any], rng: random.Random, names: list[str]) -> str:
    """A JSON object like `good` with one to three of its members changed, removed or added."""
    given = dict(good)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(names)
        how = rng.random()
        if how < 0.1:
            given.pop(name, None)
        elif how < 0.15:
            given[rng.choice(["runtime_config", "target_modules", "x", "", "bias"])] = value(rng)
        else:
            given[name] = value(rng)
    return json.dumps(given)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file after an accident."""
    how = rng.randrange(7)
    if how == 0:
        return data[: rng.randrange(len(data) + 1)]
    if how == 1:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 30])):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        return bytes(flipped)
    if how == 2:
        return rng.choice(
            [b"", b"\0" * 100, b"\xff\xfe{\0}\0", b"null", b"[]", b"3", b'"x"', b"{}"]
        )
    if how == 3:
        return rng.choice(
            [b"[" * 100_000, b'{"a":' * 20_000, b"9" * 10_000, b"[" * 900 + b"]" * 900]
        )
    if how == 4:
        return rng.randbytes(rng.choice([1, 8, 64, 5000]))
    if how == 5:
        cut = rng.randrange(len(data))
        return data[:cut] + rng.randbytes(rng.randint(1, 9)) + data[cut:]
    return data.decode("latin-1").encode(rng.choice(["utf-16", "utf-32"]))


def tensors_file(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose tensors or header are not those of `data`."""
    how = rng.randrange(10)
    if how == 0:
        return damaged(data, rng)
    if how == 1:
        length = rng.choice([0, 1, 2**20, 2**33, 2**62, 2**64 - 1])
        return struct.pack("<Q", length) + data[8:]
    if how == 2:
        return _other_header(data, rng)
    tensors = load(data)
    name = rng.choice(sorted(tensors))
    tensors = _CHANGES[rng.randrange(len(_CHANGES))](tensors, name, rng)
    return save({key: tensor.contiguous() for key, tensor in tensors.items()})


def _other_header(data: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    part = rng.choice(["dtype", "shape", "data_offsets"])
    entry[part] = rng.choice(
        [None, [], [-1, 4], [2**62, 4], "F8_E4M3", "X", "C64", [4, 0], value(rng)]
    )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _odd_type(tensors: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    kinds = [torch.bool, torch.int8, torch.int64, torch.uint8, torch.complex64, torch.float64]
    kinds += [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    names = [name] if rng.random() < 0.5 else list(tensors)
    return tensors | {key: tensors[key].to(rng.choice(kinds)) for key in names}


def _odd_value(tensors: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    odd = tensors[name].clone()
    odd.view(-1)[rng.randrange(odd.numel())] = rng.choice(
        [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e10, -1e4, 90.0, 1e-40]
    )
    return tensors | {name: odd}


def _odd_shape(tensors: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    tensor = tensors[name]
    shapes = [tensor.T if tensor.ndim == 2 else tensor[None], tensor.reshape(-1), tensor[:1]]
    shapes += [tensor[:0], torch.zeros(()), torch.cat([tensor, tensor]), torch.zeros(2, 4_000_000)]
    return tensors | {name: rng.choice(shapes)}


def _odd_name(tensors: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    others = [name + ".x", "x." + name, name.replace("dare_", "lora_"), name.replace(".3.", ".03.")]
    others += [name.replace("layers", "blocks"), name.upper(), "", "é", "base_model.model." + name]
    others += [name.replace("dare_router.", "dare_router.default."), name.replace(".0.", ".9.")]
    new = rng.choice(others)
    return {(new if key == name else key): tensor for key, tensor in tensors.items()}


def _missing(tensors: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    layer = name.rpartition(".dare_router")[0]
    gone = rng.choice([lambda k: k == name, lambda k: k.startswith(layer), lambda k: True])
    return {key: tensor for key, tensor in tensors.items() if not gone(key)}


def _extra(tensors: dict[str, Any], name: str, rng: random.Random) -> dict[str, Any]:
    names = ["dare_x", name + "_2", name.replace(".0.", ".77."), "lm_head.weight", "model.weight"]
    names.append("base_model.model.lm_head.weight")
    return tensors | {rng.choice(names): torch.zeros(rng.choice([1, 40, 1_000_000]))}


_CHANGES = (_odd_type, _odd_type, _odd_value, _odd_value, _odd_shape, _odd_name, _missing, _extra)


def adapter(good: Path, to: Path, rng: random.Random, names: list[str]) -> None:
    """A copy of an adapter's folder with its configuration, its tensors or both spoiled."""
    config, tensors = (good / CONFIG).read_bytes(), (good / TENSORS).read_bytes()
    how = rng.random()
    if how < 0.35:
        config = object_text(json.loads(config), rng, names).encode()
    elif how < 0.45:
        config = damaged(config, rng)
    elif how < 0.93 or how > 0.99:
        tensors = tensors_file(tensors, rng)
    if how < 0.93 or how > 0.985:
        (to / CONFIG).write_bytes(config)
        (to / TENSORS).write_bytes(tensors)
        return
    kept, data = rng.choice([(CONFIG, config), (TENSORS, tensors)])
    (to / kept).write_bytes(data)
    if kept == CONFIG and rng.random() < 0.5:
        (to / "adapter_model.bin").write_bytes(pickle.dumps(_Trap()))
    elif kept == CONFIG and rng.random() < 0.5:
        (to / TENSORS).mkdir()


class _Trap:
    """A pickle that would end the process."""

    def __reduce__(self) -> Any:
        return (exit, (99,))


_YAML = ["3e-4", "1E5", "-3e-4", ".nan", ".inf", "-.inf", "nan", "-1", "0", "1:30", "010", "0x1F"]
_YAML += ["[1, 2]", "{a: 1}", "null", "~", "", "yes", "off", "true", "2001-99-99", "2001-01-01"]
_YAML += ["!!python/object/apply:os.abort []", "!!binary x", "!!int a", "!!float z", "!!set {a}"]
_YAML += [
    "&a [*a]",
    "*b",
    "'x'",
    '"\\ud800"',
    "1" * 5000,
    "1e999",
    "1_000",
    "maze",
    "anole",
    "data.x",
]
_YAML += [
    "[" * 400 + "]" * 400,
    "[" * 5000,
    "{r: 0}",
    "{r: 4}",
    "{r: -3, x: 1}",
    "{lora_alpha: .nan}",
]
_YAML += [
    "{vision_retention: 3e-1}",
    "{max_hops: 1000000}",
    "{hop_decay: []}",
    "{target_modules: 3}",
]


def recipe(good: str, rng: random.Random, names: list[str]) -> bytes:
    """The text of a recipe with one to three lines changed, added or removed."""
    if rng.random() < 0.15:
        return damaged(good.encode(), rng)
    lines = good.splitlines()
    for _ in range(rng.randint(1, 3)):
        how, spot = rng.random(), rng.randrange(len(lines))
        name = rng.choice(names)
        line = f"{name}: {rng.choice(_YAML)}"
        if how < 0.5:
            lines = [kept for kept in lines if not kept.startswith(name + ":")] + [line]
        elif how < 0.8:
            lines[spot] = f"{lines[spot].partition(':')[0]}: {rng.choice(_YAML)}"
        else:
            lines.insert(
                spot, rng.choice([line, "- x", "\t", "? a", "a: b: c", "%YAML 9.9", "---"])
            )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def rows(good: list[dict[str, Any]], rng: random.Random) -> bytes:
    """JSON lines of which one or all are no rows."""
    texts = [json.dumps(row) for row in good]
    spot = rng.randrange(len(texts))
    if rng.random() < 0.3:
        texts[spot] = damaged(texts[spot].encode(), rng).decode("latin-1")
        return "\n".join(texts).encode(rng.choice(["utf-8", "latin-1"]))
    texts[spot] = object_text(good[spot], rng, ["images", "prompt", "response"])
    return "\n".join(texts).encode()
