"""Tells from a model's config alone whether it is supported and where its layers are.

The config may come from anywhere: no code of its folder is run, and none is offered to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from dare_hf.architectures.locate import describe, locate
from dare_hf.config.checks import shown
from dare_hf.errors import DareInputError
from dare_hf.report.flops import shapes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dare_hf.report.flops import LayerShape


_MOST_PARTS = 1024
"""Layers, blocks or experts that a config may ask for; more would only take time to build."""
_COUNTS = ("layers", "depth", "depths", "experts", "blocks", "tables", "stages")


def describe_model(name: str) -> Iterator[str]:
    """Lines about a model: supported, where its layers are, what a token costs.

    Args:
        name: A folder with a config.json, or a hub id.

    Raises:
        DareInputError: No config is found there.
        UnsupportedModelError: The model cannot be routed; the text says why.
    """
    config = _read(name)
    yield describe(config)
    model = _built(name, config)
    parts = locate(model)
    shapes = shapes_of(parts.layers, parts.text_config)
    yield f"class: {type(model).__name__}, text model {type(parts.text_model).__name__}"
    yield f"layers: {len(parts.layers)} x {type(parts.layers[0]).__name__} at {parts.spec.layers}"
    yield from _costs(shapes)


def model_without_weights(name: str) -> Any:
    """A model on the meta device, from its config alone.

    Args:
        name: A folder with a config.json, or a hub id.

    Raises:
        DareInputError: No config is found there.
    """
    return _built(name, _read(name))


def _read(name: str) -> Any:
    """The config at `name`, by transformers' own code only."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a config from anywhere: transformers checks little of it
        if "trust_remote_code" in str(error):
            raise DareInputError(
                f"model: expected a model that transformers has code for; got {name!r}, which "
                "brings code of its own (auto_map), and info never runs code of a folder"
            ) from error
        raise _unreadable(name, error) from error


def _built(name: str, config: Any) -> Any:
    """The model without weights."""
    many = sorted(f"{key}={count}" for key, count in _counts(config.to_dict()))
    if many:
        raise DareInputError(
            f"model: expected a config with at most {_MOST_PARTS} layers or experts of a kind; "
            f"got {name!r} with {', '.join(many)[:200]}"
        )
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(name, error) from error


def _counts(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of counts beyond the bound, in a config and those inside it."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and value > _MOST_PARTS and key.rpartition("_")[2] in _COUNTS:
            yield key, shown(value)


def _unreadable(name: str, error: Exception) -> DareInputError:
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return DareInputError(
        f"model: expected a folder with a config.json of transformers, or a hub id, got {name!r}: "
        f"{reason or type(error).__name__}"
    )


def _costs(shapes: list[LayerShape]) -> Iterator[str]:
    windows = sorted({shape.window for shape in shapes if shape.window is not None})
    if windows:
        sliding = sum(shape.window is not None for shape in shapes)
        yield f"sliding-window layers: {sliding}, window {', '.join(map(str, windows))} tokens"
    flops = 2 * sum(shape.linear_macs for shape in shapes)
    elements = sum(shape.kv_bytes_per_token(1) for shape in shapes)
    yield f"a token in all layers: {flops / 1e6:.4g} MFLOP besides attention"
    yield f"a token in all caches: {elements * 2} bytes in bfloat16"
