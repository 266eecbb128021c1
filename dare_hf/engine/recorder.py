"""Feeds the report from what forwards and compactions say, in host numbers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from dare_hf.hops.compaction import stored_counts
from dare_hf.report.builder import ReportBuilder
from dare_hf.report.flops import (
    attention_scorer_flops,
    key_norm_scorer_flops,
    kv_bytes,
    router_flops,
)
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import UNSCORED_LAYERS
from dare_hf.scoring.observe import WINDOW

if TYPE_CHECKING:
    from dare_hf.cache import DareCache
    from dare_hf.engine.controller import Controller
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.hops.compaction import Compaction
    from dare_hf.report import DareReport
    from dare_hf.report.report import Phase


class Recorder:
    """Counts one generate, or the bare forwards over one cache.

    Args:
        controller: The model's controller.
        cache: The cache the run writes, None without one; held weakly.
    """

    def __init__(self, controller: Controller, cache: DareCache | None) -> None:
        anatomy = controller.anatomy
        self.shapes = controller.shapes
        self.sources = anatomy.sources
        vocab = getattr(anatomy.text_config, "vocab_size", 0)
        self.builder = ReportBuilder(
            self.shapes,
            hidden=anatomy.text_config.hidden_size,
            vocab=vocab,
            itemsize=controller.dtype.itemsize,
        )
        self.scorer = controller.config.scorer
        self.cache = cache
        self._real: list[int] = []
        self._held: list[list[list[int]]] = []
        self._totals: list[list[int]] = []
        self._begun: list[int] = []
        self._kept: list[list[int]] = []
        self._frozen = False
        for note in controller.notes:
            self.builder.note(note)

    @property
    def cache(self) -> DareCache | None:
        """The cache of the run, while it is alive."""
        return self._cache() if self._cache is not None else None

    @cache.setter
    def cache(self, cache: DareCache | None) -> None:
        self._cache = weakref.ref(cache) if cache is not None else None

    def note_compaction(self, compaction: Compaction | None) -> None:
        """Take over what a compaction left; the hop's own span may still be added to it."""
        if compaction is None:
            return
        self._begun = compaction.hops
        self._totals = [list(t) for t in compaction.totals]
        if compaction.held:
            self._held = compaction.held

    def note_forward(self, context: ForwardContext) -> None:
        """Count one forward, after its layers ran."""
        layers = range(len(self.shapes))
        plans = [context.plans[i] for i in layers]
        running = {id(plan): plan.running(context) for plan in plans}
        queries = [running[id(plan)] for plan in plans]
        before = [context.cached_before.get(i) or [0] * context.batch for i in layers]
        own = [
            [c + q for c, q in zip(b, run, strict=True)]
            for b, run in zip(before, queries, strict=True)
        ]
        keys = [own[source] for source in self.sources]
        tails = {i: queries[i] for i in layers if plans[i].cut}
        if context.cache is not None:
            self._kept = [context.cache.layer(i).kept_host for i in layers]
        real = context.real_counts
        if len(self._real) != context.batch or context.past == 0:
            carried = [0] * context.batch
            if context.past and context.cache is not None:
                carried = [sum(map(sum, row)) for row in context.cache.log.counts_by_hop()]
                carried = [n - r for n, r in zip(carried, real, strict=True)]
            self._real = carried
        self._real = [a + b for a, b in zip(self._real, real, strict=True)]
        phase: Phase = "decode" if context.span is None else "prefill"
        self.builder.forward(queries, keys, real, self._real, phase, tails)
        self.builder.head(context.head_rows, phase)
        self._note_scoring(context, keys, phase)
        self._note_span(context)

    def _note_scoring(self, context: ForwardContext, keys: list[list[int]], phase: Phase) -> None:
        flops, tokens = 0, sum(context.real_counts)
        for index, plan in context.plans.items():
            reused = self.sources[index] != index or context.plans.get(index - 1) is plan
            if plan.scores is None or reused:
                continue
            shape = self.shapes[index]
            if self.scorer == "attention" and index >= UNSCORED_LAYERS:
                shape = self.shapes[index - 1]
                flops += sum(
                    attention_scorer_flops(shape, min(WINDOW, sum(row)), n)
                    for row, n in zip(context.plans[index - 1].kept, keys[index - 1], strict=True)
                )
            elif self.scorer in ("attention", "key_norm"):
                flops += key_norm_scorer_flops(shape, self.builder.hidden, tokens)
            elif self.scorer not in ("random", "position"):
                flops += router_flops(self.builder.hidden, tokens)
        self.builder.scorer(flops, phase)

    def _note_span(self, context: ForwardContext) -> None:
        """Add the span to what the layers hold; record each hop that begins."""
        batch = context.batch
        if context.past == 0:
            self._totals = [[0, 0] for _ in range(batch)]
            self._held = [[[0, 0] for _ in range(batch)] for _ in self.shapes]
        cache = context.cache
        uncounted = len(self._held) != len(self.shapes) or len(self._totals) != batch
        if uncounted and cache is not None:
            # a carried cache that nobody has counted in this run; its own span is in it already
            self._held, self._totals = stored_counts(cache, context.span_hop)
        elif context.span is not None:
            for row, counts in enumerate(context.counts):
                for m in (TEXT, VISION):
                    self._totals[row][m] += counts[m]
                    for layer, source in enumerate(self.sources):
                        self._held[layer][row][m] += context.plans[source].kept[row][m]
        if context.span_ends is not None and not any(context.span_hop):
            self._record([0] * batch)
        if any(self._begun):
            self._record(self._begun)
            self._begun = []

    def _record(self, hops: list[int]) -> None:
        first = not any(hops)
        for row, hop in enumerate(hops):
            if not (hop or first):
                continue
            for layer, source in enumerate(self.sources):
                for m in (TEXT, VISION):
                    held, total = self._held[source][row][m], self._totals[row][m]
                    self.builder.retention(hop, layer, m, held, total)

    def freeze(self, cache: DareCache | None = None) -> None:
        """Read the cache; where it is gone, what the host knew of it stands."""
        cache = cache or self.cache
        if cache is not None and self._real:
            kept = [cache.layer(i).kept_host for i in range(len(self.shapes))]
            self.builder.kv(cache.kv_bytes(), kept, self._real)
            self.builder.set_tokens(cache.log.counts_by_hop())
            self._frozen = True
        elif self._kept and not self._frozen:
            measured = kv_bytes(self.shapes, self._kept, self.builder.itemsize)
            self.builder.kv(measured, self._kept, self._real)

    def report(self, cache: DareCache | None = None) -> DareReport:
        """The report as it stands."""
        self.freeze(cache)
        return self.builder.snapshot()
