"""The most different vision tokens first: DivPrune's score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.routing.kinds import VISION
from dare_hf.routing.scores import diverse_scores
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.scoring.scorer import Scoring


@dataclass(frozen=True)
class DiverseScorer(Scorer):
    """The place of a token in the greedy order of `diverse_scores`, of each row and hop."""

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S] in (0, 1] of vision tokens of the span, 0 of others."""
        context = run.context
        eligible = context.modality == VISION
        if context.span is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        return diverse_scores(hidden, eligible & context.span, context.token_hop)

    def flops(self, work: Scoring) -> int:
        """Every vision token of a row beside every other."""
        return 2 * work.hidden * sum(own[VISION] ** 2 for own in work.span)
