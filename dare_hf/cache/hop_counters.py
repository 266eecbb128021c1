"""Which hop each row of a cache is in: the counters that delimiters and windows move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

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
    """

    ends: list[list[int]] = field(default_factory=list)
    compacted: list[int] = field(default_factory=list)
    tail: Tensor | None = None
    injected: list[tuple[int, int]] = field(default_factory=list)

    def ensure(self, batch: int) -> None:
        """Make room for `batch` rows, all in hop 0."""
        if not self.ends:
            self.ends = [[] for _ in range(batch)]
            self.compacted = [0] * batch

    def open_hops(self) -> list[int]:
        """The hop each row is in."""
        return [len(ends) for ends in self.ends]

    def close(self, row: int, position: int) -> None:
        """Close the open hop of `row` with the token at logical `position`."""
        ends = self.ends[row]
        if not ends or ends[-1] < position:
            ends.append(position)

    def reorder(self, indices: Tensor) -> None:
        """Take the rows named by `indices` [B'], as beam search does."""
        if not self.ends:
            return
        if any(ends != self.ends[0] for ends in self.ends) or len(set(self.compacted)) > 1:
            order = indices.tolist()
        else:
            order = [0] * len(indices)
        self.ends = [list(self.ends[i]) for i in order]
        self.compacted = [self.compacted[i] for i in order]
        if self.tail is not None:
            self.tail = self.tail.index_select(0, indices.to(self.tail.device))

    select = reorder

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        self.ends = [list(ends) for ends in self.ends for _ in range(repeats)]
        self.compacted = [hop for hop in self.compacted for _ in range(repeats)]
        if self.tail is not None:
            self.tail = self.tail.repeat_interleave(repeats, dim=0)

    def crop(self, length: int) -> None:
        """Forget everything at logical positions >= `length`; hops closed there are open again."""
        removed = max((sum(e >= length for e in ends) for ends in self.ends), default=0)
        if removed:
            self.ends = [[e for e in ends if e < length] for ends in self.ends]
            pairs = zip(self.compacted, self.ends, strict=True)
            self.compacted = [min(hop, len(ends)) for hop, ends in pairs]
        self.injected = [(a, min(b, length)) for a, b in self.injected if a < length]

    def crop_tail(self, count: int) -> None:
        """Forget the last `count` sampled ids."""
        if self.tail is not None:
            self.tail = self.tail[:, : max(self.tail.shape[1] - count, 0)]

    def remember(self, ids: Tensor, count: int) -> None:
        """Keep the last `count` sampled ids, [B, S] `ids` being the newest."""
        joined = ids if self.tail is None else torch.cat([self.tail, ids], dim=1)
        self.tail = joined[:, max(joined.shape[1] - count, 0) :]

    def inject(self, rows: list[int], start: int, end: int) -> None:
        """Note a span in columns [start, end); a delimiter cannot reach across it in `rows`."""
        self.injected.append((start, end))
        if self.tail is not None and rows:
            self.tail = self.tail.clone()
            self.tail[rows] = -1

    def injected_between(self, last: int, position: int) -> int:
        """Injected columns after `last`, up to and with `position`."""
        overlaps = (min(b, position + 1) - max(a, last + 1) for a, b in self.injected)
        return sum(max(overlap, 0) for overlap in overlaps)

    def reset(self) -> None:
        """Back to an empty sequence."""
        self.ends, self.compacted, self.tail, self.injected = [], [], None, []


def counters_of(cache: DareCache) -> HopCounters:
    """The hop counters of a cache that a model with DARE has used."""
    return cast("HopCounters", cache.hop_counters)
