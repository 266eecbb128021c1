"""Feeds the report from what forwards and compactions say, in host numbers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from dare_hf.engine.excess import Excess
from dare_hf.engine.joined_steps import Steps, plan_quick_layers
from dare_hf.engine.peft_places import check_places
from dare_hf.hops.compaction import stored_counts
from dare_hf.report.builder import ReportBuilder
from dare_hf.report.flops import kv_bytes
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.scoring.scorer import Scoring

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.engine.controller import Controller
    from dare_hf.engine.counted_call import CountedCall
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.hops.compaction import Compaction, HeldCounts
    from dare_hf.hops.ledger import Ledger
    from dare_hf.report import DareReport
    from dare_hf.report.report import Phase


class Recorder:
    """Counts one generate, or the bare forwards over one cache.

    Args:
        controller: The model's controller.
        cache: The cache the run writes, None without one; held weakly.
        call: The generate that is counted, None for bare forwards.
    """

    def __init__(
        self, controller: Controller, cache: DareCache | None, call: CountedCall | None = None
    ) -> None:
        self._controller, self._call = weakref.ref(controller), call
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
        self.scorer = controller.scorer
        self.cache = cache
        self._real: list[int] = []
        self._tail = 0  # columns at the end in which every row has a sampled token
        self._held: list[list[list[int]]] = []
        self._ran: set[int] = set()
        self._totals: list[list[int]] = []
        self._begun: list[int] = []
        self._kept: list[list[int]] = []
        self._ledgers: list[Ledger | None] = []
        self._frozen = False
        self._steps: Steps | None = None
        self._carried: list[int] = []
        self._counted: tuple[HeldCounts, list[list[int]]] | None = None
        for note in (*controller.notes, *controller.settings.notes):
            self.builder.note(note)
        self._freezes = controller.config.freezes
        whole = controller._local.whole or self._freezes
        self._excess = None if whole else Excess(controller.settings, self.builder.note)

    @classmethod
    def of(
        cls, controller: Controller, cache: DareCache | None, call: CountedCall | None
    ) -> Recorder:
        """Who counts a forward: one for each sequence of a generate, and of bare forwards.

        Args:
            controller: The model's controller.
            cache: The cache of the forward, by which its sequence is known.
            call: The generate it is a step of.

        Raises:
            UnsupportedModelError: An adapter of peft tells tokens by their place.
        """
        known: Any = cache.recorder if cache is not None else call and call.recorder
        if not isinstance(known, cls) or known._controller() is not controller:
            known = None
        elif call is not None:
            known = known if known._call is call else None
        elif cache is None or not cache.get_seq_length():
            known = None
        if known is None:
            check_places(controller.anatomy.layers)  # adapters come and go
        recorder = known or cls(controller, cache, call)
        if call is not None:
            call.recorder = call.recorder or recorder
        if cache is not None:
            cache.recorder = recorder
        return recorder

    @property
    def cache(self) -> DareCache | None:
        """The cache of the run, while it is alive."""
        return self._cache() if self._cache is not None else None

    @cache.setter
    def cache(self, cache: DareCache | None) -> None:
        self._cache = weakref.ref(cache) if cache is not None else None

    def note_compaction(self, compaction: Compaction) -> None:
        """Take over what a compaction left; the hop's own span may still be added to it."""
        self._count_steps()
        self._begun = compaction.hops
        self._totals = [list(t) for t in compaction.totals]
        if compaction.held:
            self._held = self._padded(compaction.held)

    def reorder(self, indices: Tensor) -> None:
        """Take the rows named by `indices` [B'], as the cache does."""
        self._count_steps()
        by_row = [self._real, self._totals, self._begun, *self._held]
        alike = all(row == rows[0] for rows in by_row for row in rows)
        self._take([0] * len(indices) if alike else indices.tolist())

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        self._count_steps()
        self._take([row for row in range(len(self._real)) for _ in range(repeats)])

    def crop(self, columns: int) -> None:
        """Forget the last `columns` logical tokens; beyond sampled ones the cache is asked anew."""
        self._count_steps()
        if columns <= self._tail:
            self._tail -= columns
            self._real = [real - columns for real in self._real]
        else:
            self._tail, self._real, self._totals, self._held = 0, [], [], []

    def _take(self, order: list[int]) -> None:
        if not self._real:
            return
        self._real = [self._real[i] for i in order]
        self._begun = [self._begun[i] for i in order] if self._begun else []
        self._totals = [list(self._totals[i]) for i in order] if self._totals else []
        self._held = [[list(rows[i]) for i in order] for rows in self._held]

    def read(self, context: ForwardContext) -> None:
        """Ask the device what only it knows, after the layers ran and before `note_forward`.

        All that can fail is here, so that a forward is counted once or not at all.
        """
        batch, cache = context.batch, context.cache
        self._carried, self._counted = [0] * batch, None
        if not context.past or cache is None:
            return
        if len(self._real) != batch:
            pairs = zip(_real(cache), context.real_counts, strict=True)
            self._carried = [every - real for every, real in pairs]
        if len(self._held) != len(self.shapes) or len(self._totals) != batch:
            # a carried cache that nobody has counted in this run; its own span is in it already
            self._counted = stored_counts(cache, context.span_hop)

    def note_forward(self, run: CompactRun) -> None:
        """Count one forward, from host numbers alone; its device was asked by `read`."""
        context, plans = run.context, run.plans
        if run.step and not plans:
            self._join_steps(run)
            return
        self._count_steps()
        if run.step:
            plan_quick_layers(run)
        layers = range(len(self.shapes))
        self._ran = set(plans)
        running = {id(plan): plan.running(context) for plan in plans.values()}
        nothing = [0] * context.batch
        queries = [running[id(plans[i])] if i in plans else nothing for i in layers]
        before = [run.cached_before.get(i) or nothing for i in layers]
        real = context.real_counts
        frozen = {i for i, plan in plans.items() if self._freezes and not plan.plain}
        brought = [real if i in frozen else queries[i] for i in layers]
        own = [
            [c + q for c, q in zip(b, run, strict=True)]
            for b, run in zip(before, brought, strict=True)
        ]
        keys = [own[source] for source in self.sources]
        # what did not run (transformers leaves after config.num_hidden_layers) is no loss of DARE's
        tails = {i: queries[i] for i in layers if i not in plans or plans[i].cut}
        if context.cache is not None:
            self._kept = _kept(context.cache, len(self.shapes))
            self._ledgers = _ledgers(context.cache)
        if len(self._real) != context.batch or context.past == 0:
            self._real = self._carried
        self._real = [a + b for a, b in zip(self._real, real, strict=True)]
        sampled = min(context.sampled) if context.valid is None else 0
        self._tail = sampled if sampled < context.length else self._tail + sampled
        phase: Phase = "decode" if context.span is None else "prefill"
        self.builder.forward(queries, keys, real, self._real, phase, tails)
        for layer in frozen:
            self.builder.frozen(layer, sum(real))
        for layer, plan in plans.items():
            if plan.ran is not None:
                self.builder.skipped(layer, sum(context.sampled) - sum(plan.ran))
        self.builder.head(context.head_rows, phase)
        self._note_scoring(run, keys, phase)
        self._note_span(run)

    def _join_steps(self, run: CompactRun) -> None:
        """Add a step to those that go on.

        Layers hold one token more after each, so that nothing is to be looked at before the end.
        """
        context = run.context
        begins = any(self._begun) or self._counted is not None
        if begins or self._steps is None or not self._steps.goes_on(context):
            self._count_steps()
            if len(self._real) != context.batch:
                self._real = self._carried
            assert context.cache is not None
            steps = Steps.begun(context)
            # what a report reads first: an interrupt may come between any two lines
            self._ran, self._ledgers = set(steps.kept), _ledgers(context.cache)
            self._steps = steps
            self._note_span(run)
        self._steps.count += 1

    def _count_steps(self) -> None:
        """Count the steps that were joined."""
        steps, self._steps = self._steps, None
        if steps is None:
            return
        n, kept = steps.count, steps.kept
        shapes = [self.shapes[i] for i in kept]
        self.builder.steps(shapes, list(kept.values()), self._real, n)
        self.builder.head(n * steps.head_rows, "decode")
        self._real, self._tail = [real + n for real in self._real], self._tail + n
        self._kept += [[]] * (len(self.shapes) - len(self._kept))
        for i, rows in kept.items():
            self._kept[i] = [row + n for row in rows]

    def note_scored(self, layer: int, tokens: int) -> None:
        """Count the scoring of sampled tokens whose hop has closed."""
        work = Scoring(self.shapes, self.builder.hidden, layer, tokens)
        self.builder.scorer(self.scorer.flops(work), "decode")

    def _note_scoring(self, run: CompactRun, keys: list[list[int]], phase: Phase) -> None:
        context, plans = run.context, run.plans
        flops, tokens = 0, sum(context.real_counts)
        for index, plan in plans.items():
            reused = self.sources[index] != index or plans.get(index - 1) is plan
            if plan.scores is None or reused:
                continue
            before = plans[index - 1].kept if index else []
            ran, seen = [sum(row) for row in before], keys[max(index - 1, 0)]
            numbers = (self.shapes, self.builder.hidden, index, tokens, ran, seen)
            flops += self.scorer.flops(Scoring(*numbers, context.counts))
        self.builder.scorer(flops, phase)

    def _note_span(self, run: CompactRun) -> None:
        """Add the span to what the layers hold; record each hop that begins."""
        context, plans = run.context, run.plans
        batch = context.batch
        if context.past == 0:
            self._totals = [[0, 0] for _ in range(batch)]
            self._held = [[[0, 0] for _ in range(batch)] for _ in self.shapes]
        if self._counted is not None:
            held, self._totals = self._counted
            self._held = self._padded(held)
        elif context.span is not None:
            for row, counts in enumerate(context.counts):
                for m in (TEXT, VISION):
                    self._totals[row][m] += counts[m]
                    for layer in plans:
                        plan = plans[self.sources[layer]]
                        stored = counts[m] if self._freezes else plan.kept[row][m]
                        self._held[layer][row][m] += stored
        if context.span_ends is not None and not any(context.span_hop):
            self._record([0] * batch)
            if self._excess is not None:
                ran = [self._held[self.sources[layer]] for layer in self._ran]
                self._excess.prompt(self._totals, ran)
        elif self._excess is not None and context.span is not None and any(context.span_hop):
            ran = [plans[self.sources[layer]].kept for layer in plans]
            self._excess.injected(context.span_hop, context.counts, ran)
        if any(self._begun):
            self._record(self._begun)
            self._begun = []

    def _padded(self, held: HeldCounts) -> HeldCounts:
        """With the layers that no forward has come to."""
        more = len(self.shapes) - len(held)
        return held + [[[0, 0] for _ in self._totals] for _ in range(more)]

    def _record(self, hops: list[int]) -> None:
        first = not any(hops)
        for row, hop in enumerate(hops):
            if not (hop or first):
                continue
            for layer in self._ran:
                source = self.sources[layer]
                for m in (TEXT, VISION):
                    held, total = self._held[source][row][m], self._totals[row][m]
                    self.builder.retention(hop, layer, m, held, total)

    def freeze(self, cache: DareCache | None = None) -> None:
        """Read the cache; where it is gone, what the host knew of it stands."""
        self._count_steps()
        cache = cache or self.cache
        if cache is not None and self._ran:
            counts = cache.log.counts_by_hop()
            real = [sum(map(sum, row)) for row in counts]
            self._kept, self._ledgers = _kept(cache, len(self.shapes)), _ledgers(cache)
            self.builder.kv(cache.kv_bytes(), self._predicted(real), self._real or real)
            self.builder.set_tokens(counts)
            self._frozen = True
        elif self._kept and not self._frozen:
            measured = kv_bytes(self.shapes, self._kept, self.builder.itemsize)
            self.builder.kv(measured, self._predicted(self._real), self._real)

    def _predicted(self, real: list[int]) -> list[list[int]]:
        """[layers][rows] tokens by counts alone; [] for a layer that no forward has come to.

        Args:
            real: Real tokens of each row, pruned ones counted.
        """
        return [
            [
                held if ledger is None else ledger.layers[layer].most + count - ledger.seen
                for held, ledger, count in zip(kept, self._ledgers, real, strict=True)
            ]
            if kept
            else []
            for layer, kept in enumerate(self._kept)
        ]

    def report(self, cache: DareCache | None = None) -> DareReport:
        """The report as it stands."""
        self.freeze(cache)
        return self.builder.snapshot()


def _real(cache: DareCache) -> list[int]:
    """[rows] real tokens of each sequence, pruned ones counted."""
    return [sum(map(sum, row)) for row in cache.log.counts_by_hop()]


def _kept(cache: DareCache, layers: int) -> list[list[int]]:
    """[layers][rows] real tokens stored; [] for a layer that no forward has come to."""
    kept = [slot.kept_host for slot in cache.stored]
    return kept + [[] for _ in range(layers - len(kept))]


def _ledgers(cache: DareCache) -> list[Ledger | None]:
    return list(cache.hop_counters.ledgers)
