"""The routed layer: score -> select -> gather -> HF's own layer -> scatter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE, checkpoints
from dare_hf.engine import step
from dare_hf.engine.gathering import Turn, take_tokens
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.hops.in_forward import restrict
from dare_hf.routers.holder import mean_update_of, thresholds_of
from dare_hf.routing.scores import HeadMean, local_mean
from dare_hf.routing.stale import stale
from dare_hf.scoring.observe import AttentionCall, push_next, push_queries
from dare_hf.simulation import Simulation, damped, simulated_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from dare_hf.cache import DareLayer
    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.engine.controller import Controller
    from dare_hf.forward.plan import Plan


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
        source: The layer whose keys this one reads: itself, or an earlier one.
        inner: The forward that was there before.
        names: Its parameter names after hidden_states, for arguments passed by position.
        causal: What a None mask means in this layer.
        sees_all: Whether a token sees every real one before it: no window, no chunks.
        mean: Over all heads of this layer, where this process holds some.
        drops_positions: Whether position ids with gaps would be read as packed sequences.
        stream: Of several hidden states a token the one that scorers see, None where it has one.
        returns: How many values the layer returned last, 0 for a bare tensor; -1 before.
    """

    controller: Controller
    index: int
    source: int
    inner: Callable[..., Any]
    names: tuple[str, ...] = field(default=())
    causal: bool = True
    sees_all: bool = False
    mean: HeadMean = local_mean
    drops_positions: bool = False
    stream: int | None = None
    returns: int = -1

    @property
    def watching(self) -> bool:
        """Whether the attention that runs now is to be read."""
        return self._watched() is not None or self.controller._local.listener is not None

    def tensors(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What this layer's attention works on; called by its attention function.

        Raises:
            KeysMade: The layer was only to make keys and values, and has.
        """
        run = self._watched()
        if run is None or run.frozen is None:
            return query, key, value
        if not run.frozen:
            raise KeysMade(key, value)
        return query, run.frozen[0], run.frozen[1]

    def before_attention(self, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall) -> Any:
        """The mask this layer's attention shall use; called by its attention function."""
        run = self._watched()
        if run is None or run.inner_hops is None or run.columns is None:
            return damped(call.mask, tensors, call.softmax)
        with torch.no_grad():
            allowed = run.inner_hops.allowed(run, self.index, tensors, call, self.source)
            return restrict(call.mask, allowed, run.columns)

    def after_attention(self, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall) -> None:
        """Read what attention has seen: the next layer's scores, the queries of the hop."""
        run, index = self._watched(), self.index
        if run is not None and run.step:
            push_next(run.context.cache.layer(index), tensors[0], run.context.past, call)
            return
        if (listener := self.controller._local.listener) is not None:
            listener(self.source, tensors, call)
        if run is None or run.columns is None:
            return
        context = run.context
        with torch.no_grad():
            if run.captures(index):
                run.scorer.observe(run, index, tensors, call)
            if index in run.keeps_queries and context.cache is not None:
                running = run.running_columns(run.columns, tensors[0].shape[2])
                dense, sampled = run.plans[index].live is None, max(context.sampled)
                slot = context.cache.layer(index)
                push_queries(slot, tensors[0], running, call, sampled=sampled, dense=dense)

    def _watched(self) -> CompactRun | None:
        run: Any = self.controller.run  # of a simulation none is
        return run if run is not None and run.capture_layer == self.index else None


def routed_forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward DARE puts on a decoder layer; without an open forward it is HF's own."""
    state: LayerState | None = vars(layer).get("_dare")
    if state is None:  # a wrapper made since has outlived DARE
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    run = state.controller.find_run(kwargs)
    if run is None:
        return state.inner(hidden_states, *args, **kwargs)
    kwargs.update(zip(state.names, args, strict=False))
    if isinstance(run, Simulation):
        state.controller.remember_run(kwargs, run)
        return simulated_forward(layer, state, run, hidden_states, kwargs)
    if run.step and step.prepare(state, run, hidden_states, kwargs):
        output = state.inner(hidden_states, **kwargs)
        run.capture_layer = -1
        return output
    run.rotary = kwargs.get("position_embeddings")
    active = hidden_states if state.stream is None else hidden_states[state.stream]
    plan = _plan_for(layer, state, run, active)
    if plan.merged is not None:
        hidden_states = plan.inputs(hidden_states, state.index)
    if torch.is_grad_enabled():
        state.controller.remember_run(kwargs, run)
    return _run_layer(Turn(layer, state, run, plan, kwargs), hidden_states)


def _run_layer(turn: Turn, hidden: Tensor) -> Any:
    """The layer over the tokens of its plan, in [B, S, D] of all."""
    state, run, plan, kwargs = turn.state, turn.run, turn.plan, turn.kwargs
    index = state.index
    if run.anatomy.sources.count(index) > 1:
        run.keys[index] = turn.key_view()
    if plan.ran is not None and plan.idle(run.context) and turn.slot is not None:
        passed = _passed_by(turn, hidden, turn.slot)
        if passed is not None:
            return passed
    if run.freezes and not plan.plain and run.context.span is not None:
        return _frozen_forward(turn, hidden)
    turn.stage()
    reads = index in run.keeps_queries or run.inner_hops is not None or run.captures(index)
    run.capture_layer = index if reads else -1
    rows, gathers = hidden, turn.needs_gather()
    if gathers and plan.cut:
        kwargs["attention_mask"] = turn.tail_mask()
    elif gathers:
        kwargs = turn.arguments()
        rows = hidden if plan.index is None else take_tokens(hidden, plan.index, -2)
    output = state.inner(rows, **kwargs)
    run.capture_layer = -1
    output = _scaled(turn, rows, output)
    return output if plan.cut else _scatter(turn, output, hidden)


def _frozen_forward(turn: Turn, hidden: Tensor) -> Any:
    """The layer twice: all tokens up to its keys and values, then those that run, over all keys.

    Raises:
        DareInputError: The layer would be repeated for its gradients, without the keys it saw.
        DareStateError: Attention is not the one that DARE set.

    Source: docs/method.md, section 4 (freeze).
    """
    if torch.is_grad_enabled() and checkpoints(turn.layer):
        raise DareInputError(
            "pruned: expected labels or hop_ids beside 'freeze' in a forward with gradients and "
            "activation checkpointing, which repeats a layer alone; got neither. Give labels, call "
            "the model under torch.no_grad(), or switch checkpointing off"
        )
    state, run, plan, index = turn.state, turn.run, turn.plan, turn.state.index
    full, slot = replace(turn, plan=replace(run.keep_all, scores=plan.scores)), turn.slot
    stored = None if slot is None or not slot.width else slot.scores()
    run.keys[index] = replace(full.key_view(), gathered=True)
    full.stage()
    run.capture_layer, run.frozen = index, ()
    try:
        state.inner(hidden, **turn.kwargs)
    except KeysMade as made:
        run.frozen = made.key, made.value
    else:
        raise DareStateError(
            "expected the attention implementation DARE set when it was applied; it was changed "
            "since. Call remove_dare(model), then apply_dare(model) again"
        )
    try:
        gathered = turn.arguments() | {CACHE: None}
        run.column_scores = stored
        run.running = plan.take(run.context.positions(), fill=-1)
        rows = take_tokens(hidden, plan.index, -2) if plan.index is not None else hidden
        output = _scaled(turn, rows, state.inner(rows, **gathered))
    finally:
        run.capture_layer, run.frozen, run.running = -1, None, None
        run.keys.pop(index, None)
    return _scatter(turn, output, hidden)


def _plan_for(layer: nn.Module, state: LayerState, run: CompactRun, hidden: Tensor) -> Plan:
    """The layer's plan: its own, the one it reuses, or the one a recomputation must repeat."""
    index, plans = state.index, run.plans
    if index in plans:
        return plans[index]
    if state.source != index:
        plan, width = plans[state.source], hidden.shape[1]
        plans[index] = plan if width == run.context.length else plan.tail(run.context, width)
        return plans[index]
    if index == 0 and run.scorer.reads_inputs:
        run.scorer.read_inputs(run, hidden.detach())
    source = run.table.plan_layers[index]
    if index in run.keeps_all and not run.multiplies:
        plans[index] = run.keep_all
    elif source != index and source in plans and source not in run.keeps_all:
        plans[index] = plans[source]
    else:
        plans[index] = _select(layer, index, run, hidden)
    return plans[index]


def _select(layer: nn.Module, index: int, run: CompactRun, hidden: Tensor) -> Plan:
    context, before = run.context, run.plan_before(index)
    scored = index in run.stores_scores or run.multiplies
    rows = run.planner.prunes(run, index, before)
    if index in run.skippable:
        return _select_sampled(layer, index, run, hidden, rows)
    if index in run.keeps_all or not rows:
        plan = run.keep_all
        if scored:
            plan = replace(plan, scores=run.scorer.scores(run, layer, index, hidden))
        return plan
    with torch.no_grad():
        scores = run.scorer.scores(run, layer, index, hidden.detach()).to(context.device)
        if any(context.sampled) and not scored:
            # a step of its own would give a sampled token no score either
            scores = scores.masked_fill(~context.span_and_forced()[0], 0.0)
        if not all(rows) and not scored:
            # nor would a layer that keeps all of a row score that row, were it alone
            alone = torch.tensor(rows).to(scores.device, non_blocking=True)
            scores = scores.masked_fill(~alone[:, None], 0.0)
        return run.planner.plan(run, index, scores, before, hidden.detach())


def _select_sampled(
    layer: nn.Module, index: int, run: CompactRun, hidden: Tensor, rows: tuple[bool, ...]
) -> Plan:
    """The plan of a layer that sampled tokens may skip."""
    with torch.no_grad():
        scores = run.scorer.scores(run, layer, index, hidden.detach()).to(run.context.device)
        plan = run.keep_all
        if rows:
            plan = run.planner.plan(run, index, scores, None, hidden.detach())
        plan = replace(plan, scores=scores)
        return run.planner.skip(run, plan, scores, thresholds_of(layer))


def _passed_by(turn: Turn, hidden: Tensor, slot: DareLayer) -> Any:
    """What a layer returns that no token runs; None where only running it tells in which form."""
    state, context = turn.state, turn.run.context
    if state.returns not in (0, 1):
        return None
    turn.run.cached_before[state.index] = list(slot.kept_host) or [0] * context.batch
    slot.advance(context.past + context.length)
    hidden = _stale(turn, hidden)
    return (hidden,) if state.returns else hidden


def _stale(turn: Turn, hidden: Tensor) -> Tensor:
    """[B, S, D]: what the layer leaves of tokens that do not run it."""
    if turn.run.config.mean_update is not True:
        return hidden
    return stale(hidden, mean_update_of(turn.layer), turn.run.context.modality)


def _scaled(turn: Turn, rows: Tensor, output: Any) -> Any:
    """The layer's update of each running token times its score, under score_scaling="multiply".

    Source: docs/method.md, section 7.
    """
    turn.state.returns = len(output) if isinstance(output, tuple) else 0
    if not turn.run.multiplies:
        return output
    if isinstance(output, tuple):
        return (_multiplied(turn.plan, rows, output[0]), *output[1:])
    return _multiplied(turn.plan, rows, output)


def _multiplied(plan: Plan, rows: Tensor, output: Tensor) -> Tensor:
    assert plan.scores is not None
    scores = plan.take(plan.scores).to(rows.device)[..., None]
    return rows + (scores * (output - rows)).to(rows.dtype)


def _scatter(turn: Turn, output: Any, hidden: Tensor) -> Any:
    """Write the running tokens' output back; all others keep their input, or are stale."""
    plan = turn.plan
    if plan.plain:
        return output
    hidden = _stale(turn, hidden)
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
