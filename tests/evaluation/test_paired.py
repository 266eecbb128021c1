"""Paired comparisons against figures worked out by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dare_hf.errors import DareInputError
from dare_hf.evaluation import compare_paired
from dare_hf.evaluation.paired import mcnemar


def test_mcnemar_of_a_table_worked_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(5, 5) == 1.0


def test_difference_and_counts():
    a = [True, True, False, False]
    b = [True, False, True, True]
    found = compare_paired(a, b)
    assert (found.only_a, found.only_b, found.n) == (1, 2, 4)
    assert found.difference == pytest.approx(found.accuracy_b - found.accuracy_a)


def test_the_interval_is_that_of_resampled_items():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.9, rng.random(400) < 0.85
    found = compare_paired(a, b)
    picks = rng.integers(400, size=(4000, 400))
    spread = (b[picks].astype(float) - a[picks]).mean(1)
    assert found.interval == pytest.approx(tuple(np.percentile(spread, [2.5, 97.5])), abs=4e-3)


@pytest.mark.parametrize(("lost", "holds"), [(0, True), (60, False)])
def test_not_inferior_only_where_the_whole_interval_is_above_the_margin(lost, holds):
    a = np.ones(1000, dtype=bool)
    b = a.copy()
    b[:lost] = False
    assert compare_paired(a, b, margin=0.02).not_inferior is holds


def test_refusals():
    with pytest.raises(DareInputError, match="same items"):
        compare_paired([True], [True, False])
    with pytest.raises(DareInputError, match="same items"):
        compare_paired([], [])
    with pytest.raises(DareInputError, match="margin"):
        compare_paired([True], [True], margin=-0.1)
