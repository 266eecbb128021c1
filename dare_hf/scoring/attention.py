"""The attention score: what a layer's last text queries attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dare_hf.errors import DareStateError
from dare_hf.report.flops import attention_scorer_flops
from dare_hf.routing.retention import UNSCORED_LAYERS
from dare_hf.routing.scores import attention_scores
from dare_hf.scoring.key_norm import KeyNormScorer
from dare_hf.scoring.observe import WINDOW
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.scoring.observe import AttentionCall
    from dare_hf.scoring.scorer import Scoring


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """What the previous layer's last text queries attended to (method page, "Scores")."""

    key_path: tuple[str | None, str]
    needs_attention: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S]; layers 0 and 1 have no such score and take key_norm.

        Raises:
            DareStateError: The attention of the layer before was not seen.
        """
        span = run.context.span
        if span is None:  # no attention score for sampled tokens: the hop's end gives one
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        if index < UNSCORED_LAYERS:
            found = KeyNormScorer(self.key_path).scores(run, layer, index, hidden)
            # nor has one that shares its forward with the prompt (labels, verified steps)
            return found.masked_fill(~span, 0) if any(run.context.sampled) else found
        return read_score(run, index)

    def observe(
        self, run: Run, layer: int, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall
    ) -> None:
        """Score the span by the attention of `layer`; see `score_span`."""
        score_span(run, layer, tensors, call)

    def flops(self, work: Scoring) -> int:
        """The last queries over all keys of the layer before; sampled tokens get no score."""
        if not work.of_span:
            return 0
        if work.layer < UNSCORED_LAYERS:
            return KeyNormScorer(self.key_path).flops(work)
        shape, rows = work.shapes[work.layer - 1], zip(work.queries, work.keys, strict=True)
        return sum(attention_scorer_flops(shape, min(WINDOW, q), n) for q, n in rows)


def read_score(run: Run, index: int) -> Tensor:
    """Float32[B, S]: the score that the attention of the layer before `index` has left.

    Raises:
        DareStateError: It was not seen.
    """
    if run.attention_score is None or run.attention_layer != index - 1:
        raise DareStateError(
            "expected the attention implementation DARE set when it was applied; it was "
            "changed since (set_attn_implementation?). Call remove_dare(model), set the "
            "attention implementation, then apply_dare(model) again"
        )
    return run.attention_score


def score_span(
    run: Run,
    layer: int,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: AttentionCall,
    *,
    queries: tuple[Tensor, Tensor] | None = None,
    by_value: bool = True,
) -> None:
    """Write the attention score of the span's tokens into the run.

    Args:
        run: The forward; its plan for `layer` says which tokens run, its `columns` which
            logical token each key is.
        layer: The layer whose attention this is.
        tensors: query [B, H, K, d], key [B, Hkv, C, d] (cached tokens first), value.
        call: How it was called.
        queries: Long[B, W] which of the K columns rate, and Bool[B, W] which of them there are;
            None: the last ones of the span's text.
        by_value: Whether attention is multiplied by the norm of the value.
    """
    query, key, value = tensors
    context, plan, columns = run.context, run.plans[layer], run.columns
    assert columns is not None
    index, there = plan.queries(context, WINDOW) if queries is None else queries
    value = value if by_value else torch.ones_like(value[..., :1])
    taken = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    visible = visible_keys(call, index, columns.expand(query.shape[0], -1), query.shape[2])
    frozen = run.frozen is not None  # keys of tokens that did not run are there too
    new = context.length if frozen else query.shape[2]
    span = torch.zeros(query.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    span[:, key.shape[2] - new :] = (
        context.span_and_forced()[0] if frozen else plan.span_live(context)
    )
    scores = attention_scores(taken, key, value, visible, there, span, *call.softmax)
    scores = scores[:, key.shape[2] - new :]
    if not frozen:
        scores = plan.spread(scores, run.attention_score, context)
    run.attention_score, run.attention_layer = scores, layer


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
