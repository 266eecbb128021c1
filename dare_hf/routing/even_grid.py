"""The even grid: columns taken before all scored ones, so that no part of an image goes blank."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dare_hf.routing.kinds import PAD, VISION

# Shares are read to six decimals, so that every product below is an exact 64-bit integer.
SHARE_UNIT = 1_000_000


def even_grid(
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
    vision_budget: Int[Tensor, " batch"],
    share: float,
) -> Bool[Tensor, "batch tokens"]:
    """Of each row's vision budget k, ``floor(share * k)`` columns spread evenly over its images.

    An image is a run of vision tokens (pads skipped). Each gets its part in proportion to its
    candidates, to within one column; in a run of n candidates, q columns stand at even distance
    n / q in raster order, centred, since height and width are not known here: where n / q is the
    image's width, they form one vertical line. Forced tokens come first: with f of them the
    grid has at most k - f columns, so that forced and grid together never exceed k.

    Args:
        modality: TEXT, VISION or PAD.
        candidates: columns that may be kept (of the survivors, under ``pruned="drop"``).
        forced: columns kept whatever their score.
        vision_budget: k of each row, on the device.
        share: uniform_share, in [0, 1].

    Source: docs/method.md, section 2 (uniform_share).
    """
    vision = modality == VISION
    able = vision & candidates
    count = able.cumsum(1)
    before, end = _image_bounds(vision, modality != PAD, count - able.long(), count)
    total = able.sum(1, keepdim=True)
    budget = vision_budget.long()[:, None].minimum(total)
    room = (budget - (able & forced).sum(1, keepdim=True)).clamp(min=0)
    quota = (round(share * SHARE_UNIT) * budget // SHARE_UNIT).minimum(room)
    # Cumulative rounding: the parts of the images add up to the quota exactly.
    divisor = total.clamp(min=1)
    part = quota * end // divisor - quota * before // divisor
    length = (end - before).clamp(min=1)
    rank = count - before - 1
    phase = length // 2
    return able & (((rank + 1) * part + phase) // length > (rank * part + phase) // length)


def _image_bounds(
    vision: Bool[Tensor, "batch tokens"],
    real: Bool[Tensor, "batch tokens"],
    before: Int[Tensor, "batch tokens"],
    count: Int[Tensor, "batch tokens"],
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """For each column of an image: candidates before the image begins, and up to its end.

    An image ends where a real token that is no vision token stands, so the number of those so far
    is a name for the run that never falls along the row.
    """
    run = (real & ~vision).cumsum(1).contiguous()
    begin = torch.searchsorted(run, run)
    end = torch.searchsorted(run, run, right=True) - 1
    return before.gather(1, begin), count.gather(1, end)
