"""What a layer leaves of a token that does not run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM = 0.05
"""Share of a training forward in what follows it: mean updates, and thresholds."""


def stale(hidden: Tensor, mean_update: Tensor | None, modality: Tensor) -> Tensor:
    """The hidden states of tokens that a layer passes by: as they are, or plus its mean update.

    Args:
        hidden: [B, S, D] what enters the layer.
        mean_update: Float32[2, D], rows text and vision; None for the plain form.
        modality: Int[B, S], 0 text, 1 vision, -1 pad; pads stay as they are.

    Returns:
        [B, S, D]; `hidden` itself without a mean update.

    Source: ours; docs/method.md, section 4 (mean update).
    """
    if mean_update is None:
        return hidden
    vectors = torch.nn.functional.pad(mean_update.to(hidden), (0, 0, 0, 1))  # -1 is the last row
    return hidden + vectors[modality.to(hidden.device).long()]


def mean_updates(change: Tensor, wanted: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of what a layer adds to tokens, by modality.

    Args:
        change: [B, S, D] its output minus its input.
        wanted: Bool[B, S] tokens that count.
        modality: Int[B, S], 0 text, 1 vision, -1 pad.

    Returns:
        Float32[2, D] sums, rows text and vision, and Float32[2] how many tokens each has.
    """
    kinds = torch.stack([wanted & (modality == kind) for kind in range(2)]).to(change.device)
    weights = kinds.flatten(1).to(torch.float32)
    return weights @ change.detach().flatten(0, 1).float(), weights.sum(1)
