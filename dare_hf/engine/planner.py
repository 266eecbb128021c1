"""Making the plan of a layer: which tokens run it, chosen from their scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dare_hf.forward.plan import Plan
from dare_hf.routing.clusters import merged_tokens, room_for_clusters
from dare_hf.routing.counts import kept_counts, span_budgets
from dare_hf.routing.first import span_keep
from dare_hf.routing.kinds import VISION
from dare_hf.routing.selection import (
    competitors,
    gather_index,
    hop_prefix_mask,
    kept_columns,
)
from dare_hf.routing.thresholds import below

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.config import DareConfig
    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.routing.retention import RetentionTable

    Rows = list[list[int]]


class Planner:
    """Makes a layer's plan from rates, counts and scores.

    Args:
        config: The configuration.
        table: The rates of the model.
    """

    def __init__(self, config: DareConfig, table: RetentionTable) -> None:
        self.config, self.table, self.drops = config, table, config.drops

    def budgets(self, context: ForwardContext, layer: int) -> list[list[int]]:
        """Host budgets per row, [text, vision], before forced tokens and survivors."""
        equal = self.config.batch_budget == "equal"
        return span_budgets(self.table, layer, context.span_hop, context.counts, equal=equal)

    def prunes(self, run: CompactRun, layer: int, before: Plan | None) -> tuple[bool, ...]:
        """Per row whether the layer chooses among its tokens of the span; () where it never does.

        A row's answer does not depend on the others, but under batch_budget="equal".
        """
        context = run.context
        if context.span is None:
            return ()
        pairs = zip(run.budgets[layer], context.counts, strict=True)
        rows = tuple(budget != count for budget, count in pairs)
        if self.drops and before is not None and before.chosen:
            rows = tuple(a or b for a, b in zip(rows, before.chosen, strict=True))
        return rows if any(rows) else ()

    def plan(
        self,
        run: CompactRun,
        layer: int,
        scores: Tensor,
        before: Plan | None,
        hidden: Tensor | None = None,
    ) -> Plan:
        """Select the tokens of `layer`.

        Args:
            run: The forward.
            layer: The layer that selects.
            scores: Float32[B, S].
            before: The plan of the layer before, for pruned="drop".
            hidden: [B, S, D] what enters the layer, for `recycle`.
        """
        context, rows = run.context, run.budgets[layer]
        span, forced_mask = context.span_and_forced()
        available, candidates = context.counts, span
        if before is not None and before.keep is not None and self.drops:
            available, candidates = before.kept, span & before.keep
        kept = list(map(kept_counts, rows, context.forced_counts, available))
        clusters = [0] * len(kept)
        if self.config.recycle:
            clusters = self._clusters(kept, context.forced_counts, available)
        chosen = [[text, vision - c] for (text, vision), c in zip(kept, clusters, strict=True)]
        kinds, shares = context.modality, (self.config.uniform_share, self.config.recent_share)
        if candidates is span and run.competitors is None:
            run.competitors = competitors(kinds, span, forced_mask)
        groups = run.competitors if candidates is span else None
        keep = span_keep(scores, kinds, candidates, forced_mask, chosen, shares, groups)
        merged = None
        if any(clusters) and hidden is not None:
            merged = merged_tokens(layer, hidden, scores, kinds, candidates, keep, clusters)
        if merged is not None:
            there = torch.tensor(True, device=keep.device)
            keep = keep.index_put((merged.rows, merged.columns), there)
        plan = self._finish(context, keep, kept, scores)
        return replace(plan, chosen=self.prunes(run, layer, before), merged=merged)

    def skip(self, run: CompactRun, plan: Plan, scores: Tensor, thresholds: Tensor) -> Plan:
        """The plan without sampled tokens whose score is under the layer's threshold.

        Args:
            run: The forward.
            plan: What the layer runs of the span, and all sampled tokens.
            scores: Float32[B, S].
            thresholds: Float32[hops, 2] of the layer.

        Source: docs/method.md, section 6.
        """
        context = run.context
        real = context.modality >= 0
        sampled = real if context.span is None else real & ~context.span
        runs = self._never_skips(run)
        runs = runs | ~below(scores, thresholds, context.token_hop, context.modality)
        # which rows have work is what the host has to know of each layer
        ran = (sampled & runs).sum(1).tolist()
        if ran == context.sampled:
            return plan
        keep = real if plan.keep is None else plan.keep
        return self._finish(context, keep & (runs | ~sampled), plan.kept, plan.scores, ran)

    def _never_skips(self, run: CompactRun) -> Tensor:
        """Bool[B, S]: the first tokens of each hop, and ids that are always kept."""
        if run.never_skips is None:
            context = run.context
            modality, hop = context.modality, context.token_hop
            if context.cache is not None and context.past:
                log = context.cache.log
                modality = torch.cat([log.modality.to(modality), modality], 1)
                hop = torch.cat([log.hop.to(hop), hop], 1)
            first = hop_prefix_mask(modality >= 0, hop, max(self.config.prefix_tokens, 1))
            first = first[:, first.shape[1] - context.length :]
            run.never_skips = first if context.always is None else first | context.always
        return run.never_skips

    def _clusters(self, kept: Rows, forced: Rows, available: Rows) -> list[int]:
        """Per row how many of its vision budget are clusters of what is dropped."""
        rows = zip(kept, forced, available, strict=True)
        return [
            min(room_for_clusters(k[VISION], n[VISION]), k[VISION] - f[VISION]) for k, f, n in rows
        ]

    def _finish(
        self,
        context: ForwardContext,
        keep: Tensor,
        kept: list[list[int]],
        scores: Tensor | None,
        ran: list[int] | None = None,
    ) -> Plan:
        """Turn a keep mask into the layer's columns; sampled tokens run unless `ran` says not."""
        if any(context.sampled) and ran is None:
            keep = keep | ((context.modality >= 0) & ~context.span_and_forced()[0])
        sampled = context.sampled if ran is None else ran
        running = [sum(k) + s for k, s in zip(kept, sampled, strict=True)]
        width = max(*running, 1) if len(running) > 1 else max(running[0], 1)
        if width == context.length:
            full = min(running) == width
            live = None if full else keep
            return Plan(kept, width, live=live, keep=keep, scores=scores, ran=ran)
        if min(running) == width:
            return Plan(kept, width, kept_columns(keep, width), None, keep, scores, ran)
        index, live = gather_index(keep, width)
        return Plan(kept, width, index, live, keep, scores, ran)
