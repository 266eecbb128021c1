"""The memory series: the most that a prefill or a short answer holds beside the model."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from dare_hf.benchmark.checked import checked
from dare_hf.benchmark.figures import Row, kv_figures
from dare_hf.benchmark.race import run_once
from dare_hf.benchmark.systems import (
    PLAIN,
    PRUNED,
    STATIC,
    WHOLE,
    on_systems,
    random_subject,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject, System

NAMES = (PLAIN, STATIC, WHOLE, PRUNED)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TOKENS = 3  # of the answer: the peak is the prefill's or the first step's


def run(subject: Subject, systems: Sequence[System], setting: Setting) -> list[Row]:
    """A row for each system: what the allocator had out at most, and what the process grew by.

    Args:
        subject: What is run.
        systems: How; the plain one first.
        setting: At which size.

    Raises:
        DareStateError: A run is wrong.
    """
    rows = allocated(subject, systems, setting)
    grown = [_rss(subject, system, setting) for system in systems]
    return [
        row if rss is None else row | {"rss_bytes": rss}
        for row, rss in zip(rows, grown, strict=True)
    ]


def allocated(subject: Subject, systems: Sequence[System], setting: Setting) -> list[Row]:
    """As `run`, without the processes of their own that the growth is asked from."""
    inputs = subject.inputs(setting)
    runs = [
        lambda system=system: run_once(system, inputs, _TOKENS, **subject.options)
        for system in systems
    ]
    outcomes = [one() for one in runs]
    told = checked(subject, systems, setting, inputs, outcomes)
    figures = [kv_figures(one, outcomes[0]) for one in outcomes]
    outcomes.clear()
    peaks = [peak_bytes(one, setting.device) for one in runs]
    return [
        {"peak_bytes": peak, "peak_ratio": peak / peaks[0], **figure, "checked": how}
        for peak, figure, how in zip(peaks, figures, told, strict=True)
    ]


@torch.inference_mode()
def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """The most that the allocator had out while `run` ran for the second time, beyond before."""
    run()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    profiler = found.profiler
    assert profiler is not None
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _rss(subject: Subject, system: System, setting: Setting) -> int | None:
    """Growth in a process of its own: an allocator that has worked before keeps what was freed."""
    told = setting.device == "cpu" and subject.facts["model"] == "random" and _CLEAR.exists()
    if not told or system.name not in NAMES:
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(rss_growth, (setting, system.name))


def rss_growth(setting: Setting, name: str) -> int:
    """What this process grew by at most while a system of the random model ran; Linux only.

    Args:
        setting: At which size.
        name: Which system.
    """
    torch.set_num_threads(setting.threads)
    subject = random_subject(setting)
    with on_systems(subject, (name,)) as (system,):
        short = subject.inputs(replace(setting, tokens=20, batch=1))
        run_once(system, short, _TOKENS, **subject.options)  # loads what a first run loads
        inputs = subject.inputs(setting)
        _CLEAR.write_text("5")  # the high-water mark starts again
        before = _status("VmRSS")
        run_once(system, inputs, _TOKENS, **subject.options)
        return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
