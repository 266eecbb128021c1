"""When a hop closes; and the end of a forward, whose log is written and whose hops are closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dare_hf.forward.facts import ForwardContext


@dataclass
class OpenHop:
    """The open hop of one row, as its sampled tokens come.

    A token closes it that ends a delimiter, or is the last of the window; it belongs to that hop.

    Attributes:
        window: Close a hop every this many sampled tokens; None never.
        since: Sampled tokens in it so far.
    """

    window: int | None
    since: int = 0

    def closes(self, ends: bool) -> bool:
        """Whether the next sampled token closes it; `ends` where that ends a delimiter."""
        self.since += 1
        closed = ends or (self.window is not None and self.since >= self.window)
        self.since = 0 if closed else self.since
        return closed


def close_context(context: ForwardContext) -> None:
    """After the layers ran: write the log and close the hops that ended in this forward."""
    cache = context.cache
    if cache is None:
        return
    padded = context.valid is not None
    tracks = (context.modality, context.token_hop, context.always, context.written)
    cache.log.append(*tracks, padded=padded)
    state = cache.hop_counters
    if context.span_ends is not None:
        for row, ends in enumerate(state.ends):
            if not ends:
                state.close(row, context.span_ends[row])
    for row, ends in enumerate(context.closing):
        for end in ends:
            state.close(row, end)
    for row, stretches in enumerate(context.spans):
        for start, end in stretches:
            state.note(row, start, end, real=True)
    for row, stretches in enumerate(context.gaps):
        for start, end in stretches:
            state.note(row, start, end, real=False)
