"""The most different vision tokens first: DivPrune's score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.routing.kinds import VISION
from dare_hf.routing.scores import diverse_scores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.facts import ForwardContext


@dataclass(frozen=True)
class DiverseScorer:
    """The place of a token in the greedy order of `diverse_scores`, of each row and hop."""

    untrained: bool = True
    yields_text: bool = True
    needs_attention: bool = False
    reads_inputs: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in (0, 1] of vision tokens of the span, 0 of others."""
        eligible = context.modality == VISION
        if context.span is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        return diverse_scores(hidden, eligible & context.span, context.token_hop)
