"""Storage of one layer's keys and values: how much to reserve, how to pack it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor


def limit(kept: int, rows: int) -> int:
    """The most columns a layer may hold: 1.25 x the longest row's kept, and 64 tokens in all.

    Args:
        kept: Real tokens stored for the longest row.
        rows: Rows of the batch.
    """
    return (5 * kept * rows + 256) // (4 * rows)


def roomy(width: int, rows: int) -> int:
    """Columns to reserve for `width` used ones.

    Half of the slack that `limit` allows, so that a short crop (speculative decoding) leaves the
    reservation legal and nothing is copied.
    """
    return width + width // 8 + 32 // rows


def exact(tensor: Tensor) -> Tensor:
    """`tensor` itself when it owns its whole storage, else a copy that does.

    A slice of a fused projection or of a longer sequence would keep all of its base alive.
    """
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def reserve(slab: Tensor, width: int, capacity: int) -> Tensor:
    """A new slab of `capacity` columns that begins with the first `width` of `slab`.

    Args:
        slab: [B, H, C, d].
        width: Columns in use.
        capacity: Columns of the new slab; ignored (exactly `width`) while autograd needs the copy.
    """
    used = slab[:, :, :width]
    if slab.requires_grad:
        return used.clone(memory_format=torch.contiguous_format)
    rows, heads, _, dim = slab.shape
    grown = slab.new_empty(rows, heads, capacity, dim)
    grown[:, :, :width].copy_(used)
    return grown


def right_packed(
    keep: Bool[Tensor, "rows columns"], width: int
) -> tuple[Int[Tensor, "rows width"], Bool[Tensor, "rows width"]]:
    """Columns to gather so that each row's kept ones stand, in order, at the right end.

    Args:
        keep: What to keep; no row keeps more than `width`.
        width: Columns of the result.

    Returns:
        Column indices, and which of them are kept ones (the others fill the left).
    """
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    index = order[:, order.shape[1] - width :]
    return index, keep.gather(1, index)


def gather_columns(used: Tensor, index: Int[Tensor, "rows width"]) -> Tensor:
    """New storage with the columns `index` of `used` [B, H, C, d]."""
    rows, heads, _, dim = used.shape
    return used.gather(2, index[:, None, :, None].expand(rows, heads, index.shape[1], dim))
