"""The generate series: a whole answer, from the call to its return."""

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
    """A row for each system, `setting.pairs` answers of `setting.new_tokens` behind it.

    Args:
        subject: What is run.
        systems: How; the plain one first.
        setting: At which size.

    Raises:
        DareStateError: A run is wrong.
    """
    inputs = subject.inputs(setting)
    outcomes = whole_runs(systems, inputs, setting.new_tokens, setting.pairs, **subject.options)
    last = [runs[-1] for runs in outcomes]
    told = checked(subject, systems, setting, inputs, last)
    whole = [[sum(one.seconds) for one in runs] for runs in outcomes]
    first = [[one.seconds[0] for one in runs] for runs in outcomes]
    return [
        {
            **timed(whole[i], whole[0]),
            **timed(first[i], first[0], "first_token"),
            **kv_figures(last[i], last[0]),
            "checked": told[i],
        }
        for i in range(len(systems))
    ]
