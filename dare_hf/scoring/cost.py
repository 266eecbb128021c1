"""What scoring a layer's tokens costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf.report.flops import attention_scorer_flops, key_norm_scorer_flops, router_flops
from dare_hf.routing.kinds import TEXT, VISION
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

    def of(
        self,
        layer: int,
        tokens: int,
        queries: Sequence[int],
        keys: Sequence[int],
        span: Sequence[Sequence[int]] = (),
    ) -> int:
        """FLOPs of one layer's scores.

        Args:
            layer: The layer that selects by them.
            tokens: Real tokens of the forward, rows summed.
            queries: Per row the tokens of the span that ran the layer before.
            keys: Per row the keys that layer attended to.
            span: Per row [text, vision] tokens of the span.
        """
        if self.scorer in ("last_query", "text_raters"):
            shape = self.shapes[layer - 1]
            raters = [own[TEXT] if self.scorer == "text_raters" else 1 for own in span]
            pairs = sum(q * n for q, n in zip(raters, keys, strict=True))
            return 2 * pairs * shape.q_heads * shape.qk_dim
        if self.scorer == "own_attention":
            shape, rows = self.shapes[layer], len(span)
            made = self.hidden * (shape.kv_heads * tokens + shape.q_heads * rows)
            return 2 * shape.qk_dim * (made + shape.q_heads * tokens)
        if self.scorer == "diverse":
            return 2 * self.hidden * sum(own[VISION] ** 2 for own in span)
        if self.scorer == "attention" and layer >= UNSCORED_LAYERS:
            shape = self.shapes[layer - 1]
            rows = zip(queries, keys, strict=True)
            return sum(attention_scorer_flops(shape, min(WINDOW, q), n) for q, n in rows)
        if self.scorer in ("attention", "key_norm"):
            return key_norm_scorer_flops(self.shapes[layer], self.hidden, tokens)
        if self.scorer in ("random", "position", "recent"):
            return 0
        return router_flops(self.hidden, tokens)
