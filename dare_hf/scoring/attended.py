"""The attention of the layer before, of queries that a baseline names: FastV's and SparseVLM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.routing.kinds import TEXT
from dare_hf.routing.scores import text_raters
from dare_hf.routing.selection import last_columns, last_valid
from dare_hf.scoring.attention import read_score, score_span

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.facts import ForwardContext
    from dare_hf.scoring.observe import AttentionCall


@dataclass(frozen=True)
class AttendedScorer:
    """Attention probabilities of the layer before, mean over heads and the raters among the span.

    Attributes:
        reads_inputs: Whether raters are the text that the images match best in the embeddings
            ("text_raters"); else the span's last token alone rates ("last_query").
    """

    reads_inputs: bool
    untrained: bool = True
    yields_text: bool = True
    needs_attention: bool = True

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S].

        Raises:
            DareStateError: The attention of the layer before was not seen.
        """
        if context.span is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        return read_score(context, index)

    def read_inputs(self, context: ForwardContext, hidden: Tensor) -> None:
        """Find the raters in the embeddings [B, S, D] of a forward with a span."""
        if context.span is not None:
            context.raters = text_raters(hidden, context.modality, context.span)

    def observe(
        self,
        context: ForwardContext,
        layer: int,
        tensors: tuple[Tensor, Tensor, Tensor],
        call: AttentionCall,
    ) -> None:
        """Score the span by the attention of `layer`; see `score_span`."""
        plan = context.plans[layer]
        span = plan.span_live(context)
        if context.raters is None:
            queries = last_columns(last_valid(span), 1)
        else:
            most = max(max(count[TEXT] for count in context.counts), 1)
            queries = last_columns(plan.take(context.raters) & span, min(most, plan.width))
        score_span(context, layer, tensors, call, queries=queries, by_value=False)
