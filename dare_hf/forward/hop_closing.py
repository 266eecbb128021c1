"""The end of a forward: its log is written, and the hops that ended in it are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.cache.hop_counters import counters_of

if TYPE_CHECKING:
    from dare_hf.forward.facts import ForwardContext


def close_context(context: ForwardContext) -> None:
    """After the layers ran: write the log and close the hops that ended in this forward."""
    cache = context.cache
    if cache is None:
        return
    padded = context.valid is not None
    tracks = (context.modality, context.token_hop, context.always, context.written)
    cache.log.append(*tracks, padded=padded)
    state = counters_of(cache)
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
