"""The batch series: decode at growing batches, and the largest batch that memory allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.benchmark import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.benchmark.figures import Row
    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject, System

NAMES = decode.NAMES
BATCHES = (1, 2, 4, 8)
"""Rows where the caller names none."""


def run(subject: Subject, systems: Sequence[System], setting: Setting) -> list[Row]:
    """As the decode series, with the tokens that all rows write in a second.

    Args:
        subject: What is run.
        systems: How; the plain one first.
        setting: At which size.

    Raises:
        DareStateError: A run is wrong.
    """
    rows = decode.run(subject, systems, setting)
    return [row | {"tokens_per_second": setting.batch / row["seconds"]} for row in rows]


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of rows in [0, `most`] that fits, if what is smaller fits too.

    Doubles until something does not fit, then halves the gap.
    """
    good, bad = 0, None
    while good < most and (bad is None or bad - good > 1):
        tried = min(max(2 * good, 1), most) if bad is None else (good + bad) // 2
        if fits(tried):
            good = tried
        else:
            bad = tried
    return good
