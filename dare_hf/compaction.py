"""Compaction: when a hop begins, every layer's cache is re-pruned to that hop's rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.attention import observed_scores
from dare_hf.hops import hop_state_of
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import budget
from dare_hf.routing.selection import compaction_keep, hop_prefix_mask, keep_mask

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache, DareLayer
    from dare_hf.config import DareConfig
    from dare_hf.routing.retention import RetentionTable

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
    """

    hops: list[int]
    held: HeldCounts
    totals: list[list[int]]


def due_rows(cache: DareCache) -> list[int]:
    """Per row the hop that has begun since the last compaction, 0 where none has."""
    state = hop_state_of(cache)
    pairs = zip(state.open_hops(), state.compacted, strict=True)
    return [hop if hop > served else 0 for hop, served in pairs]


def compact(cache: DareCache, config: DareConfig, table: RetentionTable) -> Compaction | None:
    """Prune the stored tokens of closed hops in the rows whose hop has begun.

    Law: each layer keeps of every modality the kappa prefix of each closed hop, ids that are
    always kept, and the best others up to ``ceil(rho * n)`` in all, n counting all real tokens of
    closed hops. Memory of what goes is freed. The boundary from hop 0 to hop 1 removes nothing
    unless `max_kv_tokens` says so.

    Args:
        cache: The cache; its hop counters say which rows are due.
        config: Budgets, scores and the cap.
        table: Rates by hop, layer and modality.

    Returns:
        None when no row was due.

    Source: docs/method.md, section 5.
    """
    due = due_rows(cache)
    if not any(due):
        return None
    state = hop_state_of(cache)
    state.compacted = [max(a, b) for a, b in zip(state.compacted, due, strict=True)]
    work = _Work(cache, config, table, due)
    if max(due) == 1 and config.max_kv_tokens is None:
        return Compaction(due, [], work.totals())
    slots = [(i, slot) for i, slot in enumerate(cache.layers) if slot.rows]
    keeps = [work.keep(i, slot) for i, slot in slots]
    counts = work.fetch_counts(slots, keeps)
    held: HeldCounts = [[[0, 0] for _ in due] for _ in cache.layers]
    for (i, slot), keep, rows in zip(slots, keeps, counts, strict=True):
        held[i] = [row[:2] for row in rows]
        kept = [row[2] for row in rows]
        if kept != slot.kept_host:
            slot.keep_columns(keep, kept)
    return Compaction(due, held, work.totals())


def stored_counts(cache: DareCache, hops: list[int]) -> tuple[HeldCounts, list[list[int]]]:
    """What layers hold, and the sequence has, of each row's hops up to `hops`.

    Returns:
        [layer][row][text | vision] stored tokens, and [row][text | vision] of all real ones.
    """
    last = torch.tensor(hops)[:, None]
    held = []
    for slot in cache.layers:
        modality, hop = cache.log.lookup(slot.positions())
        inside = hop <= last.to(hop.device)
        parts = [inside & (modality == m) for m in (TEXT, VISION)]
        held.append(torch.stack([part.sum(1) for part in parts], dim=1).tolist())
    rows = zip(cache.log.counts_by_hop(), hops, strict=True)
    totals = [[sum(h[m] for h in row[: end + 1]) for m in (TEXT, VISION)] for row, end in rows]
    return held, totals


class _Work:
    """One compaction over all layers."""

    def __init__(
        self, cache: DareCache, config: DareConfig, table: RetentionTable, due: list[int]
    ) -> None:
        self.cache, self.config, self.table, self.due = cache, config, table, due
        self.counts = cache.log.counts_by_hop()
        self.hops = max(due)
        log = cache.log
        self.pinned = hop_prefix_mask(log.modality >= 0, log.hop, config.prefix_tokens)
        if log.always is not None:
            self.pinned = self.pinned | log.always
        self.alive: Tensor | None = None
        if config.pruned == "drop":
            self.alive = torch.ones_like(self.pinned)

    def totals(self) -> list[list[int]]:
        """[row][text | vision] real tokens of closed hops."""
        return [
            [sum(hop[m] for hop in row[:begun]) for m in (TEXT, VISION)]
            for row, begun in zip(self.counts, self.due, strict=True)
        ]

    def budgets(self, layer: int) -> list[list[list[int]]]:
        """[row][1 or hop][text | vision] tokens to keep of closed hops."""
        pooled = self.config.resolved_hop_budget == "pooled"
        groups = 1 if pooled else self.hops
        rows = []
        for row, begun in zip(self.counts, self.due, strict=True):
            closed = [hop if h < begun else [0, 0] for h, hop in enumerate(row[: self.hops])]
            closed += [[0, 0]] * (self.hops - len(closed))
            if pooled:
                closed = [[sum(hop[m] for hop in closed) for m in (TEXT, VISION)]]
            rates = [self.table.rate(begun, layer, m) if begun > 1 else 1.0 for m in (0, 1)]
            rows.append([[budget(rates[m], hop[m]) for m in (0, 1)] for hop in closed[:groups]])
        return rows

    def keep(self, layer: int, slot: DareLayer) -> Tensor:
        """Bool[B, C]: the stored columns that stay."""
        where = slot.positions()
        stored = where >= 0
        modality, hop = self.cache.log.lookup(where)
        begun = torch.tensor(self.due, device=where.device)[:, None]
        closed = stored & (hop < begun)
        index = where.clamp(min=0)
        forced = self.pinned.to(where.device).gather(1, index)
        candidates = closed
        if self.alive is not None:
            candidates = closed & self.alive.to(where.device).gather(1, index)
        scores = self._scores(slot, closed)
        rows = self.budgets(layer)
        groups = range(len(rows[0]))
        largest = [(max(r[g][TEXT] for r in rows), max(r[g][VISION] for r in rows)) for g in groups]
        wanted = torch.tensor(rows).to(where.device, non_blocking=True)
        keep = compaction_keep(scores, modality, hop, candidates, forced, wanted, largest)
        keep = self._cap(keep, stored & ~closed, scores, forced)
        if self.alive is not None:
            gone = torch.where(closed & ~keep, index, self.alive.shape[1])
            marks = torch.nn.functional.pad(self.alive, (0, 1)).to(where.device)
            self.alive = marks.scatter(1, gone, False)[:, :-1]
        return keep | (stored & ~closed)

    def _cap(self, keep: Tensor, fixed: Tensor, scores: Tensor, forced: Tensor) -> Tensor:
        """Of `keep`, at most `max_kv_tokens` per row together with the `fixed` columns."""
        cap = self.config.max_kv_tokens
        if cap is None:
            return keep
        room = (cap - fixed.sum(1)).clamp(min=0)
        wanted = torch.stack([room, torch.zeros_like(room)], dim=1)
        return keep_mask(
            scores, torch.zeros_like(keep, dtype=torch.int8), keep, forced, wanted, (cap, 0)
        )

    def _scores(self, slot: DareLayer, closed: Tensor) -> Tensor:
        scores = slot.scores()
        if self.config.resolved_hop_score != "observed" or slot.ring is None:
            return scores
        scores = torch.maximum(OBSERVED_DECAY * scores, observed_scores(slot, closed).float())
        slot.set_scores(scores)
        return scores

    def fetch_counts(
        self, slots: list[tuple[int, DareLayer]], keeps: list[Tensor]
    ) -> list[list[list[int]]]:
        """[layer][row][closed text, closed vision, all] of what stays: one copy per device."""
        result = []
        for (_, slot), keep in zip(slots, keeps, strict=True):
            modality, hop = self.cache.log.lookup(slot.positions())
            closed = keep & (hop < torch.tensor(self.due, device=keep.device)[:, None])
            parts = [closed & (modality == TEXT), closed & (modality == VISION), keep]
            result.append(torch.stack([part.sum(1) for part in parts], dim=1))
        devices = {counts.device for counts in result}
        if len(devices) == 1:
            return torch.stack(result).tolist()
        return [counts.tolist() for counts in result]
