"""The decode step in which nothing is decided: every row's next token runs every layer.

No hop begins in it, no token is scored, and HF's own tensors go to the layer as they are. What such
a step leaves to do (scores of the tokens that it brought) is done when their hop closes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache.unscored import Unscored
from dare_hf.compat import CACHE
from dare_hf.forward.facts import ForwardContext
from dare_hf.forward.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from dare_hf.cache import DareCache, DareLayer
    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.engine.controller import Controller
    from dare_hf.engine.routed_layer import LayerState
    from dare_hf.forward.generation_call import GenerationCall

# Hidden states are held for so many tokens of an open hop; a longer one is scored in parts.
MOST_UNSCORED = 512


def is_step(
    context: ForwardContext, kwargs: Mapping[str, Any], controller: Controller, *, ends: bool
) -> bool:
    """Whether a forward is such a step, as far as the forward tells; a layer may still differ.

    Args:
        context: The forward.
        kwargs: Its arguments by name.
        controller: The model's controller.
        ends: Whether a generate says when its sequence ends.
    """
    cache, mask = context.cache, kwargs.get("attention_mask")
    if cache is None or context.span is not None or context.length != 1:
        return False
    if context.valid is not None or torch.is_grad_enabled():
        return False
    if (
        controller.in_use.skips
        or controller.config.multiplies
        or controller.anatomy.shares
        or controller.exempt
    ):
        return False
    if not ends and controller.config.resolved_hop_score == "stored":
        return False  # nobody says when it ends: another adapter may be active then
    if isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.ndim != 2):
        return False  # a mask of the caller's own hides more than pads
    return all(layer.is_initialized for layer in cache.stored)


def prepare(state: LayerState, run: CompactRun, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
    """Make a layer's cache and mask ready; False where the layer needs a plan of its own."""
    index, source = state.index, run.table.plan_layers[state.index]
    if source != index and source in run.plans:
        return False  # its plan has scores, which are this layer's too
    if kwargs.get(CACHE) is None:
        return False
    slot = run.context.cache.layer(index)
    mask = kwargs.get("attention_mask")
    if mask is not None or slot.holes:
        seen = _mask(state, run, slot, mask)
        if seen is None:
            return False
        kwargs["attention_mask"] = seen
    if index in run.scores_later:
        slot.unscored.append(run.context.past, hidden)
    run.capture_layer = index if index in run.keeps_queries else -1
    slot.stage_next()
    return True


def hides_pads_only(context: ForwardContext, mask: Any, call: GenerationCall | None) -> bool:
    """Whether the caller's mask [B, N] hides nothing but pads, asked once a generate.

    A later turn may hide words of the one before; what generate adds to a mask hides nothing.
    A bare forward is not asked, which would wait for the device: its layers gather their mask.
    """
    if mask is None or call is None:
        return mask is None
    if call.hides_pads_only is None:
        real = context.cache.log.modality >= 0
        shown = mask[:, : real.shape[1]].to(real.device).bool()
        call.hides_pads_only = torch.equal(shown, real)
    return call.hides_pads_only


def _mask(state: LayerState, run: CompactRun, slot: DareLayer, mask: Any) -> Tensor | None:
    """What the next token sees of the stored columns, where that is every real one; else None."""
    given = mask is None or (
        run.hides_pads_only and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    )
    if not given or not state.sees_all or not state.controller.base_implementation.endswith("sdpa"):
        return None
    return slot.visible()


def most_unscored(cache: DareCache) -> int:
    """Tokens of a row that wait for their scores, in the layer that has most of them."""
    return max((len(layer.unscored) for layer in cache.stored), default=0)


def score_later(cache: DareCache, controller: Controller, note: Callable[[int, int], None]) -> None:
    """Score what was put off, in one call per layer and gapless run.

    A layer that reuses the plan of another has that one's scores.

    Args:
        cache: The cache.
        controller: The model's controller.
        note: Told of each layer and how many tokens were scored in it.
    """
    stored, plans = cache.stored, controller.table.plan_layers
    for index, slot in enumerate(stored):
        if not slot.unscored:
            continue
        layer = controller.anatomy.layers[index]
        with torch.no_grad():
            for start, hidden in slot.unscored.runs():
                run = Run(_past_tokens(cache, start, hidden.shape[1]))
                scores = controller.scorer.scores(run, layer, index, hidden)
                for follower in (s for i, s in enumerate(stored) if plans[i] == index):
                    follower.note_scores(start, scores)
                note(index, scores.numel())
        slot.unscored = Unscored()


def _past_tokens(cache: DareCache, start: int, count: int) -> ForwardContext:
    """The facts of `count` sampled tokens that have been processed."""
    log, end = cache.log, start + count
    rows, modality = log.modality.shape[0], log.modality[:, start:end]
    nothing = [[0, 0] for _ in range(rows)]
    return ForwardContext(
        batch=rows,
        length=count,
        past=start,
        cache=cache,
        modality=modality,
        token_hop=log.hop[:, start:end],
        valid=modality >= 0,
        span_hop=[0] * rows,
        counts=nothing,
        forced_counts=nothing,
        sampled=[count] * rows,
        closing=[[] for _ in range(rows)],
        head_rows=0,
    )
