"""What the training tests share: models with sharp routers, batches whose rows close hops."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hop_runs import BY_WORD, closing
from laws import BATCHES, inputs_of
from peft import get_peft_model

from dare_hf import DareConfig
from dare_hf.testing import tiny_model, written_inputs

STEPS = {1: [[3, 4, 11, 16]], 3: [[2, 9], [5, 6, 7, 15], [0, 12]]}
"""Where the rows close their hops: two at once, one after another, at the first token."""

FIELDS = {"hop_delimiters": BY_WORD["hop_delimiters"], "max_hops": 4}


@functools.cache
def trainee(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
    """Return a model that only training tests use: peft freezes its weights for good."""
    return tiny_model(name, attn_implementation=attention, dtype=dtype)


def sharpen(routers, seed: int = 0) -> None:
    """Draw routers anew so that scores spread over (0, 1) and every hop has rates of its own."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers:
        width = router.weight.shape[1]
        noise = torch.randn(router.weight.shape, generator=generator) * 1.5 / width**0.5
        router.weight.data.copy_(noise)
        router.bias.data.copy_(torch.randn(2, generator=generator) * 0.2)
        rates = 0.25 + 0.6 * torch.rand(router.rate_logits.shape, generator=generator)
        router.rate_logits.data.copy_(rates.logit())


@contextmanager
def routed(model, **fields: Any) -> Iterator[Any]:
    """Put a sharp router adapter on a model for the length of a block."""
    # prompts are shorter than what is protected by default
    options = {
        "scorer": "router",
        "schedule": "learned",
        "recent_tokens": 0,
        **FIELDS,
        **fields,
    }
    wrapped = get_peft_model(model, DareConfig(**options))
    sharpen(controller_of(wrapped).routers)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        model.eval()


def controller_of(model):
    """The controller of a model, or of the one inside a PeftModel."""
    inner = getattr(model, "get_base_model", None)
    return (inner() if inner else model)._dare.controller


def written_batch(wrapped, rows: str = "padded", **kwargs: Any) -> tuple[dict[str, Any], Any, int]:
    """A generate whose rows close hops, as a training batch with labels.

    Returns:
        The batch, generate's output and the columns of its prompt.
    """
    model = wrapped.get_base_model()
    inputs = inputs_of(model, BATCHES[rows])
    span = inputs["input_ids"].shape[1]
    out = closing(model, inputs, STEPS[len(inputs["input_ids"])], **kwargs)
    batch = written_inputs(model, inputs, out.sequences)
    del batch["position_ids"]  # nobody who trains gives them
    labels = out.sequences.clone()
    labels[:, :span] = -100
    return {**batch, "labels": labels}, out, span
