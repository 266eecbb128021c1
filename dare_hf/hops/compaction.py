"""Compaction: when a hop begins, every layer's cache is re-pruned to that hop's rates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from dare_hf.cache import Thinning, to_host
from dare_hf.hops.eviction import HopPruner, StoredTokens
from dare_hf.hops.ledger import LedgerRules
from dare_hf.hops.ledger_rows import begun_ledgers
from dare_hf.routing.counts import counted
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.scoring.observe import observed_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from dare_hf.cache import DareCache, DareLayer
    from dare_hf.config import DareConfig
    from dare_hf.hops.ledger import Ledger
    from dare_hf.routing.retention import RetentionTable
    from dare_hf.scoring.observe import Expand

# What an older observation is worth beside a newer one (docs/method.md, section 5).
OBSERVED_DECAY = 0.9

HeldCounts = list[list[list[int]]]  # [layer][row][text | vision]


@dataclass
class Compaction:
    """What one compaction left, in host numbers.

    Attributes:
        hops: Per row the hop that begins, 0 for rows that were left alone.
        held: [layer][row][text | vision] stored tokens of closed hops afterwards.
        totals: [row][text | vision] all real tokens of closed hops, pruned ones counted.
        ledgers: Per row what counts say that its layers hold.
    """

    hops: list[int]
    held: HeldCounts
    totals: list[list[int]]
    ledgers: list[Ledger | None]


def due_rows(cache: DareCache) -> list[int]:
    """Per row the first hop that has begun and was not served, 0 where there is none."""
    state = cache.hop_counters
    pairs = zip(state.open_hops(), state.compacted, strict=True)
    return [served + 1 if hop > served else 0 for hop, served in pairs]


def compact(
    cache: DareCache,
    config: DareConfig,
    table: RetentionTable,
    expanders: Sequence[Expand | None] | None = None,
    note: Callable[[Compaction], None] | None = None,
    exempt: Mapping[int, int] | None = None,
) -> None:
    """Prune the stored tokens of closed hops in the rows whose hop has begun.

    What stays is `HopPruner`'s law; the memory of what goes is freed. Several hops that closed in
    one forward are served one after the other. A hop is decided for all layers before any changes;
    where memory lacks while they do, the next call does the rest, so that it may be called again.

    Args:
        cache: The cache; its hop counters say which rows are due.
        config: Budgets, scores and the cap.
        table: Rates by hop, layer and modality.
        expanders: For each layer what makes keys and values of the latents it stores, None where it
            stores keys; None where all do.
        note: Told what each hop leaves, once that is decided.
        exempt: Layers that keep everything of a span, and from how many columns on.

    Source: docs/method.md, section 5.
    """
    cache.settle()
    rules = LedgerRules(config, table, exempt or {})
    while any(due := due_rows(cache)):
        state = cache.hop_counters
        served = [max(a, b) for a, b in zip(state.compacted, due, strict=True)]
        found, decided = _begin_hops(cache, rules, due, expanders)
        thins = [
            hop > 0 and any(part.kept[row] < part.layer.kept_host[row] for part in decided)
            for row, hop in enumerate(due)
        ]
        pairs = zip(state.thinned, due, thins, strict=True)
        thinned = [[*hops, hop] if one else hops for hops, hop, one in pairs]
        # One assignment decides it: a hop is served when what it leaves is known.
        cache.decide(decided, partial(_serve, served, thinned, found, note))
        cache.settle()


def _serve(
    served: list[int],
    thinned: list[list[int]],
    found: Compaction,
    note: Callable[[Compaction], None] | None,
    cache: DareCache,
) -> None:
    """Tell counters and report that hops have begun; telling it again changes nothing."""
    state = cache.hop_counters
    state.compacted, state.thinned, state.ledgers = served, thinned, found.ledgers
    if note is not None:
        note(found)


def _begin_hops(
    cache: DareCache,
    rules: LedgerRules,
    due: list[int],
    expanders: Sequence[Expand | None] | None,
) -> tuple[Compaction, list[Thinning]]:
    """What one hop leaves in the rows that are due, and what that changes; nothing is yet."""
    config = rules.config
    pruner = HopPruner(cache.log, config, rules.table, due)
    if max(due) == 1 and config.max_kv_tokens is None:
        return Compaction(due, [], pruner.totals(), begun_ledgers(cache, pruner, rules, {})), []
    state = cache.hop_counters
    pairs = zip(state.ends, due, strict=True)
    ends = [row[hop - 1] if hop else -1 for row, hop in pairs]
    slots = [(i, slot) for i, slot in enumerate(cache.stored) if slot.rows]
    expand = dict(enumerate(expanders or ()))
    scores: dict[int, Tensor] = {}
    tokens = {
        i: _tokens(slot, config, ends, expand.get(i), partial(scores.__setitem__, i))
        for i, slot in slots
    }
    keeps = pruner.keep_each(tokens)
    left = _left(pruner, {i: own.where for i, own in tokens.items()}, keeps)
    held: HeldCounts = [[[0, 0] for _ in due] for _ in cache.stored]
    decided = []
    for i, slot in slots:
        held[i] = [row[:2] for row in left[i]]
        kept = [row[2] for row in left[i]]
        decided.append(Thinning(slot, slot._table, keeps[i], kept, scores.get(i)))
    places = list(pruner.available)
    available = dict(zip(places, to_host(list(pruner.available.values())), strict=True))
    ledgers = begun_ledgers(cache, pruner, rules, available)
    return Compaction(due, held, pruner.totals(), ledgers), decided


def _tokens(
    slot: DareLayer,
    config: DareConfig,
    ends: list[int],
    expand: Expand | None,
    renew: Callable[[Tensor], None],
) -> StoredTokens:
    """The layer's stored tokens; under "observed" its ring scores them anew, which `renew` gets."""
    if config.resolved_hop_score != "observed" or slot.ring is None:
        return StoredTokens(slot.positions(), slot.scores())

    def observed(closed: Tensor) -> Tensor:
        scores = renewed(slot.scores(), observed_scores(slot, closed, ends, expand), closed)
        renew(scores)
        return scores

    return StoredTokens(slot.positions(), observed)


def renewed(old: Tensor, new: Tensor, closed: Tensor) -> Tensor:
    """Float32[B, C]: what a closed hop's observation makes of the scores; others stay."""
    return torch.where(closed, torch.maximum(OBSERVED_DECAY * old, new.float()), old)


def _left(
    pruner: HopPruner, where: dict[int, Tensor], keep: dict[int, Tensor]
) -> dict[int, list[list[int]]]:
    """By layer, [rows][closed text, closed vision, all] of what stays; a host copy a device."""
    devices: dict[torch.device, list[int]] = {}
    for i, columns in where.items():
        devices.setdefault(columns.device, []).append(i)
    found: dict[int, list[list[int]]] = {}
    for places in devices.values():
        counts = pruner.counts_left([where[i] for i in places], [keep[i] for i in places])
        found |= zip(places, counts.tolist(), strict=True)
    return found


def stored_counts(cache: DareCache, hops: list[int]) -> tuple[HeldCounts, list[list[int]]]:
    """What layers hold, and the sequence has, of each row's hops up to `hops`.

    Returns:
        [layer][row][text | vision] stored tokens, and [row][text | vision] of all real ones.
    """
    last = torch.tensor(hops)[:, None]
    held = []
    for slot in cache.stored:
        if not slot.rows:
            held.append([[0, 0] for _ in hops])
            continue
        modality, hop = cache.log.lookup(slot.positions())
        inside = (modality >= 0) & (hop <= last.to(hop.device))
        held.append(counted(modality.long(), inside, 1)[:, 0].tolist())
    rows = zip(cache.log.counts_by_hop(), hops, strict=True)
    totals = [[sum(h[m] for h in row[: end + 1]) for m in (TEXT, VISION)] for row, end in rows]
    return held, totals
