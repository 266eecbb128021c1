"""Seconds of prompts and of sampled tokens, and the most memory that a run held."""

from __future__ import annotations

import ctypes
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.evaluation.costs import PHASES

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Watch:
    """What `watched` measures.

    Attributes:
        seconds: Of the model's forwards by phase: "prefill" of several columns at once (a prompt
            with its images, an injected span), "decode" of one.
        peak_bytes: The most memory held beyond what was held when the run began: of the
            accelerator, or of the process where the model is on the CPU; None where the system
            does not say (it does under Linux).
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    peak_bytes: int | None = None


@contextmanager
def watched(model: Any) -> Iterator[Watch]:
    """Measures the forwards of a model for the time of the block."""
    found, begun = Watch(), []

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        begun.append(_now(model))

    def after(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        width = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        found.seconds[PHASES[width == 1]] += _now(model) - begun.pop()

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    held = _start(model.device.type)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        if held is not None:
            found.peak_bytes = max(_peak(model.device.type) - held, 0)


def _now(model: Any) -> float:
    """Seconds, when all that was begun is done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def _start(device: str) -> int | None:
    """Bytes held now; the peak is that much from here on."""
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's: what earlier runs freed is not held
    with suppress(OSError):
        _CLEAR.write_text("5")  # the peak is what is held now: proc_pid_clear_refs(5)
        return _resident("VmRSS")
    return None


def _peak(device: str) -> int:
    return _resident("VmHWM") if device == "cpu" else torch.accelerator.max_memory_allocated()


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
