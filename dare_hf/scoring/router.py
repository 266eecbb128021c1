"""The active adapter's routers as a scorer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare_hf.errors import DareStateError
from dare_hf.routers.holder import OFFLOADED, holder_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.facts import ForwardContext


@dataclass(frozen=True)
class RouterScorer:
    """The active adapter's routers (method page, "Scores"); without gradients."""

    untrained: bool = False
    yields_text: bool = True
    needs_attention: bool = False
    reads_inputs: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
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
                return router(hidden, context.modality.to(hidden.device)).float()
        except KeyError as error:
            if not router.weight.is_meta:
                raise
            raise DareStateError(OFFLOADED) from error
