"""The active adapter's routers as a scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dare_hf.errors import DareStateError
from dare_hf.report.flops import router_flops
from dare_hf.routers.holder import OFFLOADED, holder_of
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.scoring.scorer import Scoring


@dataclass(frozen=True)
class RouterScorer(Scorer):
    """The active adapter's routers (method page, "Scores"); without gradients."""

    untrained: ClassVar[bool] = False

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S] in (0, 1), 0 for pads.

        Raises:
            DareStateError: The layer has no router, or its weights were taken off and not kept.
        """
        holder = holder_of(layer)
        router = None if holder is None else holder.active_router
        if router is None:
            raise DareStateError(
                f"expected a router on layer {index}; its child module was taken off or replaced. "
                "Unload the adapter and load it again"
            )
        try:
            with torch.no_grad():
                return router(hidden, run.context.modality.to(hidden.device)).float()
        except KeyError as error:
            if not router.weight.is_meta:
                raise
            raise DareStateError(OFFLOADED) from error

    def flops(self, work: Scoring) -> int:
        """One matrix of a row a modality, on each token."""
        return router_flops(work.hidden, work.tokens)
