"""What the reading of a context itself tells of its keys: no second pass, no question known.

Three things in one score, each over its own mean: the attention a key gets from the last queries
(what the context's end looks at), and how far the key and the value point away from what all keys
and values share (what no other token can stand for; a fact that nothing has asked for yet is seen
by that alone).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.engine.repetition import check_heard
from dare_hf.report.flops import attention_scorer_flops
from dare_hf.routing.scores import attention_scores, spread
from dare_hf.scoring.attention import visible_keys

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.engine.controller import Controller
    from dare_hf.scoring.observe import AttentionCall

QUERIES = 128
"""The last real tokens of a row whose attention counts."""
SEEN = 0.3
"""The share of that attention in the score; keys and values have half of the rest each."""


@dataclass
class ReadingScores:
    """Hears the attentions of the forward that reads a context, and scores its keys.

    Attributes:
        controller: The model's controller.
        cache: The context's cache.
        found: By layer Float32[B, N], the best score of each key among the layers that read it.
    """

    controller: Controller
    cache: DareCache
    found: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(
        self, layer: int, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall
    ) -> None:
        """Score the keys of `layer` by query [B, H, N, d], key [B, Hkv, N, d], value."""
        query, key, value = tensors
        context: Any = self.controller.context  # the log learns of the tokens after the forward
        real = (context.modality >= 0).to(key.device)  # [B, N]
        places = torch.arange(real.shape[1], device=key.device)
        last = torch.where(real, places, -1).topk(min(QUERIES, len(places)), dim=1).values
        live, index = last >= 0, last.clamp(min=0)  # [B, W]
        seen = visible_keys(call, index, torch.where(real, places, -1), len(places))
        view = index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        shown = (seen, live, real)
        looked = attention_scores(query.gather(2, view), key, value, *shown, *call.softmax)
        apart = (spread(key, real) + spread(value, real)) / 2
        score, before = SEEN * looked + (1 - SEEN) * apart, self.found.get(layer)
        self.found[layer] = score if before is None else torch.maximum(before, score)

    def scores(self) -> dict[int, Tensor]:
        """By layer Float32[B, N], 0 for pads; its cost goes into the report.

        Raises:
            DareStateError: An attention was not heard.
        """
        check_heard(self.controller, self.found)
        recorder: Any = self.cache.recorder
        counts = (self.cache.log.modality >= 0).sum(1).tolist()
        recorder.builder.scorer(
            sum(
                attention_scorer_flops(shape, min(QUERIES, n), n)
                for shape in self.controller.shapes
                for n in counts
            ),
            "prefill",
        )
        return self.found
