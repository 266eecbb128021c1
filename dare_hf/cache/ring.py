"""The last queries of a layer, kept so that a closed hop's keys can be scored by them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.routing.scores import Softmax

WINDOW = 32
# Queries a layer remembers at least: the window, and as many again that may be cropped.
RING = 2 * WINDOW


@dataclass(frozen=True)
class QueryRing:
    """The last queries of one layer, after RoPE.

    Attributes:
        query: [B, H, W, d], oldest first.
        positions: Long[B, W] their logical positions, -1 where there is none.
        softmax: What becomes of the layer's queries and keys.
        taken: Columns that crops took and newer queries have not filled again.
        trimmed: Whether older columns were forgotten.
        forgot: Bool[B] rows that had queries in them, told when a crop might need those.
        steps: Newer ones of single tokens of every row, not joined with them yet: logical position
            and [B, H, 1, d] of each.
    """

    query: Tensor
    positions: Tensor
    softmax: Softmax
    taken: int = 0
    trimmed: bool = False
    forgot: Tensor | None = None
    steps: list[tuple[int, Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, like: Tensor, softmax: Softmax) -> QueryRing:
        """No queries yet, of the shape and device of queries `like` [B, H, q, d]."""
        where = torch.zeros(like.shape[0], 0, dtype=torch.long, device=like.device)
        none = like.new_zeros(like.shape[0], like.shape[1], 0, like.shape[3])
        return cls(none, where, softmax)

    def noted(self, query: Tensor, position: int, window: int) -> QueryRing:
        """With every row's next query [B, H, 1, d], at one logical position; mostly itself.

        Args:
            query: The queries.
            position: Where they stand.
            window: Queries that are to be remembered.
        """
        self.steps.append((position, query))
        superseded = len(self.steps) >= window and self.query.shape[2]
        if not superseded and len(self.steps) < 2 * window:
            return self
        # What is older goes whole, or a crop could reach across what is missing; a new list, for a
        # ring that comes back when this step fails.
        none, where = self.query[:, :, :0].clone(), self.positions[:, :0].clone()
        last = self.steps[-window:]
        return replace(self, query=none, positions=where, steps=last, taken=0, trimmed=True)

    def nbytes(self) -> int:
        """Bytes of all its queries."""
        steps = sum(query.untyped_storage().nbytes() for _, query in self.steps)
        return self.query.untyped_storage().nbytes() + steps

    def joined(self) -> QueryRing:
        """The same in one piece."""
        if not self.steps:
            return self
        where = torch.tensor([position for position, _ in self.steps])
        where = where.to(self.positions.device, non_blocking=True).expand(len(self.query), -1)
        query = torch.cat([self.query, *(q for _, q in self.steps)], dim=2)
        where = torch.cat([self.positions, where], dim=1)
        taken = max(self.taken - len(self.steps), 0)
        return replace(self, query=query, positions=where, steps=[], taken=taken)

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
        taken = max(old.taken - query.shape[2], 0)
        trimmed = old.trimmed or old.positions.shape[1] + positions.shape[1] > window
        new = replace(old, query=query.detach(), positions=positions, taken=taken, trimmed=trimmed)
        if dense:
            new = replace(new, query=new.query[:, :, -window:], positions=positions[:, -window:])
        else:
            new = new._last(positions >= 0, window)
        joined = torch.cat([old.query, new.query], dim=2)
        where = torch.cat([old.positions, new.positions], dim=1)
        if not dense:
            return replace(new, query=joined, positions=where)._last(where >= 0, window)
        return replace(new, query=joined[:, :, -window:], positions=where[:, -window:])

    def cropped(self, length: int, removed: int, *, dense: bool) -> QueryRing:
        """Without queries at logical positions >= `length`.

        Args:
            length: Logical tokens that stay.
            removed: Logical tokens that go.
            dense: Whether the last `removed` columns are exactly those queries in every row; they
                go physically, so that rejected speculation does not crowd out what is remembered.
        """
        old = self.joined()
        taken, forgot = old.taken + removed, old.forgot
        if old.trimmed and (not dense or taken > RING - WINDOW):
            full = (old.positions >= 0).all(1)  # holes go first
            forgot = full if forgot is None else forgot | full
        ring = replace(old, taken=min(taken, RING), forgot=forgot)
        if dense:
            stay = max(old.positions.shape[1] - removed, 0)
            query, positions = old.query[:, :, :stay], old.positions[:, :stay]
            return replace(ring, query=query, positions=positions)
        stays = (old.positions >= 0) & (old.positions < length)
        return ring._last(stays, old.positions.shape[1])

    def short(self, found: QueryRing, ends: Tensor) -> bool:
        """Whether a crop has taken queries that the window up to `ends` [B] needs.

        Args:
            found: `until(ends)`.
            ends: Per row the last position, -1 for rows that are not asked.
        """
        if self.forgot is None:
            return False
        few = (found.positions >= 0).sum(1) < WINDOW
        return bool((self.forgot & few & (ends >= 0)).any())

    def rows(self, index: Tensor) -> QueryRing:
        """The rows `index` [B']."""
        index = index.to(self.query.device)
        query, positions = (t.index_select(0, index) for t in (self.query, self.positions))
        steps = [(position, query.index_select(0, index)) for position, query in self.steps]
        forgot = None if self.forgot is None else self.forgot.index_select(0, index)
        return replace(self, query=query, positions=positions, steps=steps, forgot=forgot)
