"""The controller of one model: opens a context per forward, keeps what outlives it."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.architectures.locate import attention_of
from dare_hf.architectures.tensor_parallel import kv_shares, share_note
from dare_hf.cache import DareCache, TokenLog
from dare_hf.cache.refused import check_caches
from dare_hf.compat import CACHE, CACHE_NAMES, checkpoints, named_cache
from dare_hf.engine.attention_functions import check_attention
from dare_hf.engine.compact_run import CompactRun
from dare_hf.engine.newest_run import NewestRun
from dare_hf.engine.recorded_graph import check_recorded
from dare_hf.engine.recorder import Recorder
from dare_hf.engine.settings import stored_shapes
from dare_hf.engine.step import (
    MOST_UNSCORED,
    hides_pads_only,
    is_step,
    most_unscored,
    score_later,
)
from dare_hf.engine.thread_state import OpenForward, Repeats
from dare_hf.engine.training_forwards import TrainingForwards
from dare_hf.forward.hop_closing import close_context
from dare_hf.forward.inputs import open_context, without_own
from dare_hf.forward.packed import check_packed
from dare_hf.hops.compaction import compact, due_rows
from dare_hf.hops.in_forward import InnerHops
from dare_hf.hops.ledger import LedgerRules
from dare_hf.hops.ledger_rows import know_rows, note_span
from dare_hf.simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.counted_call import CountedCall
    from dare_hf.engine.settings import Settings
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.hops.compaction import Compaction
    from dare_hf.report.flops import LayerShape


class Controller(TrainingForwards):
    """What DARE knows about one model; reached from each routed layer.

    Attributes:
        newest: The newest run that has finished, in whatever thread.
    """

    def __init__(
        self,
        settings: Settings,
        anatomy: Anatomy,
        base_implementation: str,
        exempt: Mapping[int, int],
    ) -> None:
        super().__init__(settings, anatomy, base_implementation, exempt)
        self._shares = kv_shares(anatomy)
        self.notes = share_note(self._shares)
        self.token_kwargs = dict(anatomy.spec.token_kwargs)
        found = [getattr(attention_of(m), "expand_kv", None) for m in anatomy.layers]
        self._expanders = found if any(found) else None
        self.newest = NewestRun()
        self._recompute = Repeats()

    @property
    def shapes(self) -> list[LayerShape]:
        """What each layer costs now: adapters of peft come and go."""
        return stored_shapes(self.anatomy, self._shares)

    @property
    def disabled(self) -> bool:
        """Whether the model is the plain one now: `dare_disabled` in this thread, or peft."""
        switched_off = self.adapter is not None and not self.adapter.running
        return switched_off or self._local.disabled > 0

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Run the plain model in this thread."""
        self._local.disabled += 1
        try:
            yield
        finally:
            self._local.disabled -= 1

    # what the routed layers ask

    @property
    def run(self) -> CompactRun | Simulation | None:
        """The forward this thread is in."""
        return self._local.forwards[-1].run if self._local.forwards else None

    @property
    def context(self) -> ForwardContext | None:
        """Its facts."""
        return None if self.run is None else self.run.context

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return next(p.dtype for p in self.anatomy.layers[0].parameters() if p.is_floating_point())

    def find_run(self, kwargs: Mapping[str, Any]) -> CompactRun | Simulation | None:
        """The open forward, or the closed one that gradient checkpointing repeats a layer of."""
        if self._local.forwards:
            return self._local.forwards[-1].run
        return None if self.disabled else self._recompute.find(kwargs)

    def remember_run(self, kwargs: Mapping[str, Any], run: CompactRun | Simulation) -> None:
        """Note which forward these layer arguments belong to, for a later recomputation."""
        self._recompute.remember(kwargs, run)

    # forwards

    def before_forward(self, module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Open the context of a forward of `module`; its keyword arguments may change.

        Raises:
            DareInputError: A foreign cache, or modality that cannot be told.
            DareStateError: The attention implementation was changed since DARE was put on, or the
            forward is recorded as a graph.
        """
        self._drop_stale(module)
        if self.disabled and all(kwargs.get(name) is not None for name in CACHE_NAMES):
            return without_own(kwargs)  # peft's prefix tuning; transformers reads one of them
        kwargs = named_cache(kwargs)
        if isinstance(given := kwargs.get(CACHE), DareCache):
            given.settle()  # what an interrupt has left, also for a forward without DARE
        if self.disabled:
            self.newest.note_uncounted()
        if self.disabled or self._local.forwards:
            return without_own(kwargs)
        check_recorded()
        self.follow_adapter()
        check_caches(kwargs)
        check_attention(self.anatomy.text_config, self.base_implementation)
        call = self._call_of(kwargs)
        if call is None:
            check_packed(kwargs)
        taught = self._taught(kwargs, call)
        if call is None and self._open_simulation(module, kwargs, taught):
            self._keep_span(kwargs)
            return without_own(kwargs) | {"use_cache": False, CACHE: None}
        cache = self._cache_for(kwargs)
        started = time.perf_counter()
        with nullcontext() if cache is None else cache.all_or_nothing():
            context = open_context(taught, cache, self.rules, call)
            recorder = Recorder.of(self, cache, call)
            inside = InnerHops.inside(context, self.config)
            run = CompactRun(
                context,
                routing=self.in_use,
                anatomy=self.anatomy,
                exempt=self.exempt,
                call=call,
                whole=self._local.whole > 0,
            )
            if cache is not None:
                know_rows(cache, len(self.anatomy.layers))
                if inside or most_unscored(cache) >= MOST_UNSCORED:
                    score_later(cache, self, recorder.note_scored)
                self._compact(cache, recorder)
                ends = call is not None and call.recorder is recorder
                run.step = not inside and is_step(context, kwargs, self, ends=ends)
                if run.step:
                    mask = kwargs.get("attention_mask")
                    run.hides_pads_only = hides_pads_only(context, mask, call)
                cache.begin(step=run.step)
            if inside:
                log = cache.log if cache is not None else TokenLog()
                run.inner_hops = InnerHops(context, log, self.config, self.table)
        self._local.forwards.append(OpenForward(module, run, started, recorder))
        self._keep_span(kwargs)
        return without_own(kwargs)

    def _compact(
        self, cache: DareCache, recorder: Recorder, left: list[Compaction] | None = None
    ) -> None:
        """Serve the hops that have begun; what each leaves goes to the recorder, or to `left`."""
        if any(due_rows(cache)):
            score_later(cache, self, recorder.note_scored)
        note = recorder.note_compaction if left is None else left.append
        compact(cache, self.config, self.table, self._expanders, note, self.exempt)

    def _keep_span(self, kwargs: dict[str, Any]) -> None:
        """Let no layer be cut to a part of the span, from which no token could be chosen.

        Of a number, layers that share keys compute the last `logits_to_keep` columns only
        (transformers, Gemma 4); of indices they compute all. One column, or what was sampled after
        it, runs in any case.
        """
        keep, run = kwargs.get("logits_to_keep"), self.run
        if not isinstance(keep, int) or not keep or run is None or not self.anatomy.shares:
            return
        context = run.context
        # nor can a flex mask be cut (Gemma 4 asks for the implementation by its own name)
        flex = self.base_implementation.endswith("flex_attention")
        if flex or isinstance(run, Simulation) or keep > max(context.sampled) + 1:
            last = torch.arange(context.length, device=context.device)[-keep:]
            kwargs["logits_to_keep"] = last

    def _drop_stale(self, module: Any) -> None:
        """Forget forwards that an interrupt (KeyboardInterrupt) left open."""
        opened = [entry.module is module for entry in self._local.forwards]
        if any(opened):
            self.drop_forwards(opened.index(True))

    def drop_forwards(self, depth: int) -> None:
        """Roll back and forget open forwards beyond the first `depth`."""
        while len(self._local.forwards) > depth:
            run = self._local.forwards.pop().run
            run.release()
            if (cache := run.context.cache) is not None:
                cache.rollback()

    def after_forward(self, module: Any, *, failed: bool) -> None:
        """Close the context that `module` opened; a failed forward leaves the cache as it was."""
        if not self._local.forwards or self._local.forwards[-1].module is not module:
            return
        entry = self._local.forwards[-1]
        try:
            self._close(entry, failed=failed)
        except BaseException:  # an interrupt may come between any two lines
            if (cache := entry.run.context.cache) is not None:
                cache.rollback()
            raise
        finally:
            self._local.forwards.pop()

    def _close(self, entry: OpenForward, *, failed: bool) -> None:
        run, context, cache = entry.run, entry.run.context, entry.run.context.cache
        if isinstance(run, Simulation):
            if not failed:
                self._local.record = run.record
                run.learn_updates()
            run.release()
            self.newest.note_uncounted()
            return
        run.release()
        if failed:
            if cache is not None:
                cache.rollback()
            return
        recorder = entry.recorder
        assert recorder is not None
        ended = not run.whole and context.span_ends is not None and not any(context.sampled)
        left: list[Compaction] = []
        with nullcontext() if cache is None else cache.all_or_nothing():
            close_context(context)
            note_span(context, LedgerRules(run.config, run.table, run.exempt))
            recorder.read(context)
            if run.config.max_kv_tokens is not None and cache is not None and ended:
                self._compact(cache, recorder, left)
        # Nothing fails from here on: a forward whose caller got an error has left no trace.
        if cache is not None:
            cache.commit()
        recorder.note_forward(run)
        for compaction in left:
            recorder.note_compaction(compaction)
        run.context = replace(context, cache=None)
        if run.call is None:
            recorder.builder.seconds(time.perf_counter() - entry.started)
            if self._local.calls:
                self._local.calls[-1].other = recorder
            else:
                self.newest.finish(recorder)

    def _cache_for(self, kwargs: dict[str, Any]) -> DareCache | None:
        """The DareCache of a forward; one is made where HF would make its own."""
        cache = kwargs.get(CACHE)
        if cache is not None:
            return self._arranged(cache)
        wanted = kwargs.get("use_cache")
        if kwargs.get("labels") is not None:
            kwargs["use_cache"] = wanted = False
        if wanted is None:
            wanted = getattr(self.anatomy.text_config, "use_cache", True)
        if not wanted or any(checkpoints(layer) for layer in self.anatomy.layers):
            return None
        kwargs[CACHE] = cache = self._arranged(DareCache())
        return cache

    def _arranged(self, cache: DareCache) -> DareCache:
        """The cache with room for the layers of a hybrid model that are not routed."""
        if self.anatomy.unrouted:
            cache.arrange(self.anatomy.slots, self.anatomy.text_config)
        return cache

    def _call_of(self, kwargs: Mapping[str, Any]) -> CountedCall | None:
        """The running generate whose sequence a forward is of: that of its cache.

        A generate without a cache knows its forwards by their ids.
        """
        cache, calls = kwargs.get(CACHE), self._local.calls
        if cache is not None:
            return cache.call if cache.call is not None and cache.call.running else None
        call = calls[-1] if calls else None
        if call is None or call.cached or not call.begins(kwargs.get("input_ids")):
            return None
        return call

    # generate

    @contextmanager
    def generating(self, call: CountedCall, cache: DareCache | None) -> Iterator[None]:
        """A generate runs in this thread, over `cache`; at its end the report is frozen."""
        call.cached, before = cache is not None, None
        if cache is not None:
            before, cache.call = cache.call, call
        self._local.calls.append(call)
        try:
            yield
        finally:
            self.drop_forwards(0)
            self._local.calls.pop()
            call.running = False
            if cache is not None:
                cache.call = before
            try:
                if call.continues and call.recorder is not None and call.recorder.cache is not None:
                    # by the adapter that has processed them, whatever is active later
                    score_later(call.recorder.cache, self, call.recorder.note_scored)
            finally:
                self.finish(call)

    def finish(self, call: CountedCall) -> None:
        """Freeze the report of a generate and make it the newest one."""
        recorder = call.recorder or call.other
        if recorder is not None:
            recorder.builder.set_seconds(time.perf_counter() - call.started)
            recorder.freeze()
            self.newest.finish(recorder)
