"""Which closed-hop tokens a layer keeps when a hop begins: budgets, forced tokens, scores."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import budget
from dare_hf.routing.selection import (
    capped_keep,
    compaction_keep,
    hop_prefix_mask,
    last_valid,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dare_hf.cache import TokenLog
    from dare_hf.config import DareConfig
    from dare_hf.routing.retention import RetentionTable


class StoredTokens(NamedTuple):
    """What one layer holds before a hop's rates are applied.

    Attributes:
        where: Long[B, C] logical positions, -1 for holes.
        scores: Float32[B, C], or a function that makes them from Bool[B, C], the closed hops'
            columns.
    """

    where: Tensor
    scores: Tensor | Callable[[Tensor], Tensor]


def never_thins(config: DareConfig, table: RetentionTable, layer: int) -> bool:
    """Whether a layer keeps all its stored tokens at every hop, so that no score matters there."""
    if config.max_kv_tokens is not None or config.pruned == "drop":
        return False
    return all(row[layer] >= 1.0 for row in (*table.vision, *table.text))


class HopPruner:
    """The begin of one hop in some rows, over all layers in order.

    Law: each layer keeps of every modality the kappa prefix of each closed hop, ids that are
    always kept, and the best others up to ``ceil(rho * n)`` in all, n counting all real tokens of
    closed hops. Of these `max_kv_tokens` leaves no row more than that, forced ones included
    (`tiers`). The boundary from hop 0 to hop 1 removes nothing unless the cap says so.

    Args:
        log: Modality and hop of every logical token up to the boundary.
        config: Budgets and the cap.
        table: Rates by hop, layer and modality.
        due: Per row the hop that begins, 0 for rows that are left alone.

    Source: docs/method.md, section 5.
    """

    def __init__(
        self, log: TokenLog, config: DareConfig, table: RetentionTable, due: list[int]
    ) -> None:
        self.log, self.config, self.table, self.due = log, config, table, due
        self.counts = log.counts_by_hop()
        real = log.modality >= 0
        self.prefixes = hop_prefix_mask(real, log.hop, config.prefix_tokens)
        self.pinned = self.prefixes if log.always is None else self.prefixes | log.always
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
        hops = max(self.due)
        groups = 1 if pooled else hops
        rows = []
        for row, begun in zip(self.counts, self.due, strict=True):
            closed = [hop if h < begun else [0, 0] for h, hop in enumerate(row[:hops])]
            closed += [[0, 0]] * (hops - len(closed))
            if pooled:
                closed = [[sum(hop[m] for hop in closed) for m in (TEXT, VISION)]]
            rates = [self.table.rate(begun, layer, m) if begun > 1 else 1.0 for m in (0, 1)]
            rows.append([[budget(rates[m], hop[m]) for m in (0, 1)] for hop in closed[:groups]])
        return rows

    def keep(self, layer: int, tokens: StoredTokens) -> Tensor:
        """Bool[B, C]: the stored columns of `layer` that stay; call it layer by layer."""
        where = tokens.where
        stored = where >= 0
        if never_thins(self.config, self.table, layer):
            return stored
        modality, hop = self.log.lookup(where)
        closed = self.closed(where)
        index = where.clamp(min=0)
        forced = self.pinned.to(where.device).gather(1, index)
        candidates = closed
        if self.alive is not None:
            candidates = closed & self.alive.to(where.device).gather(1, index)
        scores = tokens.scores
        if not isinstance(scores, torch.Tensor):
            scores = scores(closed)
        rows = self.budgets(layer)
        groups = range(len(rows[0]))
        largest = [(max(r[g][TEXT] for r in rows), max(r[g][VISION] for r in rows)) for g in groups]
        wanted = torch.tensor(rows).to(where.device, non_blocking=True)
        keep = compaction_keep(scores, modality, hop, candidates, forced, wanted, largest)
        if self.config.max_kv_tokens is not None:
            tiers = [tier.to(where.device).gather(1, index) for tier in self.tiers]
            keep = capped_keep(scores, keep, tiers, self.config.max_kv_tokens)
        if self.alive is not None:
            gone = torch.where(closed & ~keep, index, self.alive.shape[1])
            marks = torch.nn.functional.pad(self.alive, (0, 1)).to(where.device)
            self.alive = marks.scatter(1, gone, False)[:, :-1]
        return keep | (stored & ~closed)

    @cached_property
    def tiers(self) -> list[Tensor]:
        """Bool[B, N] each: what a cap keeps before it asks for scores, most important first.

        The last token of closed hops, their prefixes from hop 0 on, ids that are always kept.
        """
        log, due = self.log, torch.tensor(self.due).to(self.log.hop.device)[:, None]
        last = last_valid((log.modality >= 0) & (log.hop < due))
        return [last, self.prefixes, self.pinned]

    def closed(self, where: Tensor) -> Tensor:
        """Bool[B, C]: columns at logical `where` that belong to closed hops."""
        begun = torch.tensor(self.due).to(where.device, non_blocking=True)[:, None]
        return (where >= 0) & (self.log.lookup(where)[1] < begun)

    def counts_left(self, where: Tensor, keep: Tensor) -> Tensor:
        """Long[B, 3]: closed text, closed vision and all of what stays."""
        modality, _ = self.log.lookup(where)
        closed = keep & self.closed(where)
        parts = [closed & (modality == TEXT), closed & (modality == VISION), keep]
        return torch.stack([part.sum(1) for part in parts], dim=1)
