"""The last queries of a layer, kept so that a closed hop's keys can be scored by them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        steps: Newer ones of single tokens of every row, not joined with them yet: logical position
            and [B, H, 1, d] of each.
    """

    query: Tensor
    positions: Tensor
    softmax: Softmax
    steps: list[tuple[int, Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, like: Tensor, softmax: Softmax) -> QueryRing:
        """No queries yet, of the shape and device of queries `like` [B, H, q, d]."""
        where = torch.zeros(like.shape[0], 0, dtype=torch.long, device=like.device)
        none = like.new_zeros(like.shape[0], like.shape[1], 0, like.shape[3])
        return cls(none, where, softmax)

    def note(self, query: Tensor, position: int, window: int) -> None:
        """Remember every row's next query [B, H, 1, d], at one logical position, in place.

        Args:
            query: The queries.
            position: Where they stand.
            window: Queries that are to be remembered.
        """
        self.steps.append((position, query))
        if len(self.steps) >= 2 * window:
            del self.steps[:window]

    def joined(self) -> QueryRing:
        """The same in one piece."""
        if not self.steps:
            return self
        where = torch.tensor([position for position, _ in self.steps])
        where = where.to(self.positions.device, non_blocking=True).expand(len(self.query), -1)
        query = torch.cat([self.query, *(q for _, q in self.steps)], dim=2)
        return QueryRing(query, torch.cat([self.positions, where], dim=1), self.softmax)

    def before(self, position: int) -> QueryRing:
        """Without the single steps from logical `position` on."""
        return replace(self, steps=[step for step in self.steps if step[0] < position])

    def until(self, ends: Tensor, window: int) -> QueryRing:
        """Each row's last `window` queries at logical positions <= `ends` [B]."""
        ring = self.joined()
        return ring._last((ring.positions >= 0) & (ring.positions <= ends[:, None]), window)

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
        old = self.joined()
        new = replace(old, query=query.detach(), positions=positions)
        if dense:
            new = replace(new, query=new.query[:, :, -window:], positions=positions[:, -window:])
        else:
            new = new._last(positions >= 0, window)
        joined = torch.cat([old.query, new.query], dim=2)
        where = torch.cat([old.positions, new.positions], dim=1)
        if not dense:
            return replace(old, query=joined, positions=where)._last(where >= 0, window)
        return replace(old, query=joined[:, :, -window:], positions=where[:, -window:])

    def cropped(self, length: int, dense: int) -> QueryRing:
        """Without queries at logical positions >= `length`.

        Args:
            length: Logical tokens that stay.
            dense: Trailing columns known to be exactly those queries in every row; they go
                physically, so that rejected speculation does not crowd out what is remembered.
        """
        ring = self.joined()
        if dense:
            stay = max(ring.positions.shape[1] - dense, 0)
            query, positions = ring.query[:, :, :stay], ring.positions[:, :stay]
            return replace(ring, query=query, positions=positions)
        stays = (ring.positions >= 0) & (ring.positions < length)
        return ring._last(stays, ring.positions.shape[1])

    def rows(self, index: Tensor) -> QueryRing:
        """The rows `index` [B']."""
        index = index.to(self.query.device)
        query, positions = (t.index_select(0, index) for t in (self.query, self.positions))
        steps = [(position, query.index_select(0, index)) for position, query in self.steps]
        return replace(self, query=query, positions=positions, steps=steps)
