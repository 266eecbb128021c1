"""Reading a trained router adapter from a folder or the hub, and checking that it fits a model."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from dare_hf.config import DareConfig
from dare_hf.config.dare_config import PRESETS
from dare_hf.errors import AdapterMismatchError, DareConfigError, alike
from dare_hf.routers.holder import NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    Shapes = Sequence[Mapping[str, tuple[int, ...]]]

_KEY = re.compile(rf"(?:^|\.)(0|[1-9]\d{{0,5}})\.{NAME}\.(\w+)$")
_MOST_HEADER = 2**22
"""Bytes of a file's table of tensors: some 30,000 of them, where a router has three a layer."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_adapter(source: str) -> tuple[DareConfig, Path | None]:
    """Find an adapter as it was saved, by peft or by `model.save_pretrained`.

    Args:
        source: A folder with adapter_config.json and adapter_model.safetensors, or a hub id; a
            training-free configuration may be alone there.

    Returns:
        Its configuration, and the file of its tensors for `read_routers`, None without one.

    Raises:
        DareConfigError: There is no adapter, or it belongs to another method.
    """
    config = read_config(source)
    alone = not (config.scorer == "router" or config.learns_rates or config.multiplies)
    try:
        return config, tensors_file(source)
    except DareConfigError:
        if alone:
            return config, None
        raise


def read_config(source: str) -> DareConfig:
    """The configuration in a folder or hub id, with or without an adapter's tensors beside it.

    Raises:
        DareConfigError: There is none, or it belongs to another method.
    """
    try:
        return DareConfig.from_pretrained(source)
    except DareConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _nothing(source, error) from error


def tensors_file(source: str, **hub: Any) -> Path:
    """The safetensors file of an adapter; no other kind is ever read.

    Args:
        source: A folder, or a hub id.
        hub: subfolder, revision, token and the like, as `hf_hub_download` takes them.

    Raises:
        DareConfigError: There is none.
    """
    folder = Path(source, hub.get("subfolder") or "")
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return folder / SAFETENSORS_WEIGHTS_NAME
    try:
        if folder.is_dir():
            raise FileNotFoundError(f"no {SAFETENSORS_WEIGHTS_NAME} there (pickles are not read)")
        return Path(hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME, **hub))
    except (OSError, ValueError) as error:
        raise _nothing(source, error) from error


def _nothing(source: str, error: Exception) -> DareConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DareConfigError(
        "config: expected a DareConfig, or a folder or hub id with adapter_config.json and "
        f"{SAFETENSORS_WEIGHTS_NAME}, or a preset's name; got {source!r}{alike(source, PRESETS)}: "
        f"{reason}"
    )


def read_routers(file: Path, wanted: Shapes) -> list[dict[str, Tensor]]:
    """The routers' tensors of an adapter's file, which are checked before they are read.

    Args:
        file: A safetensors file.
        wanted: For each routed layer in order the shapes of its router's tensors by name.

    Returns:
        Float32 tensors by name for each of these layers, on the CPU.

    Raises:
        AdapterMismatchError: The file is damaged, or its tensors are not exactly those.
    """
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
        if length > _MOST_HEADER:
            raise ValueError(f"its table of tensors says it has {length} bytes")
        with safe_open(file, "pt") as tensors:
            keys = tensors.keys()
            found = {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
            places = _places(found, wanted)
            read = {place: tensors.get_tensor(key) for key, place in places.items()}
    except AdapterMismatchError:
        raise
    except (SafetensorError, OSError, struct.error, ValueError, TypeError, AttributeError) as error:
        raise AdapterMismatchError(
            f"{file.name}: expected a safetensors file as an adapter is saved; got one that cannot "
            f"be read: {str(error)[:200]}. Save or download the adapter {file.parent} again"
        ) from error
    check_values((f"{layer}.{NAME}.{name}", tensor) for (layer, name), tensor in read.items())
    names = [list(shapes) for shapes in wanted]
    return [{n: read[i, n].float() for n in own} for i, own in enumerate(names)]


def routers_of(tensors: Mapping[str, Tensor], wanted: Shapes) -> None:
    """Hold tensors that are in memory to what `read_routers` asks of a file.

    Raises:
        AdapterMismatchError: They are not exactly those.
    """
    _places({key: tuple(tensor.shape) for key, tensor in tensors.items()}, wanted)
    check_values(tensors.items())


def _places(found: Mapping[str, tuple[int, ...]], wanted: Shapes) -> dict[str, tuple[int, str]]:
    """Where each key of a file belongs: which of the routed layers, and the tensor's name."""
    parts: dict[str, tuple[int, str]] = {}
    for key in found:
        match = _KEY.search(key)
        if match is None:
            raise AdapterMismatchError(
                f"expected router tensors only ('….<layer>.{NAME}.<name>'); the adapter's file "
                f"holds {key[:200]!r}. Save the adapter again, without modules of the base model"
            )
        parts[key] = int(match[1]), match[2]
    # numbers as the model counts them, where some of its layers have no router
    order = {layer: place for place, layer in enumerate(sorted({i for i, _ in parts.values()}))}
    places = {key: (order[layer], name) for key, (layer, name) in parts.items()}
    if len(set(places.values())) < len(places):
        raise AdapterMismatchError(
            f"expected one tensor for each place in a layer; the adapter's file has {len(places)} "
            f"for {len(set(places.values()))}. Save the adapter again"
        )
    check_tensors(
        {f"{i}.{name}": found[key] for key, (i, name) in places.items()},
        {f"{i}.{name}": shape for i, own in enumerate(wanted) for name, shape in own.items()},
    )
    return places


def check_values(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse router tensors that no training leaves.

    Args:
        tensors: By name.

    Raises:
        AdapterMismatchError: One is no floating point tensor, or not finite in float32.
    """
    for name, tensor in tensors:
        if tensor.dtype not in _FLOATS:
            raise AdapterMismatchError(
                f"{name}: expected float32, float16, bfloat16 or float64; got {tensor.dtype} in "
                "the adapter's file. Save the adapter again as it was trained"
            )
        if not bool(tensor.float().isfinite().all()):
            raise AdapterMismatchError(
                f"{name}: expected finite numbers in the adapter's file; got NaN or infinity. Its "
                "training diverged or the file is damaged: load an earlier checkpoint"
            )


def check_made_for(config: DareConfig, made: Mapping[str, object]) -> None:
    """Refuse an adapter's configuration on a model of another depth, width or architecture.

    Args:
        config: The configuration; a fresh one says nothing of a model and fits each.
        made: The model's num_layers, hidden_size and model_type.

    Raises:
        AdapterMismatchError: One of them differs.
    """
    for name, value in made.items():
        wanted = getattr(config, name)
        if wanted is not None and wanted != value:
            raise AdapterMismatchError(
                f"{name}: expected a model with {wanted!r}, which this router adapter was made "
                f"for; got one with {value!r}. Load the adapter on its own base model"
                + (f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else "")
                + ", or make a new one for this model"
            )


def check_tensors(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not exactly those the model's routers have.

    Args:
        found: Shapes by name in the file.
        wanted: Shapes by name in the model.

    Raises:
        AdapterMismatchError: A tensor is missing, too many or of another shape.
    """
    for name, shape in wanted.items():
        if found.get(name) != shape:
            got = f"shape {list(found[name])}" if name in found else "no such tensor"
            raise AdapterMismatchError(
                f"{name}: expected shape {list(shape)} in the adapter's file; got {got}. The "
                "adapter was made for a model of another depth, width or architecture, or for "
                "another number of hops: load it on its own base model"
            )
    if extra := sorted(set(found) - set(wanted)):
        raise AdapterMismatchError(
            f"{extra[0]}: expected no such tensor; the adapter's file has {len(extra)} this model "
            "has no place for. It was made for a model of another depth or architecture"
        )


def shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors}
