"""Tells from a model's config alone whether it is supported and where its layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from dare_hf.architectures.locate import describe, locate
from dare_hf.errors import DareInputError
from dare_hf.report.flops import shapes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dare_hf.report.flops import LayerShape


def describe_model(name: str) -> Iterator[str]:
    """Lines about a model: supported, where its layers are, what a token costs.

    Args:
        name: A folder with a config.json, or a hub id.

    Raises:
        DareInputError: No config is found there.
        UnsupportedModelError: The model cannot be routed; the text says why.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DareInputError(
            f"model: expected a folder with a config.json of transformers, or a hub id, got "
            f"{name!r}: {reason}"
        ) from error
    yield describe(config)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    parts = locate(model)
    shapes = shapes_of(parts.layers, parts.text_config)
    yield f"class: {type(model).__name__}, text model {type(parts.text_model).__name__}"
    yield f"layers: {len(parts.layers)} x {type(parts.layers[0]).__name__} at {parts.spec.layers}"
    yield from _costs(shapes)


def _costs(shapes: list[LayerShape]) -> Iterator[str]:
    windows = sorted({shape.window for shape in shapes if shape.window is not None})
    if windows:
        sliding = sum(shape.window is not None for shape in shapes)
        yield f"sliding-window layers: {sliding}, window {', '.join(map(str, windows))} tokens"
    flops = 2 * sum(shape.linear_macs for shape in shapes)
    elements = sum(shape.kv_bytes_per_token(1) for shape in shapes)
    yield f"a token in all layers: {flops / 1e6:.4g} MFLOP besides attention"
    yield f"a token in all caches: {elements * 2} bytes in bfloat16"
