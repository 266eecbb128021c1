"""What the tests of places share: models, inputs, runs over several hops, and what is compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hop_runs import closing
from laws import FP32_TOLERANCE, SCORER, SPECIAL_IDS, TINY_MODELS, assert_close, inputs_of

from dare_hf import DareConfig, apply_dare, last_report, remove_dare
from dare_hf.compat import cache_of
from dare_hf.testing import tiny_model
from dare_hf.testing.samples import batch_of, samples
from dare_hf.testing.shrink import shrunk_model

MODELS = (*TINY_MODELS, "smolvlm")
IMAGES = (0, 1, 2)
"""Images of each row of the left-padded batch."""

STEPS = ((2, 6), (3,), (4, 8))
"""Sampled tokens of each row at which its hops close."""

NEW_TOKENS = 11
RATES: dict[str, Any] = {
    "schedule": "constant",
    "vision_retention": 0.4,
    "text_retention": 0.7,
    "hop_delimiters": (12,),
    "hop_decay": 0.7,
}
FULL = DareConfig(schedule="constant", vision_retention=1.0, text_retention=1.0)
PRUNED = {
    "attention": DareConfig(**RATES),
    "content": DareConfig(**RATES, scorer=SCORER),
    "key_norm": DareConfig(**RATES, scorer="key_norm", pruned="drop"),
    "capped": DareConfig(**RATES, max_kv_tokens=14),
}
"""By name: scored by attention (heads matter), by content, by keys; a cap on what is kept."""


@dataclass
class Trace:
    """One generate: what it wrote, and what is left of it.

    Attributes:
        sequences: Long[B, N].
        logits: Float32[steps, B, V].
        kept: Long[layers, B] tokens stored; None without DARE.
        positions: Per layer Long[B, C] which they are.
        report: The report without its time.
    """

    sequences: torch.Tensor
    logits: torch.Tensor
    kept: torch.Tensor | None = None
    positions: tuple[torch.Tensor, ...] = ()
    report: dict[str, Any] | None = None


def place_model(name: str, **kwargs: Any) -> Any:
    """The tiny model `name` of MODELS."""
    return tiny_model(name, **kwargs) if name in TINY_MODELS else shrunk_model(name, **kwargs)


def place_inputs(model: Any) -> dict[str, Any]:
    """A left-padded batch of rows with 0, 1 and 2 images."""
    if model.config.model_type in TINY_MODELS:
        return inputs_of(model, IMAGES)
    return batch_of(model, samples(model, IMAGES)).inputs


def plain_trace(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Trace:
    """Generate with a model as it is, with or without DARE."""
    banned = [*SPECIAL_IDS, *range(7, 10), *range(81, 100)]
    options = {"max_new_tokens": NEW_TOKENS, "suppress_tokens": banned, **kwargs}
    return _trace(closing(model, copy.deepcopy(inputs), STEPS, **options))


def _trace(out: Any) -> Trace:
    return Trace(out.sequences, torch.stack(out.logits).float(), *_stored(cache_of(out)))


def _stored(cache: Any) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
    if not hasattr(cache, "kept_lengths"):
        return None, ()
    return cache.kept_lengths(), tuple(layer.positions().cpu() for layer in cache.stored)


def trace(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Trace:
    """Generate with a model that has DARE."""
    return _reported(plain_trace(model, inputs, **kwargs), model)


def as_trace(model: Any, out: Any) -> Trace:
    """What generate gave, of a model that has DARE."""
    return _reported(_trace(out), model)


def _reported(made: Trace, model: Any) -> Trace:
    made.report = last_report(model).to_dict()
    del made.report["seconds"]
    return made


def routed_trace(model: Any, inputs: dict[str, Any], config: DareConfig, **kwargs: Any) -> Trace:
    """Generate with DARE put on for this run."""
    apply_dare(model, config)
    try:
        return trace(model, inputs, **kwargs)
    finally:
        remove_dare(model)


def assert_same_trace(
    ours: Trace, theirs: Trace, what: str, tolerance: float = FP32_TOLERANCE
) -> None:
    """Hold two runs to the same tokens, the same stored tokens and the same report."""
    assert ours.sequences.tolist() == theirs.sequences.tolist(), f"{what}: other tokens"
    if ours.kept is not None and theirs.kept is not None:
        assert ours.kept.tolist() == theirs.kept.tolist(), f"{what}: other kept_lengths"
        for layer, (left, right) in enumerate(zip(ours.positions, theirs.positions, strict=True)):
            assert left.tolist() == right.tolist(), f"{what}: other keep-set in layer {layer}"
    if ours.report is not None and theirs.report is not None:
        assert ours.report == theirs.report, f"{what}: other report"
    assert_close(ours.logits, theirs.logits, tolerance=tolerance, what=f"{what}: logits")


__all__ = [
    "FULL",
    "MODELS",
    "PRUNED",
    "RATES",
    "Trace",
    "as_trace",
    "assert_same_trace",
    "place_inputs",
    "place_model",
    "plain_trace",
    "routed_trace",
    "trace",
]
