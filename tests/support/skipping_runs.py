"""Models whose sampled tokens skip layers by thresholds."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from router_runs import controller_of, routed, trainee


def thresholds_for(routers, low: float = 0.3, high: float = 0.7, seed: int = 0) -> None:
    """Thresholds that some scores of sharp routers are under and some over."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers:
        drawn = torch.rand(router.thresholds.shape, generator=generator)
        router.thresholds.copy_(low + (high - low) * drawn)


@contextmanager
def skipping(name: str, thresholds: dict | None = None, **fields):
    """A model with sharp routers whose sampled tokens skip layers."""
    with routed(trainee(name), decode="routed", **fields) as model:
        thresholds_for(controller_of(model).routers, **(thresholds or {}))
        yield model
