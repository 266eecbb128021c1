"""Which closed-hop tokens a layer keeps when a hop begins: budgets, forced tokens, scores."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from dare_hf.routing.counts import closed_budgets, closed_groups
from dare_hf.routing.kinds import TEXT, VISION
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
        self.available: dict[int, Tensor] = {}  # Long[B, groups, 2, 2] candidates, forced ones
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
        most, rows = self.groups, []
        for row, begun in zip(self.counts, self.due, strict=True):
            groups = closed_groups(row, begun, pooled=self.pooled)
            budgets = closed_budgets(self.table, layer, begun, groups)
            rows.append(budgets + [[0, 0] for _ in range(most - len(groups))])
        return rows

    @property
    def pooled(self) -> bool:
        """Whether the tokens of all closed hops compete with each other."""
        return self.config.resolved_hop_budget == "pooled"

    @property
    def groups(self) -> int:
        """How many groups of tokens compete among themselves, in the row that has most."""
        return 1 if self.pooled else max(self.due)

    @property
    def by_scores(self) -> bool:
        """Whether scores may decide how many of a modality are left, not only which."""
        return self.config.max_kv_tokens is not None or self.config.pruned == "drop"

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
        if self.by_scores:
            parts = [self._in_groups(part, modality, hop) for part in (candidates, forced)]
            self.available[layer] = torch.stack([parts[0], parts[0] & parts[1]], -2).sum(-1)
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

    def _in_groups(self, tokens: Tensor, modality: Tensor, hop: Tensor) -> Tensor:
        """Bool[B, groups, 2, C]: the stored tokens of each group and modality."""
        kinds = torch.arange(2, device=hop.device)
        found = tokens[:, None] & (modality[:, None] == kinds[:, None])
        if self.pooled:
            return found[:, None]
        group = torch.arange(self.groups, device=hop.device)[:, None, None]
        return found[:, None] & (hop[:, None, None] == group)

    def pinned_counts(self) -> list[list[list[int]]]:
        """[row][hop][text | vision] tokens of closed hops that no rate removes; one host copy."""
        modality, hops = self.log.modality, max(self.due)
        parts = [
            (self.pinned & (self.log.hop == hop) & (modality == m)).sum(1)
            for hop in range(hops)
            for m in (TEXT, VISION)
        ]
        found = torch.stack(parts, dim=1).view(len(self.due), hops, 2).tolist()
        return [row[:begun] for row, begun in zip(found, self.due, strict=True)]

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
