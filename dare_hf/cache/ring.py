"""The last queries of a layer, kept so that a closed hop's keys can be scored by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.routing.scores import Softmax


@dataclass(frozen=True)
class QueryRing:
    """The last queries of one layer, after RoPE.

    Attributes:
        query: [B, H, W, d], oldest first.
        positions: Long[B, W] their logical positions, -1 where there is none.
        softmax: What becomes of the layer's queries and keys.
    """

    query: Tensor
    positions: Tensor
    softmax: Softmax

    @classmethod
    def empty(cls, like: Tensor, softmax: Softmax) -> QueryRing:
        """No queries yet, of the shape and device of queries `like` [B, H, q, d]."""
        where = torch.zeros(like.shape[0], 0, dtype=torch.long, device=like.device)
        none = like.new_zeros(like.shape[0], like.shape[1], 0, like.shape[3])
        return cls(none, where, softmax)

    def until(self, ends: Tensor, window: int) -> QueryRing:
        """Each row's last `window` queries at logical positions <= `ends` [B]."""
        return self._last((self.positions >= 0) & (self.positions <= ends[:, None]), window)

    def _last(self, able: Tensor, window: int) -> QueryRing:
        """Each row's last `window` queries that are `able` [B, W], at the right end."""
        order = torch.arange(1, able.shape[1] + 1, device=able.device) * able
        last = order.topk(min(window, able.shape[1]), dim=1).values.flip(1)
        index = (last - 1).clamp(min=0)
        view = index[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        where = self.positions.gather(1, index).masked_fill(last == 0, -1)
        return replace(self, query=self.query.gather(2, view), positions=where)

    def pushed(
        self, query: Tensor, positions: Tensor, window: int, *, dense: bool = True
    ) -> QueryRing:
        """With [B, H, q, d] newer queries, each row's oldest beyond `window` forgotten.

        Args:
            query: Newer queries.
            positions: Long[B, q] their logical positions, -1 for fills and pads.
            window: Queries to remember.
            dense: Whether none is -1. Else a row's own are found among them: what neighbours
                bring must not crowd them out.
        """
        new = replace(self, query=query.detach(), positions=positions)
        if dense:
            new = replace(new, query=new.query[:, :, -window:], positions=positions[:, -window:])
        else:
            new = new._last(positions >= 0, window)
        joined = torch.cat([self.query, new.query], dim=2)
        where = torch.cat([self.positions, new.positions], dim=1)
        if not dense:
            return replace(self, query=joined, positions=where)._last(where >= 0, window)
        return replace(self, query=joined[:, :, -window:], positions=where[:, -window:])

    def cropped(self, length: int, dense: int) -> QueryRing:
        """Without queries at logical positions >= `length`.

        Args:
            length: Logical tokens that stay.
            dense: Trailing columns known to be exactly those queries in every row; they go
                physically, so that rejected speculation does not crowd out what is remembered.
        """
        if dense:
            stay = max(self.positions.shape[1] - dense, 0)
            query, positions = self.query[:, :, :stay], self.positions[:, :stay]
            return replace(self, query=query, positions=positions)
        stays = (self.positions >= 0) & (self.positions < length)
        return self._last(stays, self.positions.shape[1])

    def rows(self, index: Tensor) -> QueryRing:
        """The rows `index` [B']."""
        index = index.to(self.query.device)
        query, positions = (t.index_select(0, index) for t in (self.query, self.positions))
        return replace(self, query=query, positions=positions)
