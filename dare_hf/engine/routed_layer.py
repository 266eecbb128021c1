"""The routed layer: score -> select -> gather -> HF's own layer -> scatter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE, checkpoints
from dare_hf.engine import step
from dare_hf.engine.gathering import (
    gathered_arguments,
    key_view,
    needs_gather,
    slot_of,
    stage,
    tail_mask,
    take_tokens,
)
from dare_hf.engine.plan import Plan, keep_all
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.hops.in_forward import restrict
from dare_hf.routers.holder import mean_update_of, thresholds_of
from dare_hf.routing.scores import HeadMean, local_mean
from dare_hf.routing.stale import stale
from dare_hf.scoring.observe import AttentionCall, push_next, push_queries
from dare_hf.simulation import damped, simulated_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from dare_hf.cache import DareLayer
    from dare_hf.engine.controller import Controller
    from dare_hf.forward.facts import ForwardContext


class KeysMade(Exception):
    """A layer has come to its attention, and its keys and values [B, Hkv, C, d] are made."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


@dataclass
class LayerState:
    """What DARE keeps on one decoder layer and its attention.

    Attributes:
        controller: The model's controller.
        index: The layer's index in the model.
        inner: The forward that was there before.
        names: Its parameter names after hidden_states, for arguments passed by position.
        causal: What a None mask means in this layer.
        sees_all: Whether a token sees every real one before it: no window, no chunks.
        mean: Over all heads of this layer, where this process holds some.
        reads_positions: Whether its attention computes with position ids itself.
        returns: How many values the layer returned last, 0 for a bare tensor; -1 before.
    """

    controller: Controller
    index: int
    inner: Callable[..., Any]
    names: tuple[str, ...] = field(default=())
    causal: bool = True
    sees_all: bool = False
    mean: HeadMean = local_mean
    reads_positions: bool = False
    returns: int = -1

    @property
    def source(self) -> int:
        """The layer whose keys this one reads: itself, or an earlier one."""
        return self.controller.anatomy.sources[self.index]

    @property
    def watching(self) -> bool:
        """Whether the attention that runs now is to be read."""
        return self._watched() is not None or self.controller._local.listener is not None

    def tensors(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this layer's attention works on; called by its attention function.

        Raises:
            KeysMade: The layer was only to make keys and values, and has.
        """
        context = self._watched()
        if context is None or context.frozen is None:
            return query, key, value
        if not context.frozen:
            raise KeysMade(key, value)
        return query, context.frozen[0], context.frozen[1]

    def before_attention(self, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall) -> Any:
        """The mask this layer's attention shall use; called by its attention function."""
        context = self._watched()
        if context is None or context.inner_hops is None or context.columns is None:
            return damped(call.mask, tensors, call.softmax)
        with torch.no_grad():
            inner = context.inner_hops
            allowed = inner.allowed(context, self.index, tensors, call, self.source)
            return restrict(call.mask, allowed, context.columns)

    def after_attention(self, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall) -> None:
        """Read what attention has seen: the next layer's scores, the queries of the hop."""
        context = self._watched()
        if context is not None and context.step:
            push_next(context.cache.layer(self.index), tensors[0], context.past, call)
            return
        if (listener := self.controller._local.listener) is not None:
            listener(self.source, tensors, call)
        if context is None or context.columns is None:
            return
        with torch.no_grad():
            if self.controller.captures(self.index, context):
                scorer: Any = self.controller.scorer  # one that needs attention observes it
                scorer.observe(context, self.index, tensors, call)
            if self.controller.keeps_queries(self.index) and context.cache is not None:
                running = context.running_columns(context.columns, tensors[0].shape[2])
                dense = context.plans[self.index].live is None
                slot = context.cache.layer(self.index)
                sampled = max(context.sampled)
                push_queries(slot, tensors[0], running, call, sampled=sampled, dense=dense)

    def _watched(self) -> ForwardContext | None:
        context = self.controller.context
        return context if context is not None and context.capture_layer == self.index else None


def routed_forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward DARE puts on a decoder layer; without an open context it is HF's own."""
    state: LayerState | None = vars(layer).get("_dare")
    if state is None:  # a wrapper made since has outlived DARE
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    context = state.controller.find_context(kwargs)
    if context is None:
        return state.inner(hidden_states, *args, **kwargs)
    kwargs.update(zip(state.names, args, strict=False))
    if context.step and step.prepare(state, context, hidden_states, kwargs):
        output = state.inner(hidden_states, **kwargs)
        context.capture_layer = -1
        return output
    if context.simulation is not None:
        state.controller.remember_context(kwargs, context)
        return simulated_forward(layer, state, context, hidden_states, kwargs)
    controller = state.controller
    context.rotary = kwargs.get("position_embeddings")
    plan = _plan_for(layer, state, context, controller.anatomy.scored(hidden_states))
    hidden_states = plan.inputs(hidden_states, state.index)
    controller.remember_context(kwargs, context)
    if controller.anatomy.sources.count(state.index) > 1:
        context.keys[state.index] = key_view(state, context, plan, kwargs)
    if plan.idle(context) and (slot := slot_of(state, context, kwargs)) is not None:
        passed = _passed_by(layer, state, context, hidden_states, slot)
        if passed is not None:
            return passed
    if controller.config.pruned == "freeze" and not plan.plain and context.span is not None:
        return _frozen_forward(layer, state, context, plan, hidden_states, kwargs)
    stage(state, context, plan, kwargs)
    reads = controller.keeps_queries(state.index) or context.inner_hops is not None
    reads = reads or controller.captures(state.index, context)
    context.capture_layer = state.index if reads else -1
    if not needs_gather(state, context, plan, kwargs):
        output = state.inner(hidden_states, **kwargs)
        context.capture_layer = -1
        output = _scaled(state, plan, hidden_states, output)
        return _scatter(layer, state, context, output, hidden_states, plan)
    if plan.cut:
        kwargs["attention_mask"] = tail_mask(state, context, plan, kwargs)
        output = state.inner(hidden_states, **kwargs)
        context.capture_layer = -1
        return _scaled(state, plan, hidden_states, output)
    gathered = gathered_arguments(state, context, plan, kwargs)
    rows = take_tokens(hidden_states, plan.index, -2) if plan.index is not None else hidden_states
    output = state.inner(rows, **gathered)
    context.capture_layer = -1
    output = _scaled(state, plan, rows, output)
    return _scatter(layer, state, context, output, hidden_states, plan)


def _frozen_forward(
    layer: nn.Module,
    state: LayerState,
    context: ForwardContext,
    plan: Plan,
    hidden: Tensor,
    kwargs: dict[str, Any],
) -> Any:
    """The layer twice: all tokens up to its keys and values, then those that run, over all keys.

    Raises:
        DareInputError: The layer would be repeated for its gradients, without the keys it saw.
        DareStateError: Attention is not the one that DARE set.

    Source: docs/method.md, section 4 (freeze).
    """
    if torch.is_grad_enabled() and checkpoints(layer):
        raise DareInputError(
            "pruned: expected labels or hop_ids beside 'freeze' in a forward with gradients and "
            "activation checkpointing, which repeats a layer alone; got neither. Give labels, call "
            "the model under torch.no_grad(), or switch checkpointing off"
        )
    index, full = state.index, replace(keep_all(context), scores=plan.scores)
    slot = slot_of(state, context, kwargs)
    stored = None if slot is None or not slot.width else slot.scores()
    context.keys[index] = replace(key_view(state, context, full, kwargs), gathered=True)
    stage(state, context, full, kwargs)
    context.capture_layer, context.frozen = index, ()
    try:
        state.inner(hidden, **kwargs)
    except KeysMade as made:
        context.frozen = made.key, made.value
    else:
        raise DareStateError(
            "expected the attention implementation DARE set when it was applied; it was changed "
            "since. Call remove_dare(model), then apply_dare(model) again"
        )
    try:
        gathered = gathered_arguments(state, context, plan, kwargs) | {CACHE: None}
        context.column_scores = stored
        context.running = plan.take(context.positions(), fill=-1)
        rows = take_tokens(hidden, plan.index, -2) if plan.index is not None else hidden
        output = _scaled(state, plan, rows, state.inner(rows, **gathered))
    finally:
        context.capture_layer, context.frozen, context.running = -1, None, None
        context.keys.pop(index, None)
    return _scatter(layer, state, context, output, hidden, plan)


def _plan_for(layer: nn.Module, state: LayerState, context: ForwardContext, hidden: Tensor) -> Plan:
    """The layer's plan: its own, the one it reuses, or the one a recomputation must repeat."""
    index = state.index
    if index in context.plans:
        return context.plans[index]
    controller = state.controller
    if state.source != index:
        plan = context.plans[state.source]
        width = hidden.shape[1]
        context.plans[index] = plan = plan if width == context.length else plan.tail(context, width)
        return plan
    scorer: Any = controller.scorer
    if index == 0 and scorer.reads_inputs:
        scorer.read_inputs(context, hidden.detach())
    source = controller.table.plan_layers[index]
    before = controller.plan_before(index, context)
    if controller.is_exempt(index, context) and not controller.config.multiplies:
        plan = keep_all(context)
    elif source != index and source in context.plans and not controller.is_exempt(source, context):
        plan = context.plans[source]
    else:
        plan = _select(layer, state, context, hidden, before)
    context.plans[index] = plan
    return plan


def _select(
    layer: nn.Module,
    state: LayerState,
    context: ForwardContext,
    hidden: Tensor,
    before: Plan | None,
) -> Plan:
    controller, index = state.controller, state.index
    scored = controller.stores_scores(index) or controller.config.multiplies
    rows = controller.planner.prunes(context, index, before)
    if controller.may_skip(index, context):
        return _select_sampled(layer, state, context, hidden, rows)
    if controller.is_exempt(index, context) or not rows:
        plan = keep_all(context)
        if scored:
            plan = replace(plan, scores=controller.scorer.scores(context, layer, index, hidden))
        return plan
    with torch.no_grad():
        scores = controller.scorer.scores(context, layer, index, hidden.detach())
        scores = scores.to(context.device)
        if any(context.sampled) and not scored:
            # a step of its own would give a sampled token no score either
            scores = scores.masked_fill(~context.span_and_forced()[0], 0.0)
        if not all(rows) and not scored:
            # nor would a layer that keeps all of a row score that row, were it alone
            alone = torch.tensor(rows).to(scores.device, non_blocking=True)
            scores = scores.masked_fill(~alone[:, None], 0.0)
        return controller.planner.plan(context, index, scores, before, hidden.detach())


def _select_sampled(
    layer: nn.Module,
    state: LayerState,
    context: ForwardContext,
    hidden: Tensor,
    rows: tuple[bool, ...],
) -> Plan:
    """The plan of a layer that sampled tokens may skip."""
    controller, index = state.controller, state.index
    with torch.no_grad():
        scores = controller.scorer.scores(context, layer, index, hidden.detach())
        scores = scores.to(context.device)
        plan = keep_all(context)
        if rows:
            plan = controller.planner.plan(context, index, scores, None, hidden.detach())
        plan = replace(plan, scores=scores)
        thresholds = thresholds_of(layer)
        return controller.planner.skip(context, plan, scores, thresholds)


def _passed_by(
    layer: nn.Module, state: LayerState, context: ForwardContext, hidden: Tensor, slot: DareLayer
) -> Any:
    """What a layer returns that no token runs; None where only running it tells in which form."""
    if state.returns not in (0, 1):
        return None
    context.cached_before[state.index] = list(slot.kept_host) or [0] * context.batch
    slot.advance(context.past + context.length)
    if state.controller.config.mean_update is True:
        hidden = stale(hidden, mean_update_of(layer), context.modality)
    return (hidden,) if state.returns else hidden


def _scaled(state: LayerState, plan: Plan, rows: Tensor, output: Any) -> Any:
    """The layer's update of each running token times its score, under score_scaling="multiply".

    Source: docs/method.md, section 7.
    """
    state.returns = len(output) if isinstance(output, tuple) else 0
    if not state.controller.config.multiplies:
        return output
    if isinstance(output, tuple):
        return (_multiplied(plan, rows, output[0]), *output[1:])
    return _multiplied(plan, rows, output)


def _multiplied(plan: Plan, rows: Tensor, output: Tensor) -> Tensor:
    assert plan.scores is not None
    scores = plan.take(plan.scores).to(rows.device)[..., None]
    return rows + (scores * (output - rows)).to(rows.dtype)


def _scatter(
    layer: nn.Module,
    state: LayerState,
    context: ForwardContext,
    output: Any,
    hidden: Tensor,
    plan: Plan,
) -> Any:
    """Write the running tokens' output back; all others keep their input, or are stale."""
    if plan.plain:
        return output
    if state.controller.config.mean_update is True:
        hidden = stale(hidden, mean_update_of(layer), context.modality)
    if isinstance(output, tuple):
        return (_written(output[0], hidden, plan), *output[1:])
    return _written(output, hidden, plan)


def _written(output: Tensor, hidden: Tensor, plan: Plan) -> Tensor:
    index = None if plan.index is None else plan.index.to(hidden.device)
    if plan.live is not None:
        source = hidden if index is None else take_tokens(hidden, index, -2)
        output = torch.where(plan.live.to(hidden.device)[..., None], output, source)
    if index is None:
        return output
    if index.shape[0] == 1:
        return hidden.index_copy(-2, index[0], output)
    return hidden.scatter(-2, index[..., None].expand_as(output), output)
