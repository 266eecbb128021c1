"""Which settings a model routes by: those put on, an active adapter's, or one call's own."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from dare_hf.engine.planner import Planner
from dare_hf.engine.thread_state import ThreadState
from dare_hf.hops.eviction import never_thins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dare_hf.config import DareConfig
    from dare_hf.engine.active_adapter import ActiveAdapter
    from dare_hf.engine.settings import Settings
    from dare_hf.forward.token_rules import TokenRules
    from dare_hf.routers.router import Router
    from dare_hf.routing.retention import RetentionTable
    from dare_hf.scoring.scorer import Scorer


class InUse:
    """Settings, and what is derived from them once.

    Args:
        settings: What a configuration means on the model.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.planner = Planner(settings.config, settings.table)

    @cached_property
    def never_prunes(self) -> bool:
        """Whether every rate is 1, nothing is capped and hops are kept whole."""
        table, config = self.settings.table, self.settings.config
        rates = [rate for row in (*table.vision, *table.text) for rate in row]
        return min(rates) >= 1.0 and config.max_kv_tokens is None and config.hop_summary is None

    @cached_property
    def _thinned(self) -> set[int]:
        config, table = self.settings.config, self.settings.table
        return {i for i in range(len(table.vision[0])) if not never_thins(config, table, i)}

    @property
    def skips(self) -> bool:
        """Whether sampled tokens may skip layers."""
        return self.settings.config.decode == "routed" and not self.never_prunes

    # Layers from which a hop that closes later takes tokens, and what it needs to choose

    @cached_property
    def stores_scores(self) -> set[int]:
        """Layers whose scores must outlive the forward."""
        return self._thinned if self.settings.config.resolved_hop_score == "stored" else set()

    @cached_property
    def keeps_queries(self) -> set[int]:
        """Layers that keep their last queries."""
        if self.settings.config.resolved_hop_score != "observed":
            return set()
        sources = self.settings.sources
        return {layer for layer in self._thinned if sources[layer] == layer}

    @cached_property
    def scores_later(self) -> set[int]:
        """Layers by whose scores of sampled tokens one, or another, is thinned."""
        # an attention score is the previous layer's: a sampled token has none
        stored = not self.settings.scorer.needs_attention
        plans = self.settings.table.plan_layers
        return {plans[layer] for layer in self.stores_scores} if stored else set()


class Configured:
    """What a controller knows of its settings.

    Args:
        settings: What the configuration means on this model.

    Attributes:
        adapter: Follows the active router adapter; None where there is none.
    """

    def __init__(self, settings: Settings) -> None:
        self.adapter: ActiveAdapter | None = None
        self._local = ThreadState()
        self._tau = settings.config.tau_start
        self._base = InUse(settings)

    @property
    def in_use(self) -> InUse:
        """What this thread routes by now."""
        return self._local.instead or self._base

    @property
    def settings(self) -> Settings:
        """What the configuration means on this model."""
        return self.in_use.settings

    @property
    def config(self) -> DareConfig:
        """The configuration."""
        return self.settings.config

    @property
    def table(self) -> RetentionTable:
        """Rates by hop, layer and modality."""
        return self.settings.table

    @property
    def scorer(self) -> Scorer:
        """Who scores tokens."""
        return self.settings.scorer

    @property
    def rules(self) -> TokenRules:
        """What the configuration says about single tokens."""
        return self.settings.rules

    def configure(self, settings: Settings) -> None:
        """Route by these settings from the next forward on."""
        if self._base.settings.config is not settings.config:
            self._tau = settings.config.tau_start
        self._base = InUse(settings)

    @contextmanager
    def instead(self, settings: Settings) -> Iterator[None]:
        """Route by these settings inside the block, in this thread; there is no adapter."""
        before, self._local.instead = self._local.instead, InUse(settings)
        try:
            yield
        finally:
            self._local.instead = before

    def follow_adapter(self) -> None:
        """Take over what has become of the active adapter: another one, or other rates."""
        changed = None if self.adapter is None else self.adapter.changed()
        if changed is not None:
            self.configure(changed)

    @property
    def tau(self) -> float:
        """Temperature of the active adapter's training; of another adapter it starts anew."""
        self.follow_adapter()
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        self.follow_adapter()
        self._tau = value

    @property
    def routers(self) -> list[Router] | None:
        """The active adapter's router of each decoder layer; None without an adapter."""
        return None if self.adapter is None else self.adapter.routers
