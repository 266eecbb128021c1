"""Which tokens of a context stay in which layer, by one threshold over all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dare_hf.cache import Thinning
from dare_hf.routing.retention import budget
from dare_hf.routing.selection import capped_keep, last_valid, shared_keep

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from torch import Tensor

    from dare_hf.cache import DareCache


class Shares(NamedTuple):
    """How much of a context stays, and what of it in any case.

    Attributes:
        keep: Share of the real tokens, mean over the layers, in (0, 1].
        first: Real tokens at each row's head that all layers keep.
        last: Real tokens at each row's end that all layers keep; the last one always is.
        cap: Tokens no row of a layer may exceed, forced ones included; None for no cap.
    """

    keep: float
    first: int
    last: int
    cap: int | None


def decide_context(
    cache: DareCache, scores: Mapping[int, Tensor], shares: Shares, whole: Container[int]
) -> list[Thinning]:
    """What each layer of an unpruned cache shall keep; nothing is changed yet.

    Law: of the n real tokens of a row the layers keep ``ceil(keep * layers * n)`` in all: the
    forced ones in every layer (all of them even if they are more), and the best-scoring others,
    scores of all layers being compared. Under a cap a layer's candidates are its forced tokens,
    the last one first, and its best-scoring others up to the cap.

    Args:
        cache: The cache of the context; it holds every token, pads as holes.
        scores: By layer, Float[B, N] score of each logical token.
        shares: How much stays.
        whole: Layers that keep everything.

    Source: docs/method.md, section 5 (reconstruction).
    """
    slots = {i: slot for i, slot in enumerate(cache.stored) if slot.rows}
    real = cache.log.modality >= 0
    tiers = _tiers(cache, real, shares)
    device = next(iter(scores.values())).device
    ranked = [scores[i].to(device) for i in slots]
    # From here on all tensors of one kind are [B, layers, N].
    forced = torch.stack([real if i in whole else torch.stack(tiers).any(0) for i in slots], dim=1)
    able = real[:, None].expand_as(forced)
    if shares.cap is not None:
        own = [
            capped_keep(score, real.to(device), [t.to(device) for t in tiers], shares.cap)
            for score in ranked
        ]
        able = torch.stack(own, dim=1)
    counts = real.sum(1).tolist()
    budgets = [budget(shares.keep, n * len(slots)) for n in counts]
    keep = shared_keep(
        torch.stack(ranked, dim=1), able.to(device), forced.to(device) & able.to(device), budgets
    )
    kept = keep.sum(2).T.tolist()
    return [
        Thinning(
            slot, slot._table, keep[:, at].to(slot.device), kept[at], ranked[at].to(slot.device)
        )
        for at, slot in enumerate(slots.values())
    ]


def _tiers(cache: DareCache, real: Tensor, shares: Shares) -> list[Tensor]:
    """Bool[B, N] each: forced tokens, what a cap keeps first standing first."""
    rank = real.cumsum(1)
    behind = rank[:, -1:] - rank
    first, last = real & (rank <= shares.first), real & (behind < shares.last)
    always = cache.log.always
    named = [] if always is None else [always & real]
    return [last_valid(real), first, *named, last]
