"""Scorers that look at no content: baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf.routing.scores import position_scores, random_scores, recent_scores
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """A hash of seed, layer and the token's index in its row: a baseline."""

    seed: int

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S] in [0, 1)."""
        return random_scores(self.seed, index, run.context.local_index)


@dataclass(frozen=True)
class PositionScorer(Scorer):
    """Earlier tokens first: a baseline."""

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S] in (0, 1]."""
        return position_scores(run.context.local_index)


@dataclass(frozen=True)
class RecentScorer(Scorer):
    """Newer tokens first: a baseline, and the one to beat on plain text."""

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S] in [0, 1)."""
        return recent_scores(run.context.local_index)
