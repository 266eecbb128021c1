"""Thresholds of routed decode: which sampled tokens skip a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def rate_rows(hop: Tensor, rows: int) -> Tensor:
    """Long, as `hop`: the row of a table of rates that serves each hop, as `rate_row` says."""
    return torch.where(hop <= 1, 0, hop.clamp(max=rows - 1)).long()


def limits(thresholds: Tensor, hop: Tensor, modality: Tensor) -> Tensor:
    """Float32[B, S]: the threshold of each token.

    Args:
        thresholds: Float32[rows, 2], columns text and vision.
        hop: Int[B, S].
        modality: Int[B, S], 0 text, 1 vision, -1 pad, which gets any.
    """
    table = thresholds.to(hop.device)
    return table[rate_rows(hop, len(table)), modality.long().clamp(min=0)]


def below(scores: Tensor, thresholds: Tensor, hop: Tensor, modality: Tensor) -> Tensor:
    """Bool[B, S]: tokens whose score is under the threshold of their hop and modality.

    Args:
        scores: Float32[B, S].
        thresholds: Float32[rows, 2].
        hop: Int[B, S].
        modality: Int[B, S].

    Source: ours; docs/method.md, section 6.
    """
    return scores < limits(thresholds, hop, modality).to(scores.device)


@torch.no_grad()
def follow_quantiles(
    thresholds: Tensor,
    scores: Tensor,
    wanted: Tensor,
    hop: Tensor,
    modality: Tensor,
    rates: Sequence[Sequence[float]],
    step: float,
) -> None:
    """Move thresholds, in place, towards the (1 - rate) quantiles of these scores.

    A row of the table whose hops and modality these tokens do not have stays as it is; where a rate
    is 1 the threshold is 0, under which no score is.

    Args:
        thresholds: Float32[rows, 2].
        scores: Float32[B, S].
        wanted: Bool[B, S] sampled tokens that could skip.
        hop: Int[B, S].
        modality: Int[B, S].
        rates: [rows][text, vision].
        step: How far, in (0, 1].
    """
    place = rate_rows(hop, len(rates))
    for row, pair in enumerate(rates):
        for kind, rate in enumerate(pair):
            mine = wanted & (place == row) & (modality == kind)
            if rate >= 1:
                thresholds[row, kind] = 0.0
            elif bool(mine.any()):
                found = torch.quantile(scores[mine.to(scores.device)].float(), 1 - rate)
                thresholds[row, kind].lerp_(found.to(thresholds), step)
