"""What scoring a layer's tokens costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf.report.flops import attention_scorer_flops, key_norm_scorer_flops, router_flops
from dare_hf.routing.retention import UNSCORED_LAYERS
from dare_hf.scoring.observe import WINDOW

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.report.flops import LayerShape


@dataclass(frozen=True)
class ScoringCost:
    """FLOPs of one scorer on one model.

    Attributes:
        scorer: Its name.
        shapes: One per layer.
        hidden: Width of the hidden state.
    """

    scorer: str
    shapes: Sequence[LayerShape]
    hidden: int

    def of(self, layer: int, tokens: int, queries: Sequence[int], keys: Sequence[int]) -> int:
        """FLOPs of one layer's scores.

        Args:
            layer: The layer that selects by them.
            tokens: Real tokens of the forward, rows summed.
            queries: Per row the tokens of the span that ran the layer before.
            keys: Per row the keys that layer attended to.
        """
        if self.scorer == "attention" and layer >= UNSCORED_LAYERS:
            shape = self.shapes[layer - 1]
            rows = zip(queries, keys, strict=True)
            return sum(attention_scorer_flops(shape, min(WINDOW, q), n) for q, n in rows)
        if self.scorer in ("attention", "key_norm"):
            return key_norm_scorer_flops(self.shapes[layer], self.hidden, tokens)
        if self.scorer in ("random", "position", "recent"):
            return 0
        return router_flops(self.hidden, tokens)
