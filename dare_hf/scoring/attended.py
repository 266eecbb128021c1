"""The attention of the layer before, of queries that a baseline names: FastV's and SparseVLM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dare_hf.routing.kinds import TEXT
from dare_hf.routing.scores import text_raters
from dare_hf.routing.selection import last_columns, last_valid
from dare_hf.scoring.attention import read_score, score_span
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.scoring.observe import AttentionCall
    from dare_hf.scoring.scorer import Scoring


@dataclass(frozen=True)
class AttendedScorer(Scorer):
    """Attention probabilities of the layer before, mean over heads; the span's last token rates."""

    needs_attention: ClassVar[bool] = True
    stepwise: ClassVar[bool] = True

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S].

        Raises:
            DareStateError: The attention of the layer before was not seen.
        """
        if run.context.span is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        return read_score(run, index)

    def observe(
        self, run: Run, layer: int, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall
    ) -> None:
        """Score the span by the attention of `layer`; see `score_span`."""
        context, plan = run.context, run.plans[layer]
        span = plan.span_live(context)
        if run.raters is None:
            queries = last_columns(last_valid(span), 1)
        else:
            most = max(max(count[TEXT] for count in context.counts), 1)
            queries = last_columns(plan.take(run.raters) & span, min(most, plan.width))
        score_span(run, layer, tensors, call, queries=queries, by_value=False)

    def flops(self, work: Scoring) -> int:
        """The raters over all keys of the layer before."""
        if not work.of_span:
            return 0
        shape = work.shapes[work.layer - 1]
        raters = [own[TEXT] if self.reads_inputs else 1 for own in work.span]
        pairs = sum(q * n for q, n in zip(raters, work.keys, strict=True))
        return 2 * pairs * shape.q_heads * shape.qk_dim


@dataclass(frozen=True)
class TextRatersScorer(AttendedScorer):
    """The same of the text that the images match best in the embeddings, mean over it."""

    reads_inputs: ClassVar[bool] = True

    def read_inputs(self, run: Run, hidden: Tensor) -> None:
        """Find the raters in the embeddings [B, S, D] of a forward with a span."""
        context = run.context
        if context.span is not None:
            run.raters = text_raters(hidden, context.modality, context.span)
