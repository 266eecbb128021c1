"""95 % intervals that do not close to a point where nothing was seen to differ."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_Z = 1.96


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share over n trials."""
    middle = (share + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_share(hits: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """95 % interval of `sum(hits) / sum(sizes)` where trials come in rows that are alike inside.

    Wilson's with as many trials as independent ones would have this variance between rows; at
    least as many as there are rows, so that rows without a miss do not promise that none will come.

    Args:
        hits: Per row.
        sizes: Trials per row, >= 1.

    Raises:
        DareInputError: There is no row.

    Source: the ratio estimator's variance, Cochran, Sampling Techniques, 6.3; its effective number
    of trials as in Korn and Graubard 1998.
    """
    if not hits:
        raise DareInputError("expected at least one row; got none")
    hit, size = np.asarray(hits, dtype=float), np.asarray(sizes, dtype=float)
    rows, trials = len(hit), size.sum()
    share = hit.sum() / trials
    residual = hit - share * size
    variance = (residual**2).sum() / max(rows - 1, 1) * rows / trials**2
    effective = share * (1 - share) / variance if variance > 0 else rows
    return wilson(float(share), float(np.clip(effective, min(rows, trials), trials)))


def mean_score(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of scores in [0, 1]: Wilson's with their own variance's trials."""
    return clustered_share(scores, [1] * len(scores)) if scores else (0.0, 1.0)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a - b over the same items, scores in [0, 1].

    One item more is counted on either side, so that items without a difference do not promise that
    none will come.

    Raises:
        DareInputError: The runs are empty or of different length.

    Source: Bonett and Price 2012 for scores of 0 and 1.
    """
    if len(a) != len(b) or not len(a):
        raise DareInputError(f"expected the same items in both; got {len(a)} and {len(b)}")
    difference = np.append(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), (1.0, -1.0))
    n = len(difference)
    middle = difference.mean()
    half = _Z * sqrt(float((difference**2).mean() - middle**2) / n)
    return float(max(middle - half, -1.0)), float(min(middle + half, 1.0))
