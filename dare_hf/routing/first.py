"""What is taken before any score decides: an even grid over images, the newest text."""

from jaxtyping import Bool, Int
from torch import Tensor

from dare_hf.routing.even_grid import SHARE_UNIT, even_grid
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.selection import newest


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


__all__ = ["newest_text", "taken_first"]
