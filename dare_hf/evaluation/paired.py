"""Two runs over the same items: difference, its interval, McNemar's test, non-inferiority."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Paired:
    """How run B did against run A.

    Attributes:
        n: Items.
        accuracy_a: Share right of A.
        accuracy_b: Share right of B.
        difference: B minus A.
        interval: Its 95 % bootstrap interval over items.
        only_a: Items A alone has right.
        only_b: Items B alone has right.
        p_value: McNemar's exact two-sided test of "neither is better".
        not_inferior: Whether the interval's lower end lies above minus the margin.
        margin: That margin.
    """

    n: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    p_value: float
    not_inferior: bool
    margin: float


def compare_paired(
    a: Sequence[bool] | np.ndarray,
    b: Sequence[bool] | np.ndarray,
    *,
    margin: float = 0.02,
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Compare two runs item by item.

    Args:
        a: Which items run A has right.
        b: The same items for run B.
        margin: How much worse B may be and still count as not inferior; fixed before the runs.
        resamples: Bootstrap resamples.
        seed: Their seed.

    Raises:
        DareInputError: The runs are empty or of different length, or the margin is negative.
    """
    one, two = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if one.shape != two.shape or one.ndim != 1 or not len(one):
        raise DareInputError(
            f"expected the same items in both runs, at least one; got {one.shape} and {two.shape}"
        )
    if margin < 0:
        raise DareInputError(f"margin: expected a share >= 0; got {margin}")
    only_a, only_b = int((one & ~two).sum()), int((two & ~one).sum())
    interval = _bootstrap(only_a, only_b, len(one), resamples, seed)
    return Paired(
        n=len(one),
        accuracy_a=float(one.mean()),
        accuracy_b=float(two.mean()),
        difference=(only_b - only_a) / len(one),
        interval=interval,
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
        not_inferior=interval[0] > -margin,
        margin=margin,
    )


def _bootstrap(only_a: int, only_b: int, n: int, resamples: int, seed: int) -> tuple[float, float]:
    """Percentiles of the difference when items are drawn anew.

    Resampling items is drawing from three kinds of them: won by A, by B, by neither.
    """
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / n, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value: the wins of either side are as likely as heads and tails.

    Source: McNemar 1947, the binomial form for any count.
    """
    wins, fewer = only_a + only_b, min(only_a, only_b)
    if not wins:
        return 1.0
    tail = sum(comb(wins, k) for k in range(fewer + 1)) / 2**wins
    return min(1.0, 2 * tail)
