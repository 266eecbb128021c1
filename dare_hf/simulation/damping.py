"""Bounding what a closed gate says: the change if its key were seen, not the slope at zero.

A key with logit s beside open ones of total weight Z gets the attention ``g e^s / (Z + g e^s)``.
At g = 0 its slope is ``r = e^s / Z``, and on sharp models one pruned key can have an r of e^20: one
entry is the whole gradient then. From g = 0 to 1 the attention rises by ``r / (1 + r)``, under 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.routing import gates

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.routing.scores import Softmax

_MARK = "dare_closed"


def mark_closed(mask: Tensor, closed: Tensor) -> Tensor:
    """Note on an additive mask which of its entries are closed gates, Bool[B, 1, S, S]."""
    setattr(mask, _MARK, closed)
    return mask


def is_marked(mask: Any) -> bool:
    """Whether closed gates are noted on a mask."""
    return hasattr(mask, _MARK)


def damped(mask: Any, tensors: tuple[Tensor, Tensor, Tensor], softmax: Softmax) -> Any:
    """The mask an attention shall use: the same values, for each head, with the damped gradient.

    Args:
        mask: What the layer hands to its attention; only one of `mark_closed` is changed.
        tensors: query [B, H, S, d], key [B, Hkv, S, d] and value.
        softmax: What becomes of queries and keys.

    Source: docs/training.md, "What is differentiated".
    """
    closed = getattr(mask, _MARK, None)
    if closed is None or not mask.requires_grad:
        return mask
    query, key, _ = tensors
    return _Damped.apply(mask, query.detach(), key.detach(), closed, softmax)


class _Damped(torch.autograd.Function):
    """Identity by head; backward divides a closed entry's gradient by ``1 + r``."""

    @staticmethod
    def forward(
        ctx: Any, mask: Tensor, query: Tensor, key: Tensor, closed: Tensor, softmax: Softmax
    ) -> Tensor:
        ctx.save_for_backward(mask, query, key, closed)
        ctx.softmax = softmax
        return mask.expand(-1, query.shape[1], -1, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mask, query, key, closed = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        with torch.autocast(query.device.type, enabled=False):
            products = query.to(wide) @ key.to(wide).transpose(-1, -2)
        share = ctx.softmax.probabilities(products, mask)
        # a closed entry's share is r times the floor; in place: the only further tensors of this
        # size are the logits and the gradient that comes in
        factor = share.div_(gates.FLOOR).add_(1.0).reciprocal_().masked_fill_(~closed, 1.0)
        gradient = factor.mul_(grads[0])
        if mask.shape[1] == 1:
            gradient = gradient.sum(1, keepdim=True)
        return gradient.to(mask.dtype), None, None, None, None
