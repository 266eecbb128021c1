"""Training forwards of a model: how they are told, opened, and what their losses read of them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE
from dare_hf.engine.configured import Configured
from dare_hf.engine.thread_state import OpenForward
from dare_hf.forward.told_prompt import NAME as PROMPT_LENGTH
from dare_hf.forward.told_prompt import prompt_before, told_labels
from dare_hf.simulation import Setup, open_simulation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.counted_call import CountedCall
    from dare_hf.engine.settings import Settings
    from dare_hf.simulation import SimulationRecord


class TrainingForwards(Configured):
    """What a controller knows of training.

    Attributes:
        anatomy: Where the model's layers are.
        base_implementation: The attention implementation the model had.
        exempt: Layers that keep everything, and from how many columns on.
        threshold_step: How far one training forward moves the thresholds of routed decode; None:
            not at all.
    """

    def __init__(
        self,
        settings: Settings,
        anatomy: Anatomy,
        base_implementation: str,
        exempt: Mapping[int, int],
    ) -> None:
        super().__init__(settings)
        self.anatomy, self.exempt = anatomy, exempt
        self.base_implementation = base_implementation
        self.threshold_step: float | None = None

    def _taught(self, kwargs: dict[str, Any], call: CountedCall | None) -> dict[str, Any]:
        """The arguments, with labels where a lesson or a prompt length stands in for them."""
        taught = kwargs if call is not None else kwargs | self._local.lesson
        if (columns := taught.pop("sampled_columns", None)) is not None:
            taught[PROMPT_LENGTH] = prompt_before(kwargs, columns)
        told = told_labels(taught, call)
        return taught if told is None else taught | {"labels": told}

    def _open_simulation(self, module: Any, kwargs: dict[str, Any], taught: dict[str, Any]) -> bool:
        """Open the context of a training forward, where this is one the compact path leaves.

        A prompt length is no supervision: without gradients, or over a cache that is to be filled,
        the compact path has the same values.
        """
        told = taught.get(PROMPT_LENGTH) is not None
        if told and not (torch.is_grad_enabled() and kwargs.get(CACHE) is None):
            return False
        if taught.get("labels") is None and taught.get("hop_ids") is None:
            return False
        simulation = open_simulation(taught, self._setup())
        if simulation is None:
            return False
        self._local.record = None
        self._local.forwards.append(OpenForward(module, simulation, time.perf_counter()))
        return True

    def _setup(self) -> Setup:
        """What a training forward that opens now is simulated by."""
        return Setup(
            config=self.config,
            table=self.table,
            scorer=self.scorer,
            rules=self.rules,
            anatomy=self.anatomy,
            exempt=self.exempt,
            implementation=self.base_implementation,
            routers=self.routers,
            tau=self.tau,
            threshold_step=self.threshold_step,
        )

    @contextmanager
    def teach(self, **lesson: Any) -> Iterator[None]:
        """Read forwards of the block by these `labels` and `hop_ids`, whatever reaches the model.

        Or by `sampled_columns`: how many columns at the end were sampled, the prompt before them. A
        trainer may take the labels out of the arguments (label smoothing), or call the model
        inside the one that takes labels (TRL).
        """
        before, self._local.record = self._local.lesson, None
        self._local.lesson = {name: value for name, value in lesson.items() if value is not None}
        try:
            yield
        finally:
            self._local.lesson = before

    @property
    def record(self) -> SimulationRecord | None:
        """What this thread's last training forward noted for the auxiliary losses."""
        return self._local.record
