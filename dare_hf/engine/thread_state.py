"""What one thread is doing with a model: its open forwards, its running generates."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.engine.configured import InUse
    from dare_hf.engine.counted_call import CountedCall
    from dare_hf.engine.recorder import Recorder
    from dare_hf.scoring.observe import AttentionCall
    from dare_hf.simulation import Simulation, SimulationRecord

    Listener = Callable[[int, tuple[Tensor, Tensor, Tensor], AttentionCall], None]


class OpenForward(NamedTuple):
    """A forward in progress; nobody counts one of training."""

    module: Any
    run: CompactRun | Simulation
    started: float
    recorder: Recorder | None = None


class ThreadState(threading.local):
    """What one thread is doing with the model; a copy of the model starts with nothing."""

    def __init__(self) -> None:
        self.forwards: list[OpenForward] = []
        self.calls: list[CountedCall] = []
        self.disabled = 0
        # Blocks inside which every layer keeps everything (`engine/repetition.py`), and who hears
        # the attentions of plain forwards.
        self.whole = 0
        self.listener: Listener | None = None
        self.instead: InUse | None = None
        self.lesson: dict[str, Any] = {}
        self.record: SimulationRecord | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadState, ()


class Repeats:
    """The forwards whose layers gradient checkpointing may repeat; a copy of the model has none."""

    def __init__(self) -> None:
        self._runs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Repeats, ()

    def __len__(self) -> int:
        return len(self._runs)

    def remember(self, kwargs: Mapping[str, Any], run: CompactRun | Simulation) -> None:
        """Note which forward these arguments of a layer belong to."""
        if torch.is_grad_enabled() and (marker := _marker(kwargs)) is not None:
            self._runs[marker] = run

    def find(self, kwargs: Mapping[str, Any]) -> CompactRun | Simulation | None:
        """The forward these arguments of a layer belonged to."""
        if not torch.is_grad_enabled() or not len(self._runs):
            return None
        marker = _marker(kwargs)
        return self._runs.get(marker) if marker is not None else None


def _marker(kwargs: Mapping[str, Any]) -> Tensor | None:
    """A tensor that HF passes to all layers of one forward and that checkpointing keeps."""
    embeddings = kwargs.get("position_embeddings")
    if isinstance(embeddings, (tuple, list)):
        return embeddings[0]
    return embeddings if embeddings is not None else kwargs.get("position_ids")
