"""Spreading a retention budget over layers and hops by what pruning each of them costs."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Sequence


def convex_costs(rates: Sequence[float], costs: Sequence[float]) -> list[tuple[float, float]]:
    """The lower convex hull of one place's cost over its rate, from rate 1 (cost 0) down.

    A cost lower than that of a milder rate is noise: it counts as equal.

    Args:
        rates: Tried rates in (0, 1), falling.
        costs: What each of them cost, >= 0.

    Returns:
        Points (rate, cost), rates falling from 1.0.
    """
    points = [(1.0, 0.0)]
    for rate, cost in zip(rates, costs, strict=True):
        points.append((rate, max(cost, points[-1][1])))
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    """Cost per unit of rate given up."""
    return (right[1] - left[1]) / (left[0] - right[0])


def spread_budget(
    rates: Sequence[float],
    costs: Sequence[Sequence[float]],
    target: float,
    weights: Sequence[float] | None = None,
) -> list[float]:
    """The rates of mean `target` with the least summed cost, costs of places taken as additive.

    A place is a layer, or a layer at some hops. Every place starts at 1; the stretch of any place's
    convex hull that costs least for what it saves is given up first, the last one only as far as
    the target asks.

    Args:
        rates: Tried rates in (0, 1), falling; the same for all places.
        costs: One row per place, one cost per rate.
        target: Mean rate over the places, in (0, 1].
        weights: What each place counts in the mean, > 0; by default all the same.

    Raises:
        DareInputError: The target is under the lowest rate that was tried.
    """
    if target < rates[-1]:
        raise DareInputError(
            f"target: expected at least the lowest rate that was tried, {rates[-1]}; got {target}. "
            "Try lower rates"
        )
    weights = [1.0] * len(costs) if weights is None else weights
    result = [1.0] * len(costs)
    spare = (1.0 - target) * sum(weights)
    stretches = [
        (_slope(left, right) / weights[place], place, right[0])
        for place, row in enumerate(costs)
        for left, right in pairwise(convex_costs(rates, row))
    ]
    # slopes rise along a hull, so that a place's stretches come up in their order
    for _, place, rate in sorted(stretches, key=lambda stretch: (stretch[0], -stretch[2])):
        given = min(result[place] - rate, spare / weights[place])
        result[place] -= given
        spare -= given * weights[place]
        if spare <= 1e-12:
            break
    return result


def measure_cut_layer(vision_shares: Sequence[float]) -> int | None:
    """The first layer whose text puts under half the maximal share of its attention on vision.

    Args:
        vision_shares: One share per layer.

    Returns:
        A 0-based layer behind the maximum; None where no such layer has one behind it, since the
        losses and schedules that speak of layers behind the cut would then speak of none.

    Source: docs/method.md, section 3 ("auto").
    """
    peak = max(range(len(vision_shares)), key=lambda layer: vision_shares[layer])
    half = vision_shares[peak] / 2
    under = (k for k in range(peak, len(vision_shares) - 1) if vision_shares[k] < half)
    return next(under, None)
