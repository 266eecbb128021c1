"""The decode series: a step of generate, all systems one after the other in every round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.benchmark.checked import checked
from dare_hf.benchmark.figures import Row, kv_figures, timed
from dare_hf.benchmark.race import race
from dare_hf.benchmark.systems import PLAIN, PRUNED, STATIC, WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject, System

NAMES = (PLAIN, STATIC, WHOLE, PRUNED)
_WARM_UP = 3  # steps; the first ones find cold kernels and caches


def run(subject: Subject, systems: Sequence[System], setting: Setting) -> list[Row]:
    """A row for each system, `setting.pairs` steps behind it.

    Args:
        subject: What is run.
        systems: How; the plain one first.
        setting: At which size.

    Raises:
        DareStateError: A run is wrong.
    """
    inputs = subject.inputs(setting)
    tokens = 1 + _WARM_UP + setting.pairs  # the first comes from the prompt
    outcomes = race(systems, inputs, tokens, **subject.options)
    told = checked(subject, systems, setting, inputs, outcomes)
    steps = [one.seconds[1 + _WARM_UP :] for one in outcomes]
    return [
        {**timed(own, steps[0]), **kv_figures(one, outcomes[0]), "checked": how}
        for own, one, how in zip(steps, outcomes, told, strict=True)
    ]
