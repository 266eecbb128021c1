"""What a training forward is simulated by: settings and weights as they are when it opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.config import DareConfig
    from dare_hf.forward.token_rules import TokenRules
    from dare_hf.routers.router import Router
    from dare_hf.routing.retention import RetentionTable
    from dare_hf.scoring.scorer import Scorer


@dataclass(frozen=True, eq=False)
class Setup:
    """Settings of one training forward.

    Attributes:
        config: Budgets, selector, temperatures.
        table: Rates by hop, layer and modality.
        scorer: Scores tokens where there are no routers.
        rules: What the configuration says about single tokens.
        anatomy: Where the model's layers are.
        exempt: Layers that keep everything, and from how many columns on.
        implementation: The model's attention implementation.
        routers: The active adapter's router of each layer, or None.
        tau: The Gumbel selector's temperature.
        threshold_step: How far the thresholds of routed decode follow this forward's scores while
            they are fitted; None: as far as means do in a training of the routers, else not.
    """

    config: DareConfig
    table: RetentionTable
    scorer: Scorer
    rules: TokenRules
    anatomy: Anatomy
    exempt: Mapping[int, int]
    implementation: str
    routers: list[Router] | None
    tau: float
    threshold_step: float | None

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.anatomy.text_model.training
