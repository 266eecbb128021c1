"""The auxiliary losses of router training: rates near their targets, scores near their rates.

Every loss is computed per row and averaged over the rows of the batch; a row without the tokens a
term speaks of adds 0 to it. So a batch may be cut into micro-batches, or dealt to processes, and
the mean over rows stays the same.
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


def ratio_loss(
    rates: Float[Tensor, "layers hops"],
    means: Float[Tensor, "layers batch hops"],
    present: Bool[Tensor, "batch hops"],
    seen: Bool[Tensor, "batch hops"],
    target: float,
) -> Float[Tensor, ""]:
    """``mean_{h,l} (rho - target)^2 + mean_{h,l} (mean_i s - rho)^2``, for text.

    Args:
        rates: rho of each layer and hop.
        means: mean score of each hop's tokens.
        present: hops a row has.
        seen: hops of a row that have tokens of the modality.
        target: share to keep, in (0, 1].

    Source: docs/method.md, section 7, L_ratio.
    """
    off_target = (rates - target).square().mean(0).expand(present.shape)
    return _rows(off_target, present).mean() + _score_gap(rates, means, seen)


def soft_loss(
    rates: Float[Tensor, "layers hops"],
    means: Float[Tensor, "layers batch hops"],
    present: Bool[Tensor, "batch hops"],
    seen: Bool[Tensor, "batch hops"],
    target: float,
    early: Bool[Tensor, " layers"],
) -> Float[Tensor, ""]:
    """``(mean_{h,l} rho - target)^2 + mean_{h, l <= l_c} (mean_i s - rho)^2``, for vision.

    Args:
        rates: rho of each layer and hop.
        means: mean score of each hop's tokens.
        present: hops a row has.
        seen: hops of a row that have tokens of the modality.
        target: share to keep, in (0, 1].
        early: layers up to the cut.

    Source: docs/method.md, section 7, L_soft.
    """
    share = _rows(rates.mean(0).expand(present.shape), present)
    off_target = torch.where(present.any(1), (share - target).square(), 0.0)
    return off_target.mean() + _score_gap(rates[early], means[early], seen)


def hard_loss(
    excess: Float[Tensor, "layers batch"], early: Bool[Tensor, " layers"], mu: float
) -> Float[Tensor, ""]:
    """``mu * mean_{l > l_c, i} max(0, s - eps)``, for vision.

    Args:
        excess: mean of ``max(0, s - eps)`` over a row's vision tokens of all hops.
        early: layers up to the cut.
        mu: factor.

    Source: docs/method.md, section 7, L_hard.
    """
    late = excess[~early]
    return mu * late.mean() if len(late) else excess.sum() * 0.0


def _score_gap(rates: Tensor, means: Tensor, seen: Tensor) -> Tensor:
    if not len(rates):
        return means.sum() * 0.0
    return _rows((means - rates[:, None]).square().mean(0), seen).mean()


def _rows(values: Tensor, there: Tensor) -> Tensor:
    """Mean of each row's values [batch, hops] where they are there; 0 where none is."""
    weights = there.to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
