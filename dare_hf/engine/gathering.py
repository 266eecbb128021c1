"""What a layer is handed for the tokens that run it: their columns, arguments and mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE
from dare_hf.engine.compact_run import KeyView
from dare_hf.engine.masks import gather_mask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.cache import DareLayer
    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.engine.routed_layer import LayerState
    from dare_hf.forward.plan import Plan

# Where a layer's keyword arguments count tokens; masks and caches are handled by name.
_TOKEN_DIMENSION = {"position_ids": -1, "position_embeddings": -2}


@dataclass(eq=False)
class Turn:
    """One layer's turn in a forward.

    Attributes:
        layer: The decoder layer.
        state: What DARE keeps on it.
        run: The forward.
        plan: Which tokens run the layer.
        kwargs: Its keyword arguments, as HF passes them.
    """

    layer: nn.Module
    state: LayerState
    run: CompactRun
    plan: Plan
    kwargs: dict[str, Any]

    @cached_property
    def slot(self) -> DareLayer | None:
        """The layer's cache, where this forward has one."""
        cache = self.run.context.cache
        if cache is None or self.kwargs.get(CACHE) is None:
            return None
        return cache.layer(self.state.index)

    def stage(self) -> None:
        """Tell the cache layer which tokens the coming update brings."""
        slot, plan, context, index = self.slot, self.plan, self.run.context, self.state.index
        if slot is None:
            return
        if self.state.source != index:
            slot.advance(context.past + context.length)
            return
        self.run.cached_before[index] = list(slot.kept_host) or [0] * context.batch
        columns = None
        if not (plan.plain and context.valid is None):
            columns = plan.take(context.positions(), fill=-1)
            slot.plain = slot.plain and plan.plain
        scores = None if plan.scores is None else plan.take(plan.scores)
        slot.stage(columns, context.past + context.length, plan.running(context), scores)

    def needs_gather(self) -> bool:
        """Whether HF's logical arguments differ from what the layer will really see."""
        state, run, slot = self.state, self.run, self.slot
        if not self.plan.plain or run.capture_layer == state.index:
            return True
        if state.source != state.index:
            return run.keys[state.source].gathered
        if slot is None or (slot.plain and slot.width == run.context.past):
            return False
        mask = self.kwargs.get("attention_mask")
        return slot.holes or mask is not None or run.context.length > 1

    def key_view(self) -> KeyView:
        """This layer's keys of the coming attention, before its cache has them."""
        slot = self.slot
        cached = slot.width if slot is not None else 0
        return KeyView(
            columns=self._columns(slot if cached else None),
            cached=cached,
            holes=self.plan.live is not None or (slot is not None and slot.holes),
            gathered=self.needs_gather(),
        )

    def tail_mask(self) -> Any:
        """The mask of the last columns, all that the layer got, over its source's keys."""
        run, plan, mask = self.run, self.plan, self.kwargs.get("attention_mask")
        view = run.keys[self.state.source]
        if run.capture_layer == self.state.index:
            run.columns, run.column_scores = view.columns, None
        if mask is None and not view.holes and plan.width == 1:
            return None
        rows = torch.arange(plan.width, device=run.context.device)[None]
        past = run.context.past + run.context.length - plan.width
        return self._gathered_mask(mask, rows, view, past, plan.live)

    def arguments(self) -> dict[str, Any]:
        """The layer's keyword arguments for the tokens that run: token-wise ones and the mask."""
        controller, kwargs, index = self.state.controller, self.kwargs, self.plan.index
        result = dict(kwargs)
        if index is not None:
            for name, dim in {**_TOKEN_DIMENSION, **controller.token_kwargs}.items():
                if kwargs.get(name) is not None:
                    result[name] = self._remembered(index, name, kwargs[name], dim)
        if self.state.drops_positions and "position_ids" in result:
            result["position_ids"] = None  # see `attention_functions`
        result["attention_mask"] = self._mask()
        return result

    def _remembered(self, index: Tensor, name: str, value: Any, dim: int) -> Any:
        """Gather once per plan and argument; layers that reuse the plan share the result."""
        key, gathered = (name, id(value)), self.plan.gathered
        if gathered is not None and key in gathered:
            return gathered[key][1]
        if isinstance(value, (tuple, list)):
            taken = tuple(take_tokens(part, index, dim) for part in value)
        else:
            taken = take_tokens(value, index, dim)
        if gathered is not None:
            gathered[key] = (value, taken)
        return taken

    def _mask(self) -> Any:
        """The mask over the running rows and the physical columns, None where HF's would be."""
        state, run, plan = self.state, self.run, self.plan
        mask = self.kwargs.get("attention_mask")
        view = run.keys.get(state.source) or self.key_view()
        if run.capture_layer == state.index:
            slot = self.slot if view.cached and state.source == state.index else None
            run.columns, run.column_scores = view.columns, None if slot is None else slot.scores()
        alike = view.cached == 0 or plan.width == 1
        if mask is None and not view.holes and alike and run.frozen is None:
            return None
        shared = plan.gathered if view.cached == 0 else None
        key = ("attention_mask", id(mask), state.causal)
        if shared is not None and key in shared:
            return shared[key][1]
        live = None if plan.plain else plan.live
        gathered = self._gathered_mask(mask, plan.rows(run.context), view, run.context.past, live)
        if shared is not None:
            shared[key] = (mask, gathered)
        return gathered

    def _gathered_mask(
        self, mask: Any, rows: Tensor, view: KeyView, past: int, live: Tensor | None
    ) -> Any:
        controller = self.state.controller
        return gather_mask(
            mask,
            rows,
            view.columns,
            past=past,
            holes=view.holes,
            rows_live=live,
            causal=self.state.causal,
            implementation=controller.base_implementation,
            dtype=controller.dtype,
        )

    def _columns(self, slot: DareLayer | None) -> Tensor:
        """Long[B|1, C]: logical position of every physical key of the coming attention."""
        plan, context = self.plan, self.run.context
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
