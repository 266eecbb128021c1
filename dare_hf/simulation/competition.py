"""Competitions for budgets: which tokens a layer's soft gates are dealt to, all in one solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dare_hf.routing import gates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dare_hf.config import DareConfig


class Competition(NamedTuple):
    """Tokens of one modality that compete for one budget.

    Attributes:
        candidates: Bool[B, S].
        forced: Bool[B, S], kept where they are candidates.
        budget: Float[B], ``rho * n`` as a real number, with rho's gradient.
    """

    candidates: Tensor
    forced: Tensor
    budget: Tensor


def soft_gates(
    scores: Tensor, competitions: Sequence[Competition], config: DareConfig, tau: float
) -> list[Tensor]:
    """Float[B, S] of each competition: the gates its budget is dealt out as.

    Args:
        scores: Float[B, S], with noise where the selector adds it.
        competitions: Of one layer.
        config: Selector and temperature.
        tau: The Gumbel selector's temperature.
    """
    if not competitions:
        return []
    candidates = torch.stack([c.candidates for c in competitions], dim=1)
    forced = torch.stack([c.forced for c in competitions], dim=1)
    budgets = torch.stack([c.budget for c in competitions], dim=1).to(scores.dtype)
    spread = scores[:, None].expand(candidates.shape)
    if config.selector == "gumbel":
        dealt = gates.gumbel(spread, budgets, candidates, forced, tau)
    else:
        temperature = config.soft_temperature
        dealt = gates.soft_topk(spread, budgets, candidates, forced, temperature)
    return list(dealt.unbind(1))
