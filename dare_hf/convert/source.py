"""A checkpoint folder as it was published: its config, its files of tensors; never its code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_KINDS = ("*.safetensors", "*.bin", "*.pth", "*.ckpt")
"""In this order; a folder that has files of the first is read from those alone."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with one object.

    Raises:
        DareInputError: There is none, or it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DareInputError(f"convert: expected a JSON file {path}; got {error}") from error
    if not isinstance(found, dict):
        raise DareInputError(f"convert: expected one JSON object in {path}; got {type(found)}")
    return found


def tensor_files(source: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors.

    Args:
        source: A folder, or one such file.

    Raises:
        DareInputError: There are none.
    """
    if source.is_file():
        return [source]
    for kind in _KINDS:
        # training_args.bin lies beside the weights of many a Trainer run
        files = [path for path in sorted(source.glob(kind)) if path.name != "training_args.bin"]
        if files:
            return files
    raise DareInputError(
        f"convert: expected a folder with weights ({', '.join(_KINDS)}); got {str(source)!r}"
    )


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, read as they are asked for.

    Pickled files are read by `torch.load(weights_only=True, mmap=True)`: nothing of them runs.

    Raises:
        DareInputError: The file cannot be read as tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                    yield name, file.get_tensor(name)
            return
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        yield from state.get("state_dict", state).items()
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, AttributeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise DareInputError(
            f"convert: expected tensors alone in {path.name}, readable with weights_only=True; "
            f"got {reason[:200]}"
        ) from e


def shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape over all files; of safetensors only the headers are read.

    Raises:
        DareInputError: A name comes twice, or a file cannot be read.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        for name, shape in _headers(path):
            if name in found:
                raise DareInputError(f"convert: expected {name!r} once; got it again in {path}")
            found[name] = shape
    return found


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if path.suffix != ".safetensors":
        for name, tensor in tensors(path):
            yield name, tuple(tensor.shape)
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                yield name, tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise DareInputError(
            f"convert: expected safetensors in {path.name}; got {error}"
        ) from error
