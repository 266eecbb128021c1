"""The controller of one model: opens a context per forward, keeps what outlives it."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.architectures.locate import attention_of
from dare_hf.architectures.tensor_parallel import kv_shares, share_note
from dare_hf.cache import DareCache, TokenLog
from dare_hf.cache.refused import check_caches
from dare_hf.compat import CACHE, CACHE_NAMES, checkpoints, named_cache
from dare_hf.engine.attention_functions import check_attention
from dare_hf.engine.layer_questions import LayerQuestions
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
from dare_hf.forward.hop_closing import close_context
from dare_hf.forward.inputs import open_context, without_own
from dare_hf.forward.packed import check_packed
from dare_hf.forward.told_prompt import NAME as PROMPT_LENGTH
from dare_hf.forward.told_prompt import prompt_before, told_labels
from dare_hf.hops.compaction import compact, due_rows
from dare_hf.hops.in_forward import InnerHops
from dare_hf.hops.ledger import LedgerRules
from dare_hf.hops.ledger_rows import know_rows, note_span
from dare_hf.simulation import SimulationRecord, open_simulation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.settings import Settings
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.forward.generation_call import GenerationCall
    from dare_hf.hops.compaction import Compaction
    from dare_hf.report.flops import LayerShape


class Controller(LayerQuestions):
    """What DARE knows about one model; reached from each routed layer.

    Attributes:
        anatomy: Where the model's layers are.
        base_implementation: The attention implementation the model had.
        newest: The newest run that has finished, in whatever thread.
    """

    def __init__(
        self,
        settings: Settings,
        anatomy: Anatomy,
        base_implementation: str,
        exempt: Mapping[int, int],
    ) -> None:
        super().__init__(settings, anatomy, exempt)
        self.base_implementation = base_implementation
        self._shares = kv_shares(anatomy)
        self.notes = share_note(self._shares)
        self.token_kwargs = dict(anatomy.spec.token_kwargs)
        found = [getattr(attention_of(m), "expand_kv", None) for m in anatomy.layers]
        self._expanders = found if any(found) else None
        self.newest = NewestRun()
        self._recompute = Repeats()
        # How far one training forward moves the thresholds of routed decode; None: not at all.
        self.threshold_step: float | None = None

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
    def context(self) -> ForwardContext | None:
        """The forward this thread is in."""
        return self._local.contexts[-1].context if self._local.contexts else None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return next(p.dtype for p in self.anatomy.layers[0].parameters() if p.is_floating_point())

    def find_context(self, kwargs: Mapping[str, Any]) -> ForwardContext | None:
        """The open forward, or the closed one that gradient checkpointing repeats a layer of."""
        if self._local.contexts:
            return self._local.contexts[-1].context
        return None if self.disabled else self._recompute.find(kwargs)

    def remember_context(self, kwargs: Mapping[str, Any], context: ForwardContext) -> None:
        """Note which forward these layer arguments belong to, for a later recomputation."""
        self._recompute.remember(kwargs, context)

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
        if self.disabled:
            self.newest.note_uncounted()
        if self.disabled or self._local.contexts:
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
            if cache is not None:
                know_rows(cache, len(self.anatomy.layers))
                if inside or most_unscored(cache) >= MOST_UNSCORED:
                    score_later(cache, self, recorder.note_scored)
                self._compact(cache, recorder)
                ends = call is not None and call.recorder is recorder
                context.step = not inside and is_step(context, kwargs, self, ends=ends)
                if context.step:
                    mask = kwargs.get("attention_mask")
                    context.hides_pads_only = hides_pads_only(context, mask, call)
                cache.begin(step=context.step)
            if inside:
                log = cache.log if cache is not None else TokenLog()
                context.inner_hops = InnerHops(context, log, self.config, self.table)
        self._local.contexts.append(OpenForward(module, context, kwargs, started, recorder, call))
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
        keep, context = kwargs.get("logits_to_keep"), self.context
        if not isinstance(keep, int) or not keep or context is None or not self.anatomy.shares:
            return
        # nor can a flex mask be cut (Gemma 4 asks for the implementation by its own name)
        flex = self.base_implementation.endswith("flex_attention")
        if flex or context.simulation is not None or keep > max(context.sampled) + 1:
            last = torch.arange(context.length, device=context.device)[-keep:]
            kwargs["logits_to_keep"] = last

    def _taught(self, kwargs: dict[str, Any], call: GenerationCall | None) -> dict[str, Any]:
        """The arguments, with labels where a lesson or a prompt length stands in for them."""
        taught = kwargs if call is not None else kwargs | self._local.lesson
        if (columns := taught.pop("sampled_columns", None)) is not None:
            taught[PROMPT_LENGTH] = prompt_before(kwargs, columns)
        told = told_labels(taught, call)
        return taught if told is None else taught | {"labels": told}

    def _open_simulation(self, module: Any, kwargs: dict[str, Any], taught: dict[str, Any]) -> bool:
        """Open the context of a training forward, where this is one the compact path leaves.

        A prompt length is no supervision: without gradients, or over a cache that is to be filled,
        the compact path has the same values.
        """
        told = taught.get(PROMPT_LENGTH) is not None
        if told and not (torch.is_grad_enabled() and kwargs.get(CACHE) is None):
            return False
        context = open_simulation(taught, self)
        if context is None:
            return False
        self._local.record = None
        self._local.contexts.append(OpenForward(module, context, kwargs, time.perf_counter()))
        return True

    @contextmanager
    def teach(self, **lesson: Any) -> Iterator[None]:
        """Read forwards of the block by these `labels` and `hop_ids`, whatever reaches the model.

        Or by `sampled_columns`: how many columns at the end were sampled, the prompt before them. A
        trainer may take the labels out of the arguments (label smoothing), or call the model
        inside the one that takes labels (TRL).
        """
        before, self._local.record = self._local.lesson, None
        self._local.lesson = {name: value for name, value in lesson.items() if value is not None}
        try:
            yield
        finally:
            self._local.lesson = before

    @property
    def record(self) -> SimulationRecord | None:
        """What this thread's last training forward noted for the auxiliary losses."""
        return self._local.record

    def _drop_stale(self, module: Any) -> None:
        """Forget forwards that an interrupt (KeyboardInterrupt) left open."""
        opened = [entry.module is module for entry in self._local.contexts]
        if any(opened):
            self.drop_contexts(opened.index(True))

    def drop_contexts(self, depth: int) -> None:
        """Roll back and forget open forwards beyond the first `depth`."""
        while len(self._local.contexts) > depth:
            context = self._local.contexts.pop().context
            context.release()
            if (cache := context.cache) is not None:
                cache.rollback()

    def after_forward(self, module: Any, *, failed: bool) -> None:
        """Close the context that `module` opened; a failed forward leaves the cache as it was."""
        if not self._local.contexts or self._local.contexts[-1].module is not module:
            return
        entry = self._local.contexts.pop()
        context, cache = entry.context, entry.context.cache
        if context.simulation is not None and not failed:
            self._local.record = context.simulation.record
            context.simulation.learn_updates()
        context.release()
        if context.simulation is not None:
            self.newest.note_uncounted()
            return
        if failed:
            if cache is not None:
                cache.rollback()
            return
        recorder = entry.recorder
        assert recorder is not None
        ended = not self._local.whole and context.span_ends is not None and not any(context.sampled)
        left: list[Compaction] = []
        with nullcontext() if cache is None else cache.all_or_nothing():
            close_context(context)
            note_span(context, LedgerRules(self.config, self.table, self.exempt))
            recorder.read(context)
            if self.config.max_kv_tokens is not None and cache is not None and ended:
                self._compact(cache, recorder, left)
        # Nothing fails from here on: a forward whose caller got an error has left no trace.
        if cache is not None:
            cache.commit()
        recorder.note_forward(context)
        for compaction in left:
            recorder.note_compaction(compaction)
        context.cache = None
        if entry.call is None:
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

    def _call_of(self, kwargs: Mapping[str, Any]) -> GenerationCall | None:
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
    def generating(self, call: GenerationCall, cache: DareCache | None) -> Iterator[None]:
        """A generate runs in this thread, over `cache`; at its end the report is frozen."""
        call.cached, before = cache is not None, None
        if cache is not None:
            before, cache.call = cache.call, call
        self._local.calls.append(call)
        try:
            yield
        finally:
            self.drop_contexts(0)
            self._local.calls.pop()
            call.running = False
            if cache is not None:
                cache.call = before
            self._end(call)

    def _end(self, call: GenerationCall) -> None:
        try:
            if call.continues and call.recorder is not None and call.recorder.cache is not None:
                # by the adapter that has processed them, whatever is active when their hop closes
                score_later(call.recorder.cache, self, call.recorder.note_scored)
        finally:
            self.finish(call)

    def finish(self, call: GenerationCall) -> None:
        """Freeze the report of a generate and make it the newest one."""
        recorder = call.recorder or call.other
        if recorder is not None:
            recorder.builder.set_seconds(time.perf_counter() - call.started)
            recorder.freeze()
            self.newest.finish(recorder)
