"""How an attention is called, and the last queries that score the keys of closed hops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dare_hf.cache.ring import RING, WINDOW, QueryRing
from dare_hf.errors import DareStateError
from dare_hf.routing.scores import attention_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dare_hf.cache import DareLayer
    from dare_hf.routing.scores import Softmax

    Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class AttentionCall(NamedTuple):
    """How one attention is called.

    Attributes:
        softmax: What becomes of queries and keys.
        window: Tokens a sliding layer sees where its mask does not say so, None for all.
        mask: The mask of the running rows over the physical columns.
    """

    softmax: Softmax
    window: int | None
    mask: Any


def push_queries(
    slot: DareLayer,
    query: Tensor,
    columns: Tensor,
    call: AttentionCall,
    *,
    sampled: int,
    dense: bool,
) -> None:
    """Remember the layer's last queries for the scores of hops that close later.

    A hop may have closed before any of the forward's sampled tokens, and all of them but the first
    may be rejected: the window before them is remembered too.

    Args:
        slot: The layer's cache.
        query: [B, H, K, d] of the running tokens.
        columns: Long[B|1, K] their logical positions, -1 for fills and pads.
        call: How their attention is called.
        sampled: How many of them were sampled, in the row that has most.
        dense: Whether none is -1.
    """
    ring = slot.ring or QueryRing.empty(query, call.softmax)
    columns = columns.to(query.device).expand(query.shape[0], -1)
    slot.ring = ring.pushed(query, columns, max(RING, WINDOW + sampled), dense=dense)


def push_next(slot: DareLayer, query: Tensor, past: int, call: AttentionCall) -> None:
    """Remember the queries [B, H, 1, d] of every row's next token, at logical position `past`."""
    if slot.ring is None:
        slot.ring = QueryRing.empty(query, call.softmax)
    slot.ring = slot.ring.noted(query, past, RING)


def observed_scores(
    slot: DareLayer, closed: Tensor, ends: list[int], expand: Expand | None = None
) -> Tensor:
    """Float32[B, C]: stored keys of closed hops scored by the layer's query ring.

    Args:
        slot: The layer's cache; without a ring every score is 0.
        closed: Bool[B, C] stored columns that belong to closed hops.
        ends: Per row the last position of the hop that closed; later queries do not count.
        expand: What makes keys and values of the latents that are stored; None where keys are.
    """
    ring, keys, values = slot.ring, slot.keys, slot.values
    if ring is None or keys is None or values is None:
        return torch.zeros(closed.shape, device=closed.device)
    if expand is not None:
        keys, values = expand(keys, values)
    return ring_scores(ring, (keys, values), slot.positions(), closed, ends)


def ring_scores(
    ring: QueryRing,
    stored: tuple[Tensor, Tensor],
    where: Tensor,
    closed: Tensor,
    ends: list[int],
) -> Tensor:
    """Float32[B, C]: keys and values at logical `where` scored by the last queries up to `ends`.

    Raises:
        DareStateError: A crop has taken some of them.
    """
    until = torch.tensor(ends).to(where.device, non_blocking=True)
    last = ring.until(until, WINDOW)
    if ring.short(last, until):
        raise DareStateError(
            f"hop_score='observed': expected the last {WINDOW} queries of the hop that has closed, "
            f"which score what it keeps; a crop of more than {RING - WINDOW} tokens has taken "
            "some. Start with a new DareCache, or set hop_score='stored'"
        )
    seen = (where[:, None, :] <= last.positions[:, :, None]) & (where >= 0)[:, None, :]
    there = last.positions >= 0
    shown = (seen[:, None], there, closed)
    return attention_scores(last.query, *stored, *shown, *ring.softmax)
