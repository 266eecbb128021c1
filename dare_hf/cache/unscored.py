"""Hidden states of tokens whose score nobody needs before their hop closes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


class Unscored:
    """What entered one layer at sampled tokens, by logical position; scored when the hop closes.

    References only: a step adds one to a list. All else makes a new list.

    Args:
        chunks: First logical position and hidden states [B, n, D] of what is already known.
    """

    def __init__(self, chunks: Iterable[tuple[int, Tensor]] = ()) -> None:
        self._chunks = list(chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    def append(self, start: int, hidden: Tensor) -> None:
        """Add hidden states [B, n, D] of the tokens from logical position `start` on."""
        self._chunks.append((start, hidden))

    def cropped(self, length: int) -> Unscored:
        """Without tokens at logical positions >= `length`."""
        return Unscored((s, h[:, : length - s]) for s, h in self._chunks if s < length)

    def rows(self, index: Tensor) -> Unscored:
        """The rows `index` [B']."""
        return Unscored((s, h.index_select(0, index.to(h.device))) for s, h in self._chunks)

    def runs(self) -> Iterator[tuple[int, Tensor]]:
        """First logical position and hidden states [B, n, D] of each gapless run."""
        run: list[Tensor] = []
        first = end = 0
        for start, hidden in self._chunks:
            if run and start != end:
                yield first, torch.cat(run, dim=1)
                run = []
            if not run:
                first = start
            run.append(hidden)
            end = start + hidden.shape[1]
        if run:
            yield first, torch.cat(run, dim=1)
