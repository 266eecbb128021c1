"""The prefill series: time to the first token of a generate, beside the FLOPs it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.benchmark.checked import checked
from dare_hf.benchmark.figures import Row, kv_figures, timed
from dare_hf.benchmark.race import whole_runs
from dare_hf.benchmark.systems import PLAIN, PRUNED, STATIC, WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject, System

NAMES = (PLAIN, STATIC, WHOLE, PRUNED)


def run(subject: Subject, systems: Sequence[System], setting: Setting) -> list[Row]:
    """A row for each system, `setting.pairs` generates of one token behind it.

    Args:
        subject: What is run.
        systems: How; the plain one first.
        setting: At which size.

    Raises:
        DareStateError: A run is wrong.
    """
    inputs = subject.inputs(setting)
    outcomes = whole_runs(systems, inputs, 1, setting.pairs, **subject.options)
    last = [runs[-1] for runs in outcomes]
    told = checked(subject, systems, setting, inputs, last)
    times = [[one.seconds[0] for one in runs] for runs in outcomes]
    return [
        {**timed(own, times[0]), **_flops(one.cache), **kv_figures(one, last[0]), "checked": how}
        for own, one, how in zip(times, last, told, strict=True)
    ]


def _flops(cache: object) -> Row:
    """As DARE counts them; nothing of other caches."""
    if (report := getattr(cache, "report", None)) is None:
        return {}
    flops, whole = sum(report.flops.values()), sum(report.flops_baseline.values())
    return {
        "flops_ratio": flops / whole,
        "gflops": flops / 1e9,
        "gflops_unpruned": whole / 1e9,
    }
