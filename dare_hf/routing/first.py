"""What a layer keeps of a span: first an even grid and the newest text, then the best scores."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dare_hf.routing.even_grid import SHARE_UNIT, even_grid
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.selection import Competitors, keep_mask, newest


def newest_text(
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
    text_budget: Int[Tensor, " batch"],
    share: float,
) -> Bool[Tensor, "batch tokens"]:
    """Of each row's text budget k, the ``floor(share * k)`` newest text tokens.

    Forced ones among them count as given; where forced ones elsewhere leave less room, only the
    newest find a place, so that forced and newest together never exceed k.

    Args:
        modality: TEXT, VISION or PAD.
        candidates: columns that may be kept (of the survivors, under ``pruned="drop"``).
        forced: columns kept whatever their score.
        text_budget: k of each row, on the device.
        share: recent_share, in [0, 1].

    Source: docs/method.md, section 2 (recent_share).
    """
    able = (modality == TEXT) & candidates
    budget = text_budget.long()[:, None].minimum(able.sum(1, keepdim=True))
    room = (budget - (able & forced).sum(1, keepdim=True)).clamp(min=0)
    quota = round(share * SHARE_UNIT) * budget // SHARE_UNIT
    return newest(able & ~forced, room) & newest(able, quota)


def taken_first(
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
    budgets: Int[Tensor, "batch 2"],
    uniform_share: float,
    recent_share: float,
) -> Bool[Tensor, "batch tokens"] | None:
    """The columns of both shares, within the budgets [TEXT, VISION]; None where both are 0."""
    found = None
    if uniform_share > 0:
        found = even_grid(modality, candidates, forced, budgets[:, VISION], uniform_share)
    if recent_share > 0:
        recent = newest_text(modality, candidates, forced, budgets[:, TEXT], recent_share)
        found = recent if found is None else found | recent
    return found


def span_keep(
    scores: Float[Tensor, "batch tokens"],
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
    budgets: Sequence[Sequence[int]],
    shares: tuple[float, float],
    groups: Competitors | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens of a span run a layer: what is taken first, then the best scores.

    Args:
        scores: the higher, the better.
        modality: TEXT, VISION or PAD.
        candidates: columns that may be kept.
        forced: columns kept whatever their score.
        budgets: per row [TEXT, VISION] tokens to keep, on the host.
        shares: uniform_share and recent_share.
        groups: `competitors` of the same columns, where layers share them.

    Source: docs/method.md, section 4.
    """
    wanted = torch.tensor(budgets).to(modality.device, non_blocking=True)
    first = taken_first(modality, candidates, forced, wanted, *shares)
    largest = (max(row[TEXT] for row in budgets), max(row[VISION] for row in budgets))
    return keep_mask(scores, modality, candidates, forced, wanted, largest, first, groups)


__all__ = ["newest_text", "span_keep", "taken_first"]
