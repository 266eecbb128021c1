"""Attention functions that let a scorer read queries, keys and values on their way.

HF resolves attention by name. For each implementation a `dare_<name>` is registered that calls
the original and, only while a forward asks for it, scores the keys by the last queries. The
mask function of the same name is registered with it: without one, masks vanish silently.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dare_hf.cache.ring import QueryRing
from dare_hf.errors import DareStateError
from dare_hf.routing.scores import HeadMean, attention_scores, local_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from dare_hf.cache import DareLayer
    from dare_hf.context import ForwardContext

    Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PREFIX = "dare_"
WINDOW = 32
# Queries a layer remembers: the window, and as many again that a hop may have closed before.
RING = 2 * WINDOW


class AttentionCall(NamedTuple):
    """How one attention is called.

    Attributes:
        scaling: Softmax scale.
        window: Tokens a sliding layer sees where its mask does not say so, None for all.
        mask: The mask of the running rows over the physical columns.
        mean: Over all heads, where this process holds some.
    """

    scaling: float
    window: int | None
    mask: Any
    mean: HeadMean = local_mean


class _BaseView:
    """An attention module as its flash function must see it: with the original's name.

    transformers 5.23 looks the flash kernels up by `module.config._attn_implementation`.
    """

    def __init__(self, module: Any, implementation: str) -> None:
        self._module, self._attn_implementation = module, implementation

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _BaseView(value, self._attn_implementation) if name == "config" else value


def observed_name(implementation: str) -> str:
    """Name of the observing twin of an attention implementation; registered on first use."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _observing(implementation))
        masks = ALL_MASK_ATTENTION_FUNCTIONS
        if implementation in masks.valid_keys():
            AttentionMaskInterface.register(name, masks[implementation])
    return name


def check_attention(config: Any, implementation: str, watched: bool) -> None:
    """Refuse a text model whose attention is another than when DARE was put on.

    Masks are gathered in the form of that one, and scores are read by its watching twin.

    Args:
        config: The text config.
        implementation: The name it had.
        watched: Whether attention has to be read.

    Raises:
        DareStateError: It is another now.
    """
    now = config._attn_implementation_internal
    if now != PREFIX + implementation and (watched or now != implementation):
        raise DareStateError(
            f"expected the attention implementation the model had when DARE was put on, "
            f"{implementation!r}; it is {now!r} now (set_attn_implementation?). Call "
            "remove_dare(model), set the attention implementation, then apply_dare(model) again"
        )


def _observing(implementation: str) -> Any:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = _original(module, implementation)
        state = module.__dict__.get("_dare")
        caller = _BaseView(module, implementation) if "flash" in implementation else module
        if state is None:
            return function(caller, query, key, value, attention_mask, *args, **kwargs)
        tensors = (query, key, value)
        scaling = _scale(kwargs.get("scaling"), query)
        call = AttentionCall(scaling, kwargs.get("sliding_window"), attention_mask, state.mean)
        call = call._replace(mask=state.before_attention(tensors, call))
        output = function(caller, query, key, value, call.mask, *args, **kwargs)
        state.after_attention(tensors, call)
        return output

    attend.__name__ = PREFIX + implementation
    return attend


def _original(module: nn.Module, implementation: str) -> Any:
    if implementation == "eager":  # not in the interface: each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def score_span(
    context: ForwardContext,
    layer: int,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: AttentionCall,
) -> None:
    """Write the attention score of the span's tokens into the context.

    Args:
        context: The forward; its plan for `layer` says which tokens run, its `columns` which
            logical token each key is.
        layer: The layer whose attention this is.
        tensors: query [B, H, K, d], key [B, Hkv, C, d] (cached tokens first), value.
        call: How it was called.
    """
    query, key, value = tensors
    plan, columns = context.plans[layer], context.columns
    index, there = plan.queries(context, WINDOW)
    taken = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    visible = visible_keys(call, index, columns.expand(query.shape[0], -1), query.shape[2])
    span = torch.zeros(query.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    span[:, key.shape[2] - query.shape[2] :] = plan.span_live(context)
    scores = attention_scores(taken, key, value, visible, there, span, call.scaling, call.mean)
    new = scores[:, key.shape[2] - query.shape[2] :]
    context.attention_score = plan.spread(new, context.attention_score, context)
    context.attention_layer = layer


def visible_keys(call: AttentionCall, index: Tensor, columns: Tensor, running: int) -> Tensor:
    """Bool[B, 1|H, W, C]: what the queries at `index` of the last `running` columns see."""
    mask = call.mask
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = mask.expand(index.shape[0], -1, -1, -1)
        view = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        rows = mask.gather(2, view)
        return rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
    if hasattr(mask, "mask_mod"):
        rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
        keys = torch.arange(columns.shape[1], device=index.device)
        seen = mask.mask_mod(rows, torch.zeros_like(rows), index[:, :, None], keys)
        return seen.expand(*index.shape, -1)[:, None]
    # None, or a flash mask: causal over what is stored, within the layer's window
    own = columns.gather(1, index + columns.shape[1] - running)
    distance = own[:, :, None] - columns[:, None, :]
    seen = (distance >= 0) & (columns >= 0)[:, None, :]
    if call.window is not None:
        seen = seen & (distance < call.window)
    return seen[:, None]


def _scale(scaling: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def push_queries(slot: DareLayer, query: Tensor, columns: Tensor, call: AttentionCall) -> None:
    """Remember the layer's last queries for the scores of hops that close later.

    Args:
        slot: The layer's cache.
        query: [B, H, K, d] of the running tokens.
        columns: Long[B|1, K] their logical positions, -1 for fills and pads.
        call: How their attention is called.
    """
    ring = slot.ring or QueryRing.empty(query, call.scaling, call.mean)
    slot.ring = ring.pushed(query, columns.to(query.device).expand(query.shape[0], -1), RING)


def observed_scores(
    slot: DareLayer, closed: Tensor, ends: list[int], expand: Expand | None = None
) -> Tensor:
    """Float32[B, C]: stored keys of closed hops scored by the layer's query ring.

    Args:
        slot: The layer's cache; without a ring every score is 0.
        closed: Bool[B, C] stored columns that belong to closed hops.
        ends: Per row the last position of the hop that closed; later queries do not count.
        expand: What makes keys and values of the latents that are stored; None where keys are.
    """
    ring, keys, values = slot.ring, slot.keys, slot.values
    if ring is None or keys is None or values is None:
        return torch.zeros(closed.shape, device=closed.device)
    if expand is not None:
        keys, values = expand(keys, values)
    return ring_scores(ring, (keys, values), slot.positions(), closed, ends)


def ring_scores(
    ring: QueryRing,
    stored: tuple[Tensor, Tensor],
    where: Tensor,
    closed: Tensor,
    ends: list[int],
) -> Tensor:
    """Float32[B, C]: keys and values at logical `where` scored by the last queries up to `ends`."""
    last = ring.until(torch.tensor(ends).to(where.device, non_blocking=True), WINDOW)
    seen = (where[:, None, :] <= last.positions[:, :, None]) & (where >= 0)[:, None, :]
    there = last.positions >= 0
    shown = (seen[:, None], there, closed)
    return attention_scores(last.query, *stored, *shown, ring.scaling, ring.mean)
