"""The plan of a layer: which tokens of this forward run it, chosen from their scores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.routing.clusters import Merged, merged_tokens, room_for_clusters
from dare_hf.routing.counts import kept_counts, span_budgets
from dare_hf.routing.first import taken_first
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.selection import (
    competitors,
    gather_index,
    hop_prefix_mask,
    keep_mask,
    kept_columns,
    last_columns,
)
from dare_hf.routing.thresholds import below

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.config import DareConfig
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.routing.retention import RetentionTable

    Rows = list[list[int]]


@dataclass
class Plan:
    """Which tokens run; shared by the layers that reuse it.

    Attributes:
        kept: Per row the real [text, vision] span tokens that run.
        width: K, columns the layer sees.
        index: Long[B, K] running columns in position order, fills first; None when all S run.
        live: Bool[B, K], False for pads and for tokens that only fill a ragged row; None if all
            are live.
        keep: Bool[B, S] the running tokens; None when all real ones run.
        scores: Float32[B, S] they were chosen by, None where none were needed.
        ran: Per row the sampled tokens that run; None where all do.
        chosen: Per row whether anything was chosen in it; () where nothing was in any.
        merged: What takes the places of some of the running tokens where this layer begins.
        cut: Whether transformers hands the layer its last columns only.
        gathered: What was gathered for this plan, by argument name and identity; None once the
            forward is over (kept, it would hold the very tensors a recomputation is found by).
    """

    kept: list[list[int]]
    width: int
    index: Tensor | None = None
    live: Tensor | None = None
    keep: Tensor | None = None
    scores: Tensor | None = None
    ran: list[int] | None = None
    chosen: tuple[bool, ...] = ()
    merged: Merged | None = None
    cut: bool = False
    gathered: dict[Any, tuple[Any, Any]] | None = field(default_factory=dict)
    _queries: tuple[Tensor, Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether the layer runs on HF's own tensors: nothing pruned, only pads may be dead."""
        return self.keep is None

    def inputs(self, hidden: Tensor, layer: int) -> Tensor:
        """What `layer` reads: [B, S, D] with the merged vectors where they are to be."""
        if self.merged is None or self.merged.layer != layer:
            return hidden
        places = (self.merged.rows.to(hidden.device), self.merged.columns.to(hidden.device))
        return hidden.index_put(places, self.merged.vectors.to(hidden))

    def rows(self, context: ForwardContext) -> Tensor:
        """Long[B|1, K]: running columns among the S new ones."""
        if self.index is not None:
            return self.index
        return torch.arange(context.length, device=context.device)[None]

    def running(self, context: ForwardContext) -> list[int]:
        """Real tokens per row that run, sampled ones included."""
        sampled = context.sampled if self.ran is None else self.ran
        return [sum(k) + s for k, s in zip(self.kept, sampled, strict=True)]

    def idle(self, context: ForwardContext) -> bool:
        """Whether no token runs: all that the forward brings are sampled, and skip."""
        return self.ran is not None and not any(self.running(context))

    def take(self, tensor: Tensor, fill: Any = None) -> Tensor:
        """[B, S] brought to [B, K]; dead columns take `fill` where it is given."""
        taken = tensor if self.index is None else tensor.gather(1, self.index)
        if fill is None or self.live is None:
            return taken
        return taken.masked_fill(~self.live, fill)

    def span_live(self, context: ForwardContext) -> Tensor:
        """Bool[B, K]: running tokens that belong to the span."""
        span = self.take(context.span_and_forced()[0])
        return span if self.live is None else span & self.live

    def queries(self, context: ForwardContext, window: int) -> tuple[Tensor, Tensor]:
        """The last `window` running text tokens of the span, any modality where text is fewer.

        Returns:
            Long[B, W] their columns among the K, and Bool[B, W] which of them there are.
        """
        if self._queries is None:
            span = self.span_live(context)
            text = span & (self.take(context.modality) == TEXT)
            enough = text.sum(1, keepdim=True) >= window
            eligible = torch.where(enough, text, span)
            self._queries = last_columns(eligible, window)
        return self._queries

    def tail(self, context: ForwardContext, width: int) -> Plan:
        """The plan of a layer that transformers hands the last `width` columns only.

        They all run: the span's last token is forced, and sampled ones follow it.
        """
        last = torch.arange(context.length - width, context.length, device=context.device)
        index = last.expand(context.batch, -1)
        live = None if context.valid is None else context.valid[:, -width:]
        ends = [[int(any(row)), 0] for row in context.counts]
        real = context.modality >= 0
        return Plan(ends, width, index, live, real, self.scores, cut=True, gathered=None)

    def spread(self, scores: Tensor, previous: Tensor | None, context: ForwardContext) -> Tensor:
        """[B, K] scores written into the full [B, S]; tokens that did not run keep their last."""
        if self.index is None and self.live is None:
            return scores
        shape = (context.batch, context.length)
        base = scores.new_zeros(shape) if previous is None else previous
        if self.live is not None:
            scores = torch.where(self.live, scores, self.take(base))
        return scores if self.index is None else base.scatter(1, self.index, scores)


def keep_all(context: ForwardContext) -> Plan:
    """The plan under which every real token runs; one for all layers of a forward."""
    if context.full_plan is None:
        counts = [list(c) for c in context.counts]
        context.full_plan = Plan(kept=counts, width=context.length, live=context.valid)
    return context.full_plan


class Planner:
    """Makes a layer's plan from rates, counts and scores.

    Args:
        config: The configuration.
        table: The rates of the model.
    """

    def __init__(self, config: DareConfig, table: RetentionTable) -> None:
        self.config, self.table = config, table

    def budgets(self, context: ForwardContext, layer: int) -> list[list[int]]:
        """Host budgets per row, [text, vision], before forced tokens and survivors."""
        equal = self.config.batch_budget == "equal"
        return span_budgets(self.table, layer, context.span_hop, context.counts, equal=equal)

    def prunes(self, context: ForwardContext, layer: int, before: Plan | None) -> tuple[bool, ...]:
        """Per row whether the layer chooses among its tokens of the span; () where it never does.

        A row's answer does not depend on the others, but under batch_budget="equal".
        """
        if context.span is None:
            return ()
        pairs = zip(self.budgets(context, layer), context.counts, strict=True)
        rows = tuple(budget != count for budget, count in pairs)
        if self.config.pruned == "drop" and before is not None and before.chosen:
            rows = tuple(a or b for a, b in zip(rows, before.chosen, strict=True))
        return rows if any(rows) else ()

    def plan(
        self,
        context: ForwardContext,
        layer: int,
        scores: Tensor,
        before: Plan | None,
        hidden: Tensor | None = None,
    ) -> Plan:
        """Select the tokens of `layer`.

        Args:
            context: The forward.
            layer: The layer that selects.
            scores: Float32[B, S].
            before: The plan of the layer before, for pruned="drop".
            hidden: [B, S, D] what enters the layer, for `recycle`.
        """
        rows = self.budgets(context, layer)
        span, forced_mask = context.span_and_forced()
        available, candidates = context.counts, span
        if before is not None and before.keep is not None and self.config.pruned == "drop":
            available, candidates = before.kept, span & before.keep
        kept = list(map(kept_counts, rows, context.forced_counts, available))
        device = context.device
        clusters = self._clusters(kept, context.forced_counts, available)
        chosen = [[text, vision - c] for (text, vision), c in zip(kept, clusters, strict=True)]
        wanted = torch.tensor(chosen).to(device, non_blocking=True)
        shares = self.config.uniform_share, self.config.recent_share
        first = taken_first(context.modality, candidates, forced_mask, wanted, *shares)
        largest = (max(k[TEXT] for k in kept), max(k[VISION] for k in kept))
        if candidates is span and context.competitors is None:
            context.competitors = competitors(context.modality, span, forced_mask)
        groups = context.competitors if candidates is span else None
        keep = keep_mask(
            scores, context.modality, candidates, forced_mask, wanted, largest, first, groups
        )
        merged = None
        if any(clusters) and hidden is not None:
            kinds = context.modality
            merged = merged_tokens(layer, hidden, scores, kinds, candidates, keep, clusters)
        if merged is not None:
            keep = keep.index_put((merged.rows, merged.columns), torch.tensor(True, device=device))
        plan = self._finish(context, keep, kept, scores)
        return replace(plan, chosen=self.prunes(context, layer, before), merged=merged)

    def skip(self, context: ForwardContext, plan: Plan, scores: Tensor, thresholds: Tensor) -> Plan:
        """The plan without sampled tokens whose score is under the layer's threshold.

        Args:
            context: The forward.
            plan: What the layer runs of the span, and all sampled tokens.
            scores: Float32[B, S].
            thresholds: Float32[hops, 2] of the layer.

        Source: docs/method.md, section 6.
        """
        real = context.modality >= 0
        sampled = real if context.span is None else real & ~context.span
        runs = self._never_skips(context)
        runs = runs | ~below(scores, thresholds, context.token_hop, context.modality)
        # which rows have work is what the host has to know of each layer
        ran = (sampled & runs).sum(1).tolist()
        if ran == context.sampled:
            return plan
        keep = real if plan.keep is None else plan.keep
        return self._finish(context, keep & (runs | ~sampled), plan.kept, plan.scores, ran)

    def _never_skips(self, context: ForwardContext) -> Tensor:
        """Bool[B, S]: the first tokens of each hop, and ids that are always kept."""
        if context.never_skips is None:
            modality, hop = context.modality, context.token_hop
            if context.cache is not None and context.past:
                log = context.cache.log
                modality = torch.cat([log.modality.to(modality), modality], 1)
                hop = torch.cat([log.hop.to(hop), hop], 1)
            first = hop_prefix_mask(modality >= 0, hop, max(self.config.prefix_tokens, 1))
            first = first[:, first.shape[1] - context.length :]
            context.never_skips = first if context.always is None else first | context.always
        return context.never_skips

    def _clusters(self, kept: Rows, forced: Rows, available: Rows) -> list[int]:
        """Per row how many of its vision budget are clusters of what is dropped."""
        if not self.config.recycle:
            return [0] * len(kept)
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
