"""What one thread is doing with a model: its open forwards, its running generates."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.engine.recorder import Recorder
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.forward.generation_call import GenerationCall
    from dare_hf.simulation import SimulationRecord


class OpenForward(NamedTuple):
    """A forward in progress."""

    module: Any
    context: ForwardContext
    kwargs: Mapping[str, Any]
    started: float
    recorder: Recorder | None


class ThreadState(threading.local):
    """What one thread is doing with the model; a copy of the model starts with nothing."""

    def __init__(self) -> None:
        self.contexts: list[OpenForward] = []
        self.calls: list[GenerationCall] = []
        self.last: Recorder | None = None
        self.disabled = 0
        self.lesson: dict[str, Any] = {}
        self.record: SimulationRecord | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadState:
        return ThreadState()
