"""Reading a trained router adapter from a folder or the hub, and checking that it fits a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft.utils import load_peft_weights

from dare_hf.config import DareConfig
from dare_hf.errors import AdapterMismatchError, DareConfigError
from dare_hf.routers.holder import NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

_KEY = re.compile(rf"(?:^|\.)(\d+)\.{NAME}\.(\w+)$")


def read_adapter(source: str) -> tuple[DareConfig, list[dict[str, Tensor]]]:
    """Read an adapter as it was saved, by peft or by `model.save_pretrained`.

    Args:
        source: A folder with adapter_config.json and adapter_model.safetensors, or a hub id.

    Returns:
        Its configuration, and for each routed layer in order the router's tensors by name, on the
        CPU.

    Raises:
        DareConfigError: There is no adapter, or it belongs to another method.
        AdapterMismatchError: Its tensors are not what its configuration says.
    """
    try:
        config = DareConfig.from_pretrained(source)
        weights = load_peft_weights(source, device="cpu")
    except DareConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DareConfigError(
            "config: expected a DareConfig, or a folder or hub id with adapter_config.json and "
            f"adapter_model.safetensors; got {source!r}: {reason}"
        ) from error
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = _KEY.search(key)
        if found is None:
            raise AdapterMismatchError(
                f"expected router tensors only ('….<layer>.{NAME}.<name>'); {source!r} holds "
                f"{key!r}. Save the adapter again, without modules of the base model"
            )
        layers.setdefault(int(found[1]), {})[found[2]] = tensor
    return config, [layers[index] for index in sorted(layers)]


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
