"""Scorers that look at no content: baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf.routing.scores import position_scores, random_scores, recent_scores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.facts import ForwardContext


@dataclass(frozen=True)
class RandomScorer:
    """A hash of seed, layer and the token's index in its row: a baseline."""

    seed: int
    untrained: bool = True
    yields_text: bool = True
    needs_attention: bool = False
    reads_inputs: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in [0, 1)."""
        return random_scores(self.seed, index, context.local_index())


@dataclass(frozen=True)
class PositionScorer:
    """Earlier tokens first: a baseline."""

    untrained: bool = True
    yields_text: bool = True
    needs_attention: bool = False
    reads_inputs: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in (0, 1]."""
        return position_scores(context.local_index())


@dataclass(frozen=True)
class RecentScorer:
    """Newer tokens first: a baseline, and the one to beat on plain text."""

    untrained: bool = True
    yields_text: bool = True
    needs_attention: bool = False
    reads_inputs: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in [0, 1)."""
        return recent_scores(context.local_index())
