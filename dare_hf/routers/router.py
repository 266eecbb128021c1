"""The router of one layer: a linear score per modality and the layer's rates by hop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from dare_hf.errors import DareStateError
from dare_hf.routers.sharded import in_parts
from dare_hf.routing.scores import router_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# A fresh router's logits have this standard deviation on normalised input: near even, not tied.
_INIT_STD = 0.1
# Rates start inside (0, 1), where their logits are finite.
_RATE_MARGIN = 0.02


class Router(nn.Module):
    """What one adapter has learned for one layer.

    Args:
        hidden: Hidden size D of the model.
        rates: Rates [hops][text, vision] in (0, 1]; one row serves all hops (DARE-L).
        learned: Whether they start a training; else they are fixed: no parameter, and not saved.
        normalize: Whether the input is RMS-normalised, without parameters, before it is scored.
        mean_update: Whether it holds the vectors that tokens add where they do not run.
        skips: Whether it holds the thresholds under which sampled tokens skip the layer.
        generator: Draws the weights; None for torch's global one.

    Attributes:
        weight: Float32[2, D], rows text and vision.
        bias: Float32[2].
        rate_logits: Float32[hops, 2], columns text and vision; `rate_row` says who reads which.
            A buffer where the rates are fixed.
        mean_update: Float32[2, D], rows text and vision: the mean of what the layer adds to tokens
            of the modality, zeros until it was measured; None without one. A buffer.
        thresholds: Float32[hops, 2], rows and columns as `rate_logits`: a sampled token whose score
            is lower skips the layer; zeros until they were measured, and then none does. None
            without them. A buffer.

    Source: docs/method.md, sections 2, 3, 4 and 6.
    """

    mean_update: Tensor | None
    thresholds: Tensor | None

    def __init__(
        self,
        hidden: int,
        rates: Sequence[Sequence[float]],
        *,
        learned: bool = True,
        normalize: bool = True,
        mean_update: bool = False,
        skips: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean_update", torch.zeros(2, hidden) if mean_update else None)
        self.register_buffer("thresholds", torch.zeros(len(rates), 2) if skips else None)
        weight = torch.randn(2, hidden, generator=generator) * (_INIT_STD / hidden**0.5)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(2))
        start = torch.tensor(rates, dtype=torch.float32)
        if learned:
            start = start.clamp(_RATE_MARGIN, 1 - _RATE_MARGIN)
            self.rate_logits = nn.Parameter(start.logit())
        else:
            self.register_buffer("rate_logits", start.logit(), persistent=False)

    @staticmethod
    def saved_shapes(
        hidden: int, hops: int, learned: bool, mean_update: bool = False, skips: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a router of so many rows of rates has in a file, by name."""
        own: dict[str, tuple[int, ...]] = {"weight": (2, hidden), "bias": (2,)}
        own |= {"rate_logits": (hops, 2)} if learned else {}
        own |= {"mean_update": (2, hidden)} if mean_update else {}
        return own | ({"thresholds": (hops, 2)} if skips else {})

    def forward(self, hidden: Tensor, modality: Tensor) -> Tensor:
        """`scores`, so that accelerate's offload hooks bring the weights first."""
        return self.scores(hidden, modality)

    def scores(self, hidden: Tensor, modality: Tensor) -> Tensor:
        """Float32[B, S] in (0, 1): each token's score under its own modality's row, 0 for pads.

        Args:
            hidden: [B, S, D] hidden states that enter the layer.
            modality: [B, S], 0 text, 1 vision, -1 pad.

        Source: docs/method.md, section 2.
        """
        own = router_scores(hidden, self.weight, self.bias, modality, self.normalize)
        return own.masked_fill(modality < 0, 0.0)

    def rates(self) -> Tensor:
        """Float32[hops, 2] learned rates, columns text and vision.

        Raises:
            DareStateError: FSDP2 has given this process a part of them, and this is not the forward
                of their own layer.
        """
        if in_parts(self.rate_logits):
            raise DareStateError(
                "FSDP2: expected learned rates that only their own layer reads while it trains, as "
                "with plan_every=1; got a layer that shares another's plan. Train with "
                "plan_every=1, or without FSDP"
            )
        return torch.sigmoid(self.rate_logits.float())

    def rate_row(self, hop: int) -> int:
        """The row of `rates` that serves `hop`."""
        return rate_row(hop, self.rate_logits.shape[0])


def rate_row(hop: int, rows: int) -> int:
    """The row of learned rates that serves `hop`: row 0 for hops 0 and 1, row h for a later hop h.

    One row for hops 0 and 1 lets the boundary between them remove nothing. Row 1 is unused.

    Args:
        hop: The hop.
        rows: Rows there are; the last one serves all later hops.
    """
    return 0 if hop <= 1 else min(hop, rows - 1)
