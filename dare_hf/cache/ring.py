"""The last queries of a layer, kept so that a closed hop's keys can be scored by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class QueryRing:
    """The last queries of one layer, after RoPE.

    Attributes:
        query: [B, H, W, d], oldest first.
        positions: Long[B, W] their logical positions, -1 where there is none.
        scaling: The layer's softmax scale.
    """

    query: Tensor
    positions: Tensor
    scaling: float

    def pushed(self, query: Tensor, positions: Tensor, window: int) -> QueryRing:
        """With [B, H, q, d] newer queries, the oldest beyond `window` forgotten."""
        joined = torch.cat([self.query, query.detach()], dim=2)[:, :, -window:]
        where = torch.cat([self.positions, positions], dim=1)[:, -window:]
        return QueryRing(joined, where, self.scaling)

    def cropped(self, length: int) -> QueryRing:
        """Without queries at logical positions >= `length`."""
        gone = self.positions >= length
        return QueryRing(self.query, self.positions.masked_fill(gone, -1), self.scaling)

    def rows(self, index: Tensor) -> QueryRing:
        """The rows `index` [B']."""
        index = index.to(self.query.device)
        return QueryRing(
            self.query.index_select(0, index), self.positions.index_select(0, index), self.scaling
        )
