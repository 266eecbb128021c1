"""The auxiliary losses of router training: rates near their targets, scores near their rates.

Every loss is computed per row and averaged over the rows of the batch; a row without the tokens a
term speaks of adds 0 to it. So a batch may be cut into micro-batches, or dealt to processes, and
the mean over rows stays the same. Over layers and hops it is a mean, or a sum where `summed` is
set.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor


def group_means(
    values: Float[Tensor, "batch tokens"], groups: Num[Tensor, "batch tokens groups"]
) -> Float[Tensor, "batch groups"]:
    """Mean of each group's values per row; 0 where a row has none.

    Args:
        values: one number a token.
        groups: 1 where a token belongs to a group; pads belong to none.
    """
    groups = groups.to(values.dtype)
    sums = torch.einsum("bt,btg->bg", values, groups)
    return sums / groups.sum(1).clamp(min=1)


def rate_loss(
    rates: Float[Tensor, "layers hops"],
    means: Float[Tensor, "layers batch hops"],
    present: Bool[Tensor, "batch hops"],
    seen: Bool[Tensor, "batch hops"],
    target: float,
    *,
    per_rate: bool,
    summed: bool = False,
) -> Float[Tensor, ""]:
    """Rates near their target, plus ``mean_{h,l} (mean_i s - rho)^2``: scores near their rates.

    The first term is ``mean_{h,l} (rho - target)^2`` where `per_rate` is set; else it is
    ``(mean_{h,l} rho - target)^2``, and layers and hops may trade with each other.

    The tie of scores to rates runs over all layers. What lowers the scores of a layer (`hard_loss`,
    the task) lowers its rates by it, and with them what is kept; without the tie a shift of the
    bias would satisfy `hard_loss` and change nothing, since no rank changes.

    Args:
        rates: rho of each layer and hop.
        means: mean score of each hop's tokens.
        present: hops a row has.
        seen: hops of a row that have tokens of the modality.
        target: share to keep, in (0, 1].
        per_rate: every rate has the target, or their mean has.
        summed: sums over layers and hops, not means; the mean rate stays one.

    Source: docs/method.md, section 7, equations 2 and 3.
    """
    if per_rate:
        squares = _over((rates - target).square(), 0, summed).expand(present.shape)
        off_target = _over_hops(squares, present, summed)
    else:
        share = _over_hops(rates.mean(0).expand(present.shape), present, False)
        off_target = torch.where(present.any(1), (share - target).square(), 0.0)
    gaps = _over((means - rates[:, None]).square(), 0, summed)
    return off_target.mean() + _over_hops(gaps, seen, summed).mean()


def hard_loss(
    excess: Float[Tensor, "layers batch hops"],
    seen: Bool[Tensor, "batch hops"],
    early: Bool[Tensor, " layers"],
    mu: float,
    summed: bool = False,
) -> Float[Tensor, ""]:
    """``mu * mean_{h, l > l_c} mean_i max(0, s - eps)``, for vision.

    Args:
        excess: mean of ``max(0, s - eps)`` over a hop's vision tokens.
        seen: hops of a row that have vision.
        early: layers up to the cut.
        mu: factor.
        summed: sums over layers and hops, not means.

    Source: docs/method.md, section 7, equation 4.
    """
    late = excess[~early]
    if not len(late):
        return excess.sum() * 0.0
    return mu * _over_hops(_over(late, 0, summed), seen, summed).mean()


def _over(values: Tensor, dim: int, summed: bool) -> Tensor:
    return values.sum(dim) if summed else values.mean(dim)


def _over_hops(values: Tensor, there: Tensor, summed: bool) -> Tensor:
    """Mean or sum of each row's values [batch, hops] where they are there; 0 where none is."""
    weights = there.to(values.dtype)
    total = (values * weights).sum(1)
    return total if summed else total / weights.sum(1).clamp(min=1)
