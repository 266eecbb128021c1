"""What a layer is handed for the tokens that run it: their columns, arguments and mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE
from dare_hf.engine.masks import gather_mask, is_flash
from dare_hf.forward.facts import KeyView

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareLayer
    from dare_hf.engine.plan import Plan
    from dare_hf.engine.routed_layer import LayerState
    from dare_hf.forward.facts import ForwardContext

# Where a layer's keyword arguments count tokens; masks and caches are handled by name.
_TOKEN_DIMENSION = {"position_ids": -1, "position_embeddings": -2}


def slot_of(state: LayerState, context: ForwardContext, kwargs: dict[str, Any]) -> DareLayer | None:
    """The layer's cache, where this forward has one."""
    if context.cache is None or kwargs.get(CACHE) is None:
        return None
    return context.cache.layer(state.index)


def stage(state: LayerState, context: ForwardContext, plan: Plan, kwargs: dict[str, Any]) -> None:
    """Tell the cache layer which tokens the coming update brings."""
    slot = slot_of(state, context, kwargs)
    if slot is None:
        return
    if state.source != state.index:
        slot.advance(context.past + context.length)
        return
    context.cached_before[state.index] = list(slot.kept_host) or [0] * context.batch
    columns = None
    if not (plan.plain and context.valid is None):
        columns = plan.take(context.positions(), fill=-1)
        slot.plain = slot.plain and plan.plain
    scores = None
    if plan.scores is not None:
        scores = plan.take(plan.scores)
    running = plan.running(context)
    slot.stage(columns, context.past + context.length, running, scores)


def needs_gather(
    state: LayerState, context: ForwardContext, plan: Plan, kwargs: dict[str, Any]
) -> bool:
    """Whether HF's logical arguments differ from what the layer will really see."""
    if not plan.plain or context.capture_layer == state.index:
        return True
    if state.source != state.index:
        return context.keys[state.source].gathered
    slot = slot_of(state, context, kwargs)
    if slot is None:
        return False
    dense = slot.plain and slot.width == context.past
    if dense:
        return False
    return slot.holes or kwargs.get("attention_mask") is not None or context.length > 1


def key_view(
    state: LayerState, context: ForwardContext, plan: Plan, kwargs: dict[str, Any]
) -> KeyView:
    """This layer's keys of the coming attention, before its cache has them."""
    slot = slot_of(state, context, kwargs)
    cached = slot.width if slot is not None else 0
    return KeyView(
        columns=_columns(context, plan, slot if cached else None),
        cached=cached,
        holes=plan.live is not None or (slot is not None and slot.holes),
        gathered=needs_gather(state, context, plan, kwargs),
    )


def tail_mask(
    state: LayerState, context: ForwardContext, plan: Plan, kwargs: dict[str, Any]
) -> Any:
    """The mask of the last columns, which is all that the layer got, over its source's keys."""
    view, mask = context.keys[state.source], kwargs.get("attention_mask")
    if context.capture_layer == state.index:
        context.columns, context.column_scores = view.columns, None
    if mask is None and not view.holes and plan.width == 1:
        return None
    rows = torch.arange(plan.width, device=context.device)[None]
    return gather_mask(
        mask,
        rows,
        view.columns,
        past=context.past + context.length - plan.width,
        holes=view.holes,
        rows_live=plan.live,
        causal=state.causal,
        implementation=state.controller.base_implementation,
        dtype=state.controller.dtype,
    )


def gathered_arguments(
    state: LayerState, context: ForwardContext, plan: Plan, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The layer's keyword arguments for the tokens that run: token-wise ones and the mask."""
    result = dict(kwargs)
    dims = {**_TOKEN_DIMENSION, **state.controller.token_kwargs}
    for name, dim in dims.items():
        if kwargs.get(name) is not None and plan.index is not None:
            result[name] = _remembered(plan, plan.index, name, kwargs[name], dim)
    flash = is_flash(state.controller.base_implementation)
    if flash and "position_ids" in result and not state.reads_positions:
        # it would read gaps as packed sequences (see `attention_functions`)
        result["position_ids"] = None
    result["attention_mask"] = _mask(state, context, plan, kwargs)
    return result


def _remembered(plan: Plan, index: Tensor, name: str, value: Any, dim: int) -> Any:
    """Gather once per plan and argument; layers that reuse the plan share the result."""
    key = (name, id(value))
    if plan.gathered is not None and key in plan.gathered:
        return plan.gathered[key][1]
    if isinstance(value, (tuple, list)):
        taken = tuple(take_tokens(part, index, dim) for part in value)
    else:
        taken = take_tokens(value, index, dim)
    if plan.gathered is not None:
        plan.gathered[key] = (value, taken)
    return taken


def _mask(state: LayerState, context: ForwardContext, plan: Plan, kwargs: dict[str, Any]) -> Any:
    """The mask over the running rows and the physical columns, None where HF's would be."""
    mask = kwargs.get("attention_mask")
    view = context.keys.get(state.source) or key_view(state, context, plan, kwargs)
    if context.capture_layer == state.index:
        slot = slot_of(state, context, kwargs) if view.cached else None
        own = slot is not None and state.source == state.index
        context.columns, context.column_scores = view.columns, slot.scores() if own else None
    alike = view.cached == 0 or plan.width == 1
    if mask is None and not view.holes and alike and context.frozen is None:
        return None
    shared = view.cached == 0 and plan.gathered is not None
    key = ("attention_mask", id(mask), state.causal)
    if shared and key in plan.gathered:
        return plan.gathered[key][1]
    gathered = gather_mask(
        mask,
        plan.rows(context),
        view.columns,
        past=context.past,
        holes=view.holes,
        rows_live=None if plan.plain else plan.live,
        causal=state.causal,
        implementation=state.controller.base_implementation,
        dtype=state.controller.dtype,
    )
    if shared:
        plan.gathered[key] = (mask, gathered)
    return gathered


def _columns(context: ForwardContext, plan: Plan, slot: Any) -> Tensor:
    """Long[B|1, C]: logical position of every physical key of the coming attention."""
    if plan.index is None and plan.live is None:
        end = context.past + context.length
        new = torch.arange(context.past, end, device=context.device)[None]
    else:
        new = plan.take(context.positions(), fill=-1)
    if slot is None:
        return new
    stored = slot.positions()
    batch = max(stored.shape[0], new.shape[0])
    return torch.cat([stored.expand(batch, -1), new.to(stored.device).expand(batch, -1)], dim=1)


def take_tokens(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather tokens of a tensor whose token dimension is `dim` and batch dimension before it.

    The batch dimension may be 1, or further dimensions may stand before it (mrope).
    """
    dim = dim % tensor.ndim
    if index.shape[0] == 1 and tensor.shape[dim - 1] == 1:
        return tensor.index_select(dim, index[0].to(tensor.device))
    shape = list(tensor.shape)
    shape[dim - 1] = index.shape[0]
    tensor = tensor.expand(shape)
    view = [1] * tensor.ndim
    view[dim - 1], view[dim] = index.shape
    shape[dim] = index.shape[1]
    return tensor.gather(dim, index.to(tensor.device).view(view).expand(shape))
