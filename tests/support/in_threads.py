"""Processes that share rows, as threads of this one: quick, and each step can be watched."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import distributed
from transformers import PreTrainedModel

from dare_hf.evaluation.processes import Processes, ended_together

if TYPE_CHECKING:
    from collections.abc import Callable


def in_threads(count: int, run: Callable[[Processes], Any]) -> list[Any]:
    """What `run` returns in each process, or the error it ends with."""
    store = distributed.HashStore()

    def one(rank: int) -> Any:
        processes = Processes(store, rank, count)
        try:
            with ended_together(processes):
                return run(processes)
        except (Exception, KeyboardInterrupt) as error:
            return error

    # Loading changes torch's own functions for its length: two at once leave them changed.
    lock, load = threading.Lock(), PreTrainedModel.from_pretrained.__func__

    def alone(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with lock:
            return load(cls, *args, **kwargs)

    locked = mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(alone))
    with locked, ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
