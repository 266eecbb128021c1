"""The stages of a schedule that lists them: where each begins, and what it keeps of the others."""

import math
from collections.abc import Sequence

from dare_hf.errors import DareConfigError

Stages = Sequence[tuple[int | float, float]]
"""Pairs (where a stage begins: a layer, or a fraction of the depth; its weight)."""

# 0.1 * 30 is a little more than 3.
_SLACK = 1e-9


def stage_start(start: int | float, num_layers: int) -> int:
    """The layer at which a stage begins: an index, or a fraction of the depth rounded up."""
    return start if isinstance(start, int) else math.ceil(start * num_layers - _SLACK)


def first_stage(stages: Stages, num_layers: int) -> int:
    """The layer at which the first stage begins; those before it keep everything.

    Raises:
        DareConfigError: there is no stage, or none begins inside the model.
    """
    first = min((stage_start(start, num_layers) for start, _ in stages), default=num_layers)
    if first >= num_layers:
        raise DareConfigError(
            f"stages must have a stage that begins in this model's {num_layers} layers under "
            f'schedule "stages", got {tuple(stages)!r}.'
        )
    return first


def listed_weights(stages: Stages, num_layers: int) -> list[float]:
    """[layers] the weight of the last stage that has begun, 1 before the first.

    Of stages that begin at one layer the one listed last counts.
    """
    starts = sorted((stage_start(start, num_layers), i) for i, (start, _) in enumerate(stages))
    weights = [1.0] * num_layers
    for start, i in starts:
        weights[start:] = [stages[i][1]] * len(weights[start:])
    return weights
