"""Storage of one layer's keys and values: how much to reserve, how to grow and pack it."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Slabs:
    """Keys [B, H, capacity, d_k] and values [B, H', capacity, d_v]; the first columns are in use.

    Attributes:
        keys: The keys' slab.
        values: The values' slab.
        owned: False while others (the model, autograd) may hold the tensors: never written then.
    """

    keys: Tensor
    values: Tensor
    owned: bool

    @classmethod
    def adopt(cls, keys: Tensor, values: Tensor) -> Slabs:
        """Slabs that are the given tensors themselves, without spare columns."""
        return cls(_exact(keys), _exact(values), owned=False)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.keys.shape[0]

    @property
    def capacity(self) -> int:
        """Columns there is room for."""
        return self.keys.shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        pair = (self.keys, self.values)
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in pair)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storage behind both slabs."""
        return sum(t.untyped_storage().nbytes() for t in (self.keys, self.values))

    @property
    def graph(self) -> bool:
        """Whether autograd needs the slabs as they are."""
        return self.keys.requires_grad or self.values.requires_grad

    def writable(self, end: int) -> bool:
        """Whether columns up to `end` can be written in place."""
        # A tensor made under inference_mode refuses to be written outside of it.
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        return self.owned and end <= self.capacity and not frozen

    def used(self, width: int) -> tuple[Tensor, Tensor]:
        """Views of the first `width` columns."""
        return self.keys[:, :, :width], self.values[:, :, :width]

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Write new columns from `start` on, in place."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end].copy_(keys)
        self.values[:, :, start:end].copy_(values)

    def joined(self, width: int, keys: Tensor, values: Tensor) -> Slabs:
        """New slabs of the first `width` columns and new ones, by operations autograd can undo."""
        old_keys, old_values = self.used(width)
        joined = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        return Slabs(*joined, owned=False)

    def resized(self, width: int, capacity: int) -> Slabs:
        """New slabs of another capacity with the first `width` columns.

        Under autograd they have no spare columns.
        """
        if self.graph:
            clones = (t.clone(memory_format=torch.contiguous_format) for t in self.used(width))
            return Slabs(*clones, owned=False)
        return Slabs(
            *(_reserved(used, capacity) for used in self.used(width)),
            owned=True,
        )

    def packed(self, width: int, index: Int[Tensor, "rows columns"]) -> Slabs:
        """New slabs of the columns `index` of the first `width`, without spare columns."""
        packed = (_columns(slab, width, index) for slab in (self.keys, self.values))
        return Slabs(*packed, owned=not self.graph)

    def selected(self, index: Int[Tensor, " chosen"]) -> Slabs:
        """New slabs of the rows `index`, spare columns included."""
        chosen = (t.index_select(0, index) for t in (self.keys, self.values))
        return Slabs(*chosen, owned=not self.graph)


def _exact(tensor: Tensor) -> Tensor:
    """`tensor` itself when it owns its whole storage, else a copy that does.

    A slice of a fused projection or of a longer sequence would keep all of its base alive.
    """
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _columns(slab: Tensor, width: int, index: Int[Tensor, "rows columns"]) -> Tensor:
    """New [B, H, K, d]: the columns `index` of the first `width`."""
    rows, heads, capacity, dim = slab.shape
    if not slab.is_contiguous():
        used = slab[:, :, :width]
        return used.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim))
    # Whole vectors are moved: a quarter of what a gather of single numbers takes on a CPU.
    starts = torch.arange(0, rows * heads * capacity, capacity, device=index.device)
    flat = (starts.view(rows, heads, 1) + index[:, None]).flatten()
    return slab.view(-1, dim).index_select(0, flat).view(rows, heads, -1, dim)


def _reserved(used: Tensor, capacity: int) -> Tensor:
    rows, heads, width, dim = used.shape
    slab = used.new_empty(rows, heads, capacity, dim)
    slab[:, :, :width].copy_(used)
    return slab
