"""What routed layers ask of their controller: what is kept, scored and seen, and what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.engine.configured import Configured

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.plan import Plan
    from dare_hf.engine.settings import Settings
    from dare_hf.forward.facts import ForwardContext


class LayerQuestions(Configured):
    """Answers that follow from settings, the model's parts and the open forward.

    Args:
        settings: What the configuration means on this model.
        anatomy: Where the model's layers are.
        exempt: Layers that keep everything, and from how many columns on.
    """

    def __init__(self, settings: Settings, anatomy: Anatomy, exempt: Mapping[int, int]) -> None:
        super().__init__(settings)
        self.anatomy, self.exempt = anatomy, exempt

    def stores_scores(self, layer: int) -> bool:
        """Whether a layer's scores must outlive the forward, for hops that close later."""
        return self.config.resolved_hop_score == "stored" and self._thins_later(layer)

    def keeps_queries(self, layer: int) -> bool:
        """Whether a layer keeps its last queries, for hops that close later."""
        if self.config.resolved_hop_score != "observed":
            return False
        return self._thins_later(layer) and self.anatomy.sources[layer] == layer

    def scores_later(self, layer: int) -> bool:
        """Whether a layer's sampled tokens get a score when their hop closes."""
        # an attention score is the previous layer's: a sampled token has none
        stored = self.config.resolved_hop_score == "stored" and not self.scorer.needs_attention
        return stored and layer in self.in_use.thinned_plans and self._hops_may_close()

    def _thins_later(self, layer: int) -> bool:
        """Whether a later compaction can take tokens from a layer."""
        return layer not in self.in_use.unthinned and self._hops_may_close()

    def _hops_may_close(self) -> bool:
        call = self._local.contexts[-1].call if self._local.contexts else None
        later = self.rules.closes_hops or call is None or call.continues
        return later or self.config.max_kv_tokens is not None

    def is_exempt(self, layer: int, context: ForwardContext) -> bool:
        """Whether a layer keeps everything whatever its rate, at the length reached so far."""
        if self._local.whole:
            return True
        least = self.exempt.get(layer)
        return least is not None and context.past + context.length >= least

    def may_skip(self, layer: int, context: ForwardContext) -> bool:
        """Whether sampled tokens of a forward may skip a layer; the last layer none does."""
        if not self.skips or not any(context.sampled) or self.is_exempt(layer, context):
            return False
        return layer < len(self.anatomy.layers) - 1

    def plan_before(self, layer: int, context: ForwardContext) -> Plan | None:
        """The last plan before `layer` of one that could choose: others bring nothing back."""
        while layer > 0 and self.is_exempt(layer - 1, context):
            layer -= 1
        return context.plans.get(layer - 1)

    def captures(self, layer: int, context: ForwardContext) -> bool:
        """Whether the attention of `layer` is needed to score the layer after it."""
        after = layer + 1
        if not self.scorer.needs_attention or context.span is None or self._local.whole:
            return False
        if after >= len(self.anatomy.layers) or self.table.plan_layers[after] != after:
            return False
        if self.stores_scores(after):
            return True
        return bool(self.planner.prunes(context, after, self.plan_before(after, context)))
