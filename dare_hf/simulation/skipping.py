"""Which sampled tokens skip a layer of a training forward (routed decode)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.routing import gates
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.selection import hop_prefix_mask
from dare_hf.routing.stale import MOMENTUM
from dare_hf.routing.thresholds import follow_quantiles, limits

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.simulation.simulation import Simulation


@dataclass(frozen=True)
class Skips:
    """Sampled tokens at one layer.

    Attributes:
        could: Bool[B, S] those that may skip it.
        does: Bool[B, S] those that do.
        above: Float[B, S] by how much each score is over its threshold, in units of the selection's
            temperature, with the router's gradient.
    """

    could: Tensor
    does: Tensor
    above: Tensor

    def gates(self, others: Tensor) -> Tensor:
        """Float[B, S]: straight-through gates, soft around the threshold; `others` elsewhere."""
        soft = torch.sigmoid(self.above)
        return torch.where(self.could, gates.straight_through(~self.does, soft), others)


def skips_of(simulation: Simulation, index: int, scores: Tensor) -> Skips | None:
    """What skips layer `index`; None where nothing can. In training thresholds follow first.

    Args:
        simulation: The forward.
        index: The layer; no token skips the last one.
        scores: Float[B, S] of its router.

    Source: docs/method.md, section 6.
    """
    config, context, routers = simulation.config, simulation.context, simulation.routers
    if config.decode != "routed" or routers is None or index == len(routers) - 1:
        return None
    thresholds = routers[index].thresholds
    assert thresholds is not None
    real = context.modality >= 0
    first = hop_prefix_mask(real, context.token_hop, max(config.prefix_tokens, 1))
    could = real & ~context.span_and_forced()[0] & ~first
    if context.always is not None:
        could = could & ~context.always
    step = simulation.setup.threshold_step
    if step is None and simulation.training and simulation.learns(index):
        step = MOMENTUM
    facts = (context.token_hop, context.modality)
    if step is not None:
        rates = [
            [simulation.table.rate(hop, index, m) for m in (TEXT, VISION)]
            for hop in range(len(thresholds))
        ]
        follow_quantiles(thresholds, scores.detach(), could, *facts, rates, step)
    limit = limits(thresholds, *facts).to(scores.device)
    does = could & (scores.detach() < limit).to(could.device)
    return Skips(could, does, (scores - limit.to(scores)) / config.soft_temperature)
