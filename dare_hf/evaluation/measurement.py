"""Measures one arm on one task: answers, costs, what was held, time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

import dare_hf
from dare_hf.evaluation.costs import ReportTotals, by_hop
from dare_hf.evaluation.phases import watched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.evaluation.arm import Arm
    from dare_hf.evaluation.costs import Retention
    from dare_hf.evaluation.phases import Watch
    from dare_hf.evaluation.suite import Task

_WARM_UP_ITEMS = 2
_LARGEST_BATCH = 100


@dataclass(frozen=True)
class Measurement:
    """What an arm did on the items of a task; shares are in [0, 1].

    Attributes:
        n: Items.
        accuracy: Share answered right; an answer that does not parse is wrong.
        accuracy_interval: Its 95 % Wilson interval.
        unparsed: Share whose answer does not parse.
        detail: Share of thoughts (images, boxes) that are right; None where none are scored.
        flops_ratio: FLOPs by "prefill" (prompt and injected spans), "decode" and "all", as shares
            of those of the same tokens unpruned; None for an arm that does not prune.
        kv_ratio: KV bytes at the end of each generate call, likewise.
        retention: `[hop][layer][modality]` share held when a hop begins; None likewise.
        seconds: Wall-clock time, from building the inputs to reading the answers.
        watch: Seconds of forwards by phase and the most memory held.
        kinds: Share answered right of each kind of item; None where there are no kinds.
        right: Which items were answered right, in order.
    """

    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    unparsed: float
    detail: float | None
    flops_ratio: dict[str, float] | None
    kv_ratio: float | None
    retention: Retention | None
    seconds: float
    watch: Watch
    kinds: dict[str, float] | None
    right: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; retention as means over layers, by modality and hop."""
        return {
            "n": self.n,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "unparsed": self.unparsed,
            "detail": self.detail,
            "flops_ratio": self.flops_ratio,
            "kv_ratio": self.kv_ratio,
            "retention": None if self.retention is None else by_hop(self.retention),
            "seconds": self.seconds,
            "phase_seconds": self.watch.seconds,
            "peak_bytes": self.watch.peak_bytes,
            "kinds": self.kinds,
            "right": "".join(str(int(one)) for one in self.right),
        }


def measure(
    model: Any,
    processor: Any,
    task: Task,
    arm: Arm,
    items: Sequence[Any],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Measurement:
    """Solve the items with an arm on a copy of the model.

    Args:
        model: A plain model that learned the task; it stays as it is.
        processor: Its processor.
        task: The task.
        arm: What is measured. One of `Task.ends` ends its hops.
        items: At least one, of the task.
        batch_size: Rows of a generate call; None: `default_batch_size`.
        progress: Called with (items done, items in all).
        options: Further arguments of the task's `solve`.

    Raises:
        DareError: The arm does not fit the model, or there are no items; the text says which.
    """
    armed = arm.on(model)
    size = batch_size or default_batch_size(len(items))
    totals = None if arm.config is None else ReportTotals(armed)
    task.solve(armed, processor, items[:_WARM_UP_ITEMS])
    with watched(armed) as watch:
        start = time.perf_counter()
        solutions = task.solve(
            armed, processor, items, size, on_batch=totals, progress=progress, **options
        )
        seconds = time.perf_counter() - start
    score = task.score(solutions)
    return Measurement(
        n=len(solutions),
        accuracy=score.accuracy,
        accuracy_interval=score.accuracy_interval,
        unparsed=score.unparsed,
        detail=None if task.detail is None else getattr(score, task.detail),
        flops_ratio=None if totals is None else totals.flops_ratios(),
        kv_ratio=None if totals is None else totals.kv_ratio,
        retention=None if totals is None else totals.retention,
        seconds=seconds,
        watch=watch,
        kinds=kinds_of(score) or None,
        right=tuple(solution.correct for solution in solutions),
    )


def setting(model: Any) -> dict[str, Any]:
    """Device, dtype, threads and versions: what a figure has to be stated with."""
    return {
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dare_hf": dare_hf.__version__,
    }


def kinds_of(score: Any) -> dict[str, float]:
    """Share answered right of each kind of item; empty where a task has no kinds."""
    return getattr(score, "kinds", {})


def default_batch_size(n: int) -> int:
    """Rows of a generate call for `n` items: all of them, at most 100.

    Where a task solves items of one length together, it makes smaller calls by itself.
    """
    return max(1, min(n, _LARGEST_BATCH))
