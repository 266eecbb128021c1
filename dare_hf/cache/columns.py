"""Which logical token each physical column of a layer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

_MERGE_AT = 64


class ColumnTable:
    """Positions and scores of a layer's columns: a table for the head, nothing for a dense tail.

    Within a row, physical order is position order. The first `head` columns have their positions in
    a table, -1 for a hole (a fill or a pad). The `tail` columns after it hold every row's last
    `tail` logical tokens, so a decode step moves two host integers and launches no kernel.

    Attributes:
        rows: Rows of the batch; 0 until something was stored.
        seen: Logical tokens that have passed the layer, stored or not.
        head: Columns with a table entry.
        tail: Dense columns after the head, positions seen - tail .. seen - 1 in every row.
        pos: Long[rows, head], or None while the head is empty.
        score: Float[rows, head], or None when no head column has a score.
    """

    def __init__(self) -> None:
        self.rows = self.seen = self.head = self.tail = 0
        self.pos: Tensor | None = None
        self.score: Tensor | None = None
        self.device: torch.device | None = None
        self._kept_head: list[int] = []
        self._tail_scores: list[tuple[int, Tensor]] = []

    @property
    def width(self) -> int:
        """Physical columns in use."""
        return self.head + self.tail

    @property
    def kept(self) -> list[int]:
        """Real tokens stored per row, known on the host."""
        return [kept + self.tail for kept in self._kept_head]

    @property
    def max_kept(self) -> int:
        """Real tokens stored for the longest row."""
        return max(self._kept_head, default=0) + self.tail

    @property
    def holes(self) -> bool:
        """Whether some row has a column that holds no real token."""
        return min(self._kept_head, default=self.head) < self.head

    @property
    def even(self) -> bool:
        """Whether all rows store the same number of tokens."""
        return len(set(self._kept_head)) <= 1

    def open(self, rows: int, device: torch.device) -> None:
        """Fix the rows and the device; called when the first columns arrive."""
        self.rows, self.device = rows, device
        self._kept_head = [0] * rows

    def snapshot(self) -> ColumnTable:
        """A copy that later changes of this table do not reach."""
        # copy.copy goes through pickling's protocol, which shows in a decode step of many layers.
        saved = ColumnTable.__new__(ColumnTable)
        saved.__dict__.update(self.__dict__)
        saved._tail_scores = list(self._tail_scores)
        return saved

    def positions(self) -> Int[Tensor, "rows width"]:
        """Logical position of every column, -1 for holes."""
        tail = torch.arange(self.seen - self.tail, self.seen, device=self.device)
        tail = tail.expand(self.rows, self.tail)
        return tail if self.pos is None else torch.cat([self.pos, tail], dim=1)

    def valid(self) -> Bool[Tensor, "rows width"] | None:
        """Which columns hold a real token; None when all do."""
        return self.positions() >= 0 if self.holes else None

    def counts(self, before: int | None = None) -> Int[Tensor, " rows"]:
        """Real tokens stored per row (at positions < `before`), counted on the device."""
        positions = self.positions() if before is not None else self.pos
        if positions is None:
            return torch.full((self.rows,), self.tail, device=self.device)
        if before is None:
            return (positions >= 0).sum(1) + self.tail
        return ((positions >= 0) & (positions < before)).sum(1)

    def scores(self) -> Float[Tensor, "rows width"]:
        """Score of every column, 0 where none was given."""
        scores = torch.zeros(self.rows, self.width, device=self.device)
        if self.score is not None:
            scores[:, : self.head] = self.score
        for start, chunk in self._tail_scores:
            scores[:, start : start + chunk.shape[1]] = chunk
        return scores

    def set_scores(self, scores: Float[Tensor, "rows width"]) -> None:
        """Replace the score of every column."""
        scores = scores.to(self.device, torch.float32)
        self.score = scores[:, : self.head] if self.head else None
        self._tail_scores = [(self.head, scores[:, self.head :])] if self.tail else []

    def append_dense(self, count: int, scores: Float[Tensor, "rows new"] | None) -> None:
        """The next `count` logical tokens of every row were stored."""
        self.seen += count
        self.tail += count
        if scores is not None:
            self.note_tail_scores(scores)

    def note_tail_scores(self, scores: Float[Tensor, "rows new"]) -> None:
        """Scores of the last columns of the tail."""
        scores = scores.to(self.device, torch.float32)
        self._tail_scores.append((self.width - scores.shape[1], scores))
        if len(self._tail_scores) >= _MERGE_AT:
            self._merge_tail_scores()

    def append_ragged(
        self,
        columns: Int[Tensor, "rows new"],
        kept: list[int],
        scores: Float[Tensor, "rows new"] | None,
        seen: int,
    ) -> None:
        """Columns were stored whose logical positions differ between rows (-1: a hole)."""
        self.flush()
        columns = columns.to(self.device, torch.long)
        new_score = None if scores is None else scores.to(self.device, torch.float32)
        if self.score is not None or new_score is not None:
            old = self.score if self.score is not None else self._no_scores(self.head)
            new = new_score if new_score is not None else self._no_scores(columns.shape[1])
            self.score = torch.cat([old, new], dim=1)
        self.pos = columns if self.pos is None else torch.cat([self.pos, columns], dim=1)
        self.head += columns.shape[1]
        self._kept_head = [a + b for a, b in zip(self._kept_head, kept, strict=True)]
        self.seen = seen

    def advance(self, seen: int) -> None:
        """Logical tokens up to `seen` passed without being stored here."""
        if seen != self.seen:
            self.flush()
            self.seen = seen

    def flush(self) -> None:
        """Write the tail into the head's table."""
        if not self.tail:
            return
        if self.score is not None or self._tail_scores:
            self.score = self.scores()
        self.pos = self.positions()
        self._kept_head = self.kept
        self._tail_scores = []
        self.head, self.tail = self.width, 0

    def drop_last(self, count: int, seen: int) -> None:
        """Forget the last `count` columns, in every row the tokens at positions >= `seen`."""
        if count > self.tail:
            self.flush()
            self.head -= count
            self._kept_head = [kept - count for kept in self._kept_head]
            self.pos = None if self.pos is None else self.pos[:, : self.head]
            self.score = None if self.score is None else self.score[:, : self.head]
            self.seen = seen
        else:
            self.back_to(self.tail - count, seen)

    def back_to(self, tail: int, seen: int) -> None:
        """Forget the columns of the tail beyond the first `tail`, at positions >= `seen`."""
        self.tail, self.seen = tail, seen
        end = self.width
        chunks = [(s, chunk[:, : end - s]) for s, chunk in self._tail_scores if s < end]
        self._tail_scores = chunks

    def take(
        self,
        index: Int[Tensor, "rows columns"],
        live: Bool[Tensor, "rows columns"],
        kept: list[int],
    ) -> None:
        """Keep the columns `index`, of which those not `live` become holes."""
        self.flush()
        if self.pos is not None:
            self.pos = self.pos.gather(1, index).masked_fill(~live, -1)
        if self.score is not None:
            self.score = self.score.gather(1, index).masked_fill(~live, 0)
        self.head = index.shape[1]
        self._kept_head = list(kept)

    def select_rows(self, index: Int[Tensor, " chosen"], order: list[int] | None) -> None:
        """Take the rows `index`; `order` holds the same on the host, needed unless `even`."""
        self._merge_tail_scores()
        index = index.to(self.device)
        self.pos = None if self.pos is None else self.pos.index_select(0, index)
        self.score = None if self.score is None else self.score.index_select(0, index)
        self._tail_scores = [(s, chunk.index_select(0, index)) for s, chunk in self._tail_scores]
        rows = index.shape[0]
        if self.even:
            self._kept_head = self._kept_head[:1] * rows
        else:
            self._kept_head = [self._kept_head[i] for i in (order or index.tolist())]
        self.rows = rows

    def nbytes(self) -> int:
        """Bytes of the bookkeeping tensors."""
        tensors = [self.pos, self.score, *(chunk for _, chunk in self._tail_scores)]
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    def _no_scores(self, width: int) -> Tensor:
        return torch.zeros(self.rows, width, device=self.device)

    def _merge_tail_scores(self) -> None:
        if len(self._tail_scores) > 1:
            self._tail_scores = [(self.head, self.scores()[:, self.head :])]
