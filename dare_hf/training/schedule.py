"""The temperature of the Gumbel selector over a training run."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from dare_hf.engine.attach import state_of


def cosine_temperature(progress: float, start: float, end: float) -> float:
    """``end + (start - end) (1 + cos(pi p)) / 2``: `start` at progress 0, `end` from 1 on.

    Source: docs/method.md, section 7.

    Examples:
        >>> from dare_hf.training import cosine_temperature
        >>> [round(cosine_temperature(progress, 1.0, 0.2), 2) for progress in (0, 0.5, 1)]
        [1.0, 0.6, 0.2]
    """
    share = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return end + (start - end) * share


class TemperatureSchedule(TrainerCallback):
    """Sets a model's temperature before each step, from its config's tau_start to tau_end."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; a resumed run goes on where it was."""
        controller = state_of(kwargs["model"]).controller
        config = controller.config
        progress = state.global_step / max(state.max_steps, 1)
        controller.tau = cosine_temperature(progress, config.tau_start, config.tau_end)
