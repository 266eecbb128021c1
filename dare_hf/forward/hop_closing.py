"""The end of a forward: its log is written, and the hops that ended in it are closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.cache.hop_counters import counters_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.forward.facts import ForwardContext
    from dare_hf.forward.token_rules import TokenRules

# How many sampled ids beyond a delimiter's length are remembered, so that a rejected
# speculation (crop) still leaves enough of them.
_ROLLBACK = 64


def close_context(context: ForwardContext, arguments: Mapping[str, Any], rules: TokenRules) -> None:
    """After the layers ran: write the log and close the hops that ended in this forward."""
    cache = context.cache
    if cache is None:
        return
    cache.log.append(context.modality, context.token_hop, context.always)
    state = counters_of(cache)
    if context.span_ends is not None:
        for row, ends in enumerate(state.ends):
            if not ends:
                state.close(row, context.span_ends[row])
    for row, ends in enumerate(context.closing):
        for end in ends:
            state.close(row, end)
    if context.injected:
        first = context.past + context.length - max(context.sampled)
        rows = [row for row, counts in enumerate(context.counts) if sum(counts)]
        state.inject(rows, context.past, first)
    longest = max((len(s) for s in rules.delimiters), default=1)
    ids = arguments.get("input_ids")
    if longest > 1 and ids is not None and any(context.sampled):
        first = context.length - max(context.sampled)
        if context.span is not None:  # rows whose prompt ends later wrote nothing there
            ids = ids.masked_fill(context.span.to(ids.device), -1)
        state.remember(ids[:, first:], longest + _ROLLBACK)
