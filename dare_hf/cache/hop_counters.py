"""Which hop each row of a cache is in: the counters that delimiters and windows move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class HopCounters:
    """Hop counters of the rows of one cache: where each closed hop ended.

    A row's open hop is the number of hops it has closed. Hop 0 (the prompt) is closed by the
    prefill, every later one by its delimiter, by `decode_window` sampled tokens, or by input
    injected after it.

    Attributes:
        ends: Per row, the logical position of the last token of each closed hop, ascending.
        compacted: Per row, the hop whose begin was last served by a compaction.
        thinned: Per row the hops whose begin took stored tokens away, ascending.
        spans: Per row the logical columns [start, end) of spans it got after its prompt.
        gaps: Per row the logical columns [start, end) after its prompt that hold no token of it.
        cuts: Per row the ends of hops that only such a span closed, each with the span's first
            column; without it they are open.
        ledgers: Per row how many tokens its layers hold by counts alone; None where a crop has cut
            into what was pruned, so that counts do not say it.
    """

    ends: list[list[int]] = field(default_factory=list)
    compacted: list[int] = field(default_factory=list)
    thinned: list[list[int]] = field(default_factory=list)
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    gaps: list[list[tuple[int, int]]] = field(default_factory=list)
    cuts: list[list[tuple[int, int]]] = field(default_factory=list)
    ledgers: list[Any] = field(default_factory=list)

    def ensure(self, batch: int) -> None:
        """Make room for `batch` rows, all in hop 0."""
        if not self.ends:
            tracks = ([[] for _ in range(batch)] for _ in range(5))
            self.ends, self.thinned, self.spans, self.gaps, self.cuts = tracks
            self.compacted, self.ledgers = [0] * batch, [None] * batch

    def open_hops(self) -> list[int]:
        """The hop each row is in."""
        return [len(ends) for ends in self.ends]

    def close(self, row: int, position: int) -> bool:
        """Close the open hop of `row` with the token at logical `position`; False if none is."""
        ends = self.ends[row]
        closes = not ends or ends[-1] < position
        if closes:
            ends.append(position)
        return closes

    def cut(self, row: int, past: int, first: int) -> None:
        """Close it with its last token before `past`: injected input begins at column `first`."""
        end = past - 1
        for start, stop in reversed(self.gaps[row]):
            end = start - 1 if start <= end < stop else end
        if self.close(row, end):
            self.cuts[row].append((end, first))

    def since(self, row: int, past: int) -> int:
        """Sampled tokens before column `past` in the open hop of `row`; 0 in its prompt."""
        if not self.ends[row]:
            return 0
        last = self.ends[row][-1]
        others = (*self.spans[row], *self.gaps[row])
        return past - 1 - last - sum(max(min(b, past) - max(a, last + 1), 0) for a, b in others)

    def reorder(self, indices: Tensor) -> None:
        """Take the rows named by `indices` [B'], as beam search does."""
        if not self.ends:
            return
        rows = list(zip(*vars(self).values(), strict=True))
        alike = all(row == rows[0] for row in rows)
        self._take([0] * len(indices) if alike else indices.tolist())

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        self._take([row for row in range(len(self.ends)) for _ in range(repeats)])

    def _take(self, order: list[int]) -> None:
        for name, track in list(vars(self).items()):
            setattr(self, name, _copied([track[i] for i in order]))

    def crop(self, length: int) -> None:
        """Forget logical positions from `length` on; hops closed there are open again."""
        self.ends = [self.ends_at(row, length) for row in range(len(self.ends))]
        self.cuts = [[cut for cut in cuts if cut[1] < length] for cuts in self.cuts]
        pairs = zip(self.compacted, self.ends, strict=True)
        self.compacted = [min(hop, len(ends)) for hop, ends in pairs]
        self.spans = [_cropped(row, length) for row in self.spans]
        self.gaps = [_cropped(row, length) for row in self.gaps]
        self.ledgers = [
            None if ledger and length < ledger.end else ledger for ledger in self.ledgers
        ]

    def ends_at(self, row: int, length: int) -> list[int]:
        """The `ends` of `row` once only `length` logical tokens are left."""
        gone = {end for end, first in self.cuts[row] if first >= length}  # what closed them goes
        return [end for end in self.ends[row] if end < length and end not in gone]

    def note(self, row: int, start: int, end: int, *, real: bool) -> None:
        """Columns [start, end) of `row` hold a span after its prompt, or no token of it."""
        gaps = self.gaps[row]
        if start >= end:
            return
        if real:
            self.spans[row].append((start, end))
            return
        if gaps and gaps[-1][1] == start:
            start = gaps.pop()[0]
        gaps.append((start, end))

    def reset(self) -> None:
        """Back to an empty sequence."""
        self._take([])

    def snapshot(self) -> HopCounters:
        """A copy that later changes of these counters do not reach."""
        return HopCounters(*map(_copied, vars(self).values()))


def _copied(track: list[Any]) -> list[Any]:
    """A copy of one row's lists each; ledgers are never changed, and shared."""
    return [list(own) if isinstance(own, list) else own for own in track]


def _cropped(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    return [(start, min(end, length)) for start, end in spans if start < length]
