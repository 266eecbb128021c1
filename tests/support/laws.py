"""What the law tests share: cases, runs, a content-dependent scorer, tolerances."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dare_hf import DareConfig, apply_dare, compat, register_scorer, remove_dare
from dare_hf.testing import TINY_MODELS, collate, tiny_model, tiny_rows
from dare_hf.testing.inputs import TINY_TEXT_TOKENS

prefills_in_chunks = pytest.mark.skipif(
    compat.VERSION < (5, 23),
    reason="prefill chunks of this transformers leave the images out, so DARE refuses them",
)

checkpoints_inside = pytest.mark.skipif(
    compat.VERSION < (5, 23),
    reason="checkpoints of this transformers enclose the routed layer, so DARE refuses them",
)


def needs_later_images(model) -> None:
    """Skip where transformers misplaces the images of a later turn, so that DARE refuses them."""
    if compat.misplaces(model):
        pytest.skip("this transformers misplaces images of later turns, so DARE refuses them")


ATTENTIONS = ("sdpa", "eager")
BATCHES: dict[str, tuple[int, ...]] = {"alone": (1,), "padded": (0, 1, 2)}
"""Images of each row: one row, and a left-padded batch of three."""

NEW_TOKENS = 8
SPECIAL_IDS = [3, 4, 5, 6]
"""Placeholder and frame ids; fed back as sampled tokens they would ask for an image."""

FP32_TOLERANCE = 2e-4
"""Logits of the sharp tiny models reach 10, and other gemm shapes round at 1e-6 a layer."""

FP64_TOLERANCE = 1e-5
"""HF's RMSNorm and RoPE compute in float32 inside a float64 model, so 1e-7 relative remains."""


def hashed_scores(hidden, modality, *, layer, hop, positions):
    """Score by the content of a token alone, differently at each layer."""
    generator = torch.Generator().manual_seed(100 + layer)
    weight = torch.randn(hidden.shape[-1], generator=generator).to(hidden.dtype)
    unit = hidden / hidden.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.sigmoid(3 * unit @ weight)


SCORER = "test_content"
register_scorer(SCORER, hashed_scores)


@functools.cache
def shared_model(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0
):
    """Return a model no test may leave patched; building one takes longer than a forward."""
    return tiny_model(name, attn_implementation=attention, dtype=dtype, seed=seed)


def rows_of(model, images=(1,), **kwargs: Any) -> list[dict[str, Any]]:
    return tiny_rows(model, images=images, **kwargs)


def inputs_of(model, images=(1,), **kwargs: Any) -> dict[str, Any]:
    return collate(model, tiny_rows(model, images=images, **kwargs))


def level_inputs(model, images) -> dict[str, Any]:
    """A batch without a pad whose rows have other numbers of images and so keep other numbers."""
    lengths = [len(row["ids"]) for row in tiny_rows(model, images=images)]
    text = [TINY_TEXT_TOKENS + max(lengths) - length for length in lengths]
    inputs = inputs_of(model, images, text=text)
    assert inputs["attention_mask"].all()
    return inputs


@contextmanager
def dare(model, config: DareConfig | None = None, **fields: Any) -> Iterator[Any]:
    """Patch a model for the length of a block; fields make a config of the test's scorer."""
    if config is None:
        options = {"scorer": SCORER, "schedule": "constant", **fields}
        config = DareConfig(**options)
    apply_dare(model, config)
    try:
        yield model
    finally:
        remove_dare(model)


def everything(**fields: Any) -> dict[str, Any]:
    """Fields of a config that prunes nothing."""
    return {"vision_retention": 1.0, "text_retention": 1.0, **fields}


def generate(model, inputs: dict[str, Any], *, seed: int = 0, **kwargs: Any):
    """Return generate's full output; the inputs are left as they were."""
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "suppress_tokens": SPECIAL_IDS,
        "return_dict_in_generate": True,
        "output_logits": True,
        **kwargs,
    }
    torch.manual_seed(seed)
    return model.generate(**copy.deepcopy(inputs), **options)


@torch.no_grad()
def forward(model, inputs: dict[str, Any], **kwargs: Any):
    return model(**copy.deepcopy(inputs), **kwargs)


def assert_same_run(ours, theirs, *, tolerance: float = FP32_TOLERANCE, what: str) -> None:
    """Hold two outputs of generate to the same tokens and to logits within the tolerance."""
    assert ours.sequences.tolist() == theirs.sequences.tolist(), f"{what}: other tokens"
    for step, (left, right) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert_close(left, right, tolerance=tolerance, what=f"{what}: logits of step {step}")


def assert_close(ours, theirs, *, tolerance: float, what: str) -> None:
    # Chameleon bars image tokens with the dtype's minimum, -inf after a cast.
    barred = [side <= torch.finfo(torch.float32).min for side in (ours, theirs)]
    assert torch.equal(*barred), f"{what}: other tokens are barred"
    worst = (ours - theirs).masked_fill(barred[0], 0).abs().max().item()
    assert worst <= tolerance, f"{what}: differ by {worst:.2e}, allowed {tolerance:.0e}"


__all__ = [
    "ATTENTIONS",
    "BATCHES",
    "FP32_TOLERANCE",
    "FP64_TOLERANCE",
    "NEW_TOKENS",
    "SCORER",
    "SPECIAL_IDS",
    "TINY_MODELS",
    "assert_close",
    "assert_same_run",
    "dare",
    "everything",
    "forward",
    "generate",
    "hashed_scores",
    "inputs_of",
    "level_inputs",
    "rows_of",
    "shared_model",
]
