"""The ledgers of a cache's rows: opened by spans, carried on by compactions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.hops.ledger import Held, Ledger
from dare_hf.routing.counts import by_hop, counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dare_hf.cache import DareCache
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.hops.eviction import HopPruner
    from dare_hf.hops.ledger import LedgerRules


def note_span(context: ForwardContext, rules: LedgerRules) -> None:
    """Enter the span of a forward, if it has one, into the ledgers of its cache's rows."""
    cache = context.cache
    if cache is None:
        return
    state = cache.hop_counters
    if not context.past:
        empty = Ledger((Held.nothing(),) * len(rules.table.plan_layers))
        state.ledgers = [empty] * context.batch
    if context.span is None:
        return
    length = context.past + context.length
    kept = rules.span(context.span_hop, context.counts, context.forced_counts, length)
    end = length - max(context.sampled)
    made: dict[object, Ledger] = {}
    for row, ledger in enumerate(state.ledgers):
        if ledger is None or not sum(context.counts[row]):
            continue
        hop, own = context.span_hop[row], [layer[row] for layer in kept]
        # rows that are alike share one ledger, so that reordering them needs no comparison
        key = (id(ledger), hop, *map(tuple, (context.counts[row], *own)))
        if key not in made:
            made[key] = ledger.with_span(hop, context.counts[row], own, end)
        state.ledgers[row] = made[key]


def begun_ledgers(
    cache: DareCache,
    pruner: HopPruner,
    rules: LedgerRules,
    available: Mapping[int, Sequence[Sequence[Sequence[Sequence[int]]]]],
) -> list[Ledger | None]:
    """The ledgers of the rows once their hop has begun.

    Args:
        cache: The cache before it.
        pruner: Says which hop begins in which row, and counts tokens.
        rules: What decides.
        available: By layer and row what there was to choose from.
    """
    ledgers, end = list(cache.hop_counters.ledgers), cache.get_seq_length()
    thins = max(pruner.due) > 1 or rules.config.max_kv_tokens is not None
    pinned = pruner.pinned_counts() if thins else [[] for _ in ledgers]
    made: dict[object, Ledger] = {}
    for row, hop in enumerate(pruner.due):
        ledger = ledgers[row]
        if not hop or ledger is None:
            continue
        tokens, own = pruner.counts[row], {i: rows[row] for i, rows in available.items()}
        key = (id(ledger), hop, str((tokens, pinned[row], own)))
        if key not in made:
            made[key] = ledger.with_begin(hop, tokens, pinned[row], rules, end, own)
        ledgers[row] = made[key]
    return ledgers


def know_rows(cache: DareCache, layers: int) -> None:
    """Measure the rows of which nothing is known: a crop has cut into what was pruned.

    What is left then depends on scores, so it is a given, as a prompt's counts are.

    Args:
        cache: The cache.
        layers: Routed layers of the model.
    """
    state = cache.hop_counters
    if None not in state.ledgers or not cache.get_seq_length():
        return
    counts = cache.log.counts_by_hop()
    hops = max(map(len, counts), default=0)
    found = [_by_hop(cache, i, hops) for i in range(len(cache.stored))]
    for row, ledger in enumerate(state.ledgers):
        if ledger is not None:
            continue
        held = [rows[row] if rows else [] for rows in found] + [[]] * (layers - len(found))
        begun = state.compacted[row]
        state.ledgers[row] = Ledger(
            layers=tuple(_held(groups) for groups in held),
            begun=begun,
            seen=sum(map(sum, counts[row])),
            spans=tuple((h, t, v) for h, (t, v) in enumerate(counts[row]) if h >= begun),
            end=cache.get_seq_length(),
        )


def _held(groups: Sequence[Sequence[int]]) -> Held:
    total = sum(map(sum, groups))
    return Held(by_hop(groups), total, total, capped=True)


def _by_hop(cache: DareCache, layer: int, hops: int) -> list[list[list[int]]]:
    """[rows][hops][text, vision] tokens a layer stores; [] where no forward has come to it."""
    slot = cache.stored[layer]
    if not slot.rows:
        return []
    modality, hop = cache.log.lookup(slot.positions())
    return counted(2 * hop.long() + modality, modality >= 0, hops).tolist()
