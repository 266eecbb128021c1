"""Which hop each row of a cache is in: the counters that delimiters and windows move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache


@dataclass
class HopCounters:
    """Hop counters of the rows of one cache: where each closed hop ended.

    A row's open hop is the number of hops it has closed. Hop 0 (the prompt) is closed by the
    prefill, every later one by its delimiter, by `decode_window` sampled tokens, or by input
    injected after it.

    Attributes:
        ends: Per row, the logical position of the last token of each closed hop, ascending.
        compacted: Per row, the hop whose begin was last served by a compaction.
        tail: Last sampled ids per row [B, n], for delimiters of several ids; None when unused.
        injected: Logical columns [start, end) of spans after the prompt; no window counts them.
        barriers: Per row the [start, end) of those it really got; no delimiter reaches across one.
        cuts: Per row the ends of hops that only such a span closed; without it they are open.
        ledgers: Per row how many tokens its layers hold by counts alone; None where a crop has cut
            into what was pruned, so that counts do not say it.
    """

    ends: list[list[int]] = field(default_factory=list)
    compacted: list[int] = field(default_factory=list)
    tail: Tensor | None = None
    injected: list[tuple[int, int]] = field(default_factory=list)
    barriers: list[list[tuple[int, int]]] = field(default_factory=list)
    cuts: list[list[int]] = field(default_factory=list)
    ledgers: list[Any] = field(default_factory=list)

    def ensure(self, batch: int) -> None:
        """Make room for `batch` rows, all in hop 0."""
        if not self.ends:
            self.ends = [[] for _ in range(batch)]
            self.compacted = [0] * batch
            self.barriers, self.cuts = [[] for _ in range(batch)], [[] for _ in range(batch)]
            self.ledgers = [None] * batch

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

    def cut(self, row: int, position: int) -> None:
        """Close it because input is injected after `position`."""
        if self.close(row, position):
            self.cuts[row].append(position)

    def reorder(self, indices: Tensor) -> None:
        """Take the rows named by `indices` [B'], as beam search does."""
        if not self.ends:
            return
        parts = (self.ends, self.compacted, self.barriers, self.cuts, self.ledgers)
        rows = list(zip(*parts, strict=True))
        alike = all(row == rows[0] for row in rows)
        order = [0] * len(indices) if alike else indices.tolist()
        self._take(order)
        if self.tail is not None:
            self.tail = self.tail.index_select(0, indices.to(self.tail.device))

    select = reorder

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        self._take([row for row in range(len(self.ends)) for _ in range(repeats)])
        if self.tail is not None:
            self.tail = self.tail.repeat_interleave(repeats, dim=0)

    def _take(self, order: list[int]) -> None:
        self.ends = [list(self.ends[i]) for i in order]
        self.compacted = [self.compacted[i] for i in order]
        self.barriers = [list(self.barriers[i]) for i in order]
        self.cuts = [list(self.cuts[i]) for i in order]
        self.ledgers = [self.ledgers[i] for i in order]

    def crop(self, length: int, seen: int) -> None:
        """Forget logical positions `length` to `seen`; hops closed there are open again."""
        sampled = seen - length - self.injected_between(length - 1, seen - 1)
        if self.tail is not None:
            self.tail = self.tail[:, : max(self.tail.shape[1] - sampled, 0)]
        for row, cuts in enumerate(self.cuts):
            gone = {e for e in cuts if e >= length - 1}  # the span that closed them goes
            self.ends[row] = [e for e in self.ends[row] if e < length and e not in gone]
            self.cuts[row] = [e for e in cuts if e not in gone]
        pairs = zip(self.compacted, self.ends, strict=True)
        self.compacted = [min(hop, len(ends)) for hop, ends in pairs]
        self.injected = _cropped(self.injected, length)
        self.barriers = [_cropped(spans, length) for spans in self.barriers]
        self.ledgers = [
            None if ledger and length < ledger.end else ledger for ledger in self.ledgers
        ]

    def remember(self, ids: Tensor, count: int) -> None:
        """Keep the last `count` sampled ids, [B, S] `ids` being the newest."""
        joined = ids if self.tail is None else torch.cat([self.tail, ids], dim=1)
        self.tail = joined[:, max(joined.shape[1] - count, 0) :]

    def inject(self, rows: list[int], start: int, end: int) -> None:
        """Note a span in columns [start, end) that brings tokens to `rows`."""
        self.injected.append((start, end))
        for row in rows:
            self.barriers[row].append((start, end))

    def written(self, past: int) -> Tensor | None:
        """[B, n] the sampled ids before column `past`, -1 where an injected span cuts them off."""
        tail = self.tail
        if tail is None or not any(self.barriers):
            return tail
        ends = [spans[-1][1] if spans else 0 for spans in self.barriers]
        since = [past - end - self.injected_between(end - 1, past - 1) for end in ends]
        place = torch.arange(tail.shape[1], 0, -1, device=tail.device)
        reached = place <= torch.tensor(since).to(tail.device, non_blocking=True)[:, None]
        return tail.masked_fill(~reached, -1)

    def injected_between(self, last: int, position: int) -> int:
        """Injected columns after `last`, up to and with `position`."""
        overlaps = (min(b, position + 1) - max(a, last + 1) for a, b in self.injected)
        return sum(max(overlap, 0) for overlap in overlaps)

    def reset(self) -> None:
        """Back to an empty sequence."""
        self.ends, self.compacted, self.tail = [], [], None
        self.injected, self.barriers, self.cuts, self.ledgers = [], [], [], []

    def served(self) -> list[int]:
        """Per row the hop whose begin was last served."""
        return self.compacted

    def snapshot(self) -> HopCounters:
        """A copy that later changes of these counters do not reach; the tail is never written."""
        return HopCounters(
            ends=[list(row) for row in self.ends],
            compacted=list(self.compacted),
            tail=self.tail,
            injected=list(self.injected),
            barriers=[list(row) for row in self.barriers],
            cuts=[list(row) for row in self.cuts],
            ledgers=list(self.ledgers),
        )


def _cropped(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    return [(start, min(end, length)) for start, end in spans if start < length]


def counters_of(cache: DareCache) -> HopCounters:
    """The hop counters of a cache that a model with DARE has used."""
    return cast("HopCounters", cache.hop_counters)
