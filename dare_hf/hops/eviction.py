"""Which closed-hop tokens a layer keeps when a hop begins: budgets, forced tokens, scores."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from dare_hf.routing.counts import by_hop, closed_budgets, closed_groups, counted
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.selection import (
    capped_keep,
    compaction_keep,
    hop_prefix_mask,
    last_valid,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
    if config.max_kv_tokens is not None or config.drops or config.hop_summary:
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
        if config.drops:
            self.alive = torch.ones_like(self.pinned)

    def totals(self) -> list[list[int]]:
        """[row][text | vision] real tokens of closed hops."""
        return [
            [sum(hop[m] for hop in row[:begun]) for m in (TEXT, VISION)]
            for row, begun in zip(self.counts, self.due, strict=True)
        ]

    def budgets(self, layers: Sequence[int]) -> Tensor:
        """Long[L, B, 1 or hops, 2]: tokens to keep of closed hops, on the host."""
        groups = torch.stack(
            [
                torch.nn.functional.pad(own, (0, 0, 0, self.groups - len(own)))
                for own in (
                    closed_groups(by_hop(row), begun, pooled=self.pooled)
                    for row, begun in zip(self.counts, self.due, strict=True)
                )
            ]
        )
        return closed_budgets(self.table, layers, self.due, groups, self.config.hop_summary)

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
        """Whether scores may decide how many of a modality are left, or were stored."""
        capped, drops = self.config.max_kv_tokens is not None, self.config.drops
        return capped or drops or self.config.decode == "routed"

    def keep(self, layer: int, tokens: StoredTokens) -> Tensor:
        """Bool[B, C]: the stored columns of `layer` that stay; call it layer by layer."""
        if never_thins(self.config, self.table, layer):
            return tokens.where >= 0
        return self._decide([layer], [tokens])[0]

    def keep_each(self, tokens: Mapping[int, StoredTokens]) -> dict[int, Tensor]:
        """Bool[B, C] by layer, the layers in order: `keep` of all of them at once, where it can be.

        Under "drop" each waits for the one before; layers on other devices stay there.
        """
        kept, together = {}, dict[object, list[int]]()
        for layer, own in tokens.items():
            if never_thins(self.config, self.table, layer):
                kept[layer] = own.where >= 0
            else:
                alone = layer if self.alive is not None else None
                together.setdefault((own.where.device, alone), []).append(layer)
        for layers in together.values():
            found = self._decide(layers, [tokens[layer] for layer in layers])
            kept |= zip(layers, found, strict=True)
        return kept

    def _decide(self, layers: list[int], tokens: list[StoredTokens]) -> list[Tensor]:
        """Bool[B, C] of each layer; more than one only where none depends on another.

        Tensors here are [L, B, C], narrower layers filled up with holes.
        """
        widths = [own.where.shape[1] for own in tokens]
        where = _stacked([own.where for own in tokens], -1)
        modality, hop = self.log.lookup(where)
        index = where.clamp(min=0)
        closed = (where >= 0) & (hop < self._begun(where))
        forced, candidates = _at(self.pinned, index), closed
        if self.alive is not None:
            candidates = closed & _at(self.alive, index)
        parts = zip(closed, tokens, widths, strict=True)
        scores = [
            own.scores if isinstance(own.scores, torch.Tensor) else own.scores(part[:, :width])
            for part, own, width in parts
        ]
        if self.by_scores:
            parts = (candidates, candidates & forced)
            counts = torch.stack([self._in_groups(p, modality, hop) for p in parts], -1)
            self.available |= zip(layers, counts, strict=True)
        ranked = _stacked(scores, 0.0).flatten(0, 1)
        rows = [part.flatten(0, 1) for part in (modality, hop, candidates, forced)]
        budgets = self.budgets(layers).flatten(0, 1).to(where.device, non_blocking=True)
        keep = compaction_keep(ranked, *rows, budgets)
        if self.config.max_kv_tokens is not None:
            tiers = [_at(tier, index).flatten(0, 1) for tier in self.tiers]
            keep = capped_keep(ranked, keep, tiers, self.config.max_kv_tokens)
        keep = keep.view_as(where)
        if self.alive is not None:
            gone = torch.where(closed & ~keep, index, self.alive.shape[1])[0]
            marks = torch.nn.functional.pad(self.alive, (0, 1)).to(where.device)
            self.alive = marks.scatter(1, gone, False)[:, :-1]
        keep = keep | ((where >= 0) & ~closed)
        return [part[:, :width] for part, width in zip(keep, widths, strict=True)]

    def _in_groups(self, tokens: Tensor, modality: Tensor, hop: Tensor) -> Tensor:
        """Long[L, B, groups, 2]: how many of the tokens each group has of each modality."""
        group = modality.long() if self.pooled else 2 * hop.long() + modality
        return counted(group, tokens, self.groups)

    def pinned_counts(self) -> list[list[list[int]]]:
        """[row][hop][text | vision] tokens of closed hops that no rate removes; one host copy."""
        log, hops = self.log, max(self.due)
        inside = self.pinned & (log.modality >= 0) & (log.hop < hops)
        found = counted(2 * log.hop.long() + log.modality, inside, hops).tolist()
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
        return (where >= 0) & (self.log.lookup(where)[1] < self._begun(where))

    def _begun(self, where: Tensor) -> Tensor:
        """Long[B, 1]: the hop that begins."""
        return torch.tensor(self.due).to(where.device, non_blocking=True)[:, None]

    def counts_left(self, where: Sequence[Tensor], keep: Sequence[Tensor]) -> Tensor:
        """Long[L, B, 3]: closed text, closed vision and all of what stays; layers of one device.

        Args:
            where: By layer Long[B, C] logical positions, -1 for holes.
            keep: By layer Bool[B, C].
        """
        columns, kept = _stacked(where, -1), _stacked(keep, 0)
        modality, hop = self.log.lookup(columns)
        closed = kept & (hop >= 0) & (hop < self._begun(columns))
        parts = [closed & (modality == TEXT), closed & (modality == VISION), kept]
        return torch.stack([part.sum(-1) for part in parts], dim=-1)


def _at(marks: Tensor, index: Tensor) -> Tensor:
    """Bool[L, B, C]: marks [B, N] of logical tokens where layers store them."""
    return marks.to(index.device).expand(len(index), -1, -1).gather(-1, index)


def _stacked(rows: Sequence[Tensor], fill: float) -> Tensor:
    """[L, B, C] of L tensors [B, C'], filled up to the widest."""
    width = max(row.shape[1] for row in rows)
    pads = [(0, width - row.shape[1]) for row in rows]
    return torch.stack(
        [
            torch.nn.functional.pad(row, pad, value=fill) if any(pad) else row
            for row, pad in zip(rows, pads, strict=True)
        ]
    )
