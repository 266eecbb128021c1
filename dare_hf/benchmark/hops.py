"""The hops series: what the step costs in which a hop has closed, hop by hop."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.benchmark.checked import verify_hops
from dare_hf.benchmark.figures import Row, kv_bytes, timed
from dare_hf.benchmark.race import race
from dare_hf.benchmark.systems import PLAIN, POOLED, PRUNED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject, System

NAMES = (PLAIN, PRUNED, POOLED)
DELIMITER = 5  # an id below those of the random prompt
FIELDS: dict[str, Any] = {"hop_delimiters": (DELIMITER,), "hop_budget": "per_hop"}
LENGTH = 4
"""Sampled tokens of a hop, its delimiter included."""


def closing(step: int, scores: Tensor) -> Tensor:
    """Scores [B, V] that write the delimiter as every fourth token, and nowhere else."""
    others = scores.clone()
    others[:, DELIMITER] = -torch.inf
    if step % LENGTH < LENGTH - 1:
        return others
    forced = torch.full_like(scores, -torch.inf)
    forced[:, DELIMITER] = 0
    return forced


def run(subject: Subject, systems: Sequence[System], setting: Setting) -> list[Row]:
    """A row for each system and hop, `setting.pairs` answers of `setting.hops` hops behind it.

    Args:
        subject: What is run.
        systems: How; the plain one first, which closes no hop but writes the same.
        setting: At which size.

    Raises:
        DareStateError: A run is wrong.
    """
    inputs = subject.inputs(setting)
    told = verify_hops(subject, systems, setting, closing, (DELIMITER,))
    tokens = setting.hops * LENGTH + 2  # the first from the prompt, the last behind a delimiter
    races = [
        race(systems, inputs, tokens, force=closing, **subject.options)
        for _ in range(setting.pairs)
    ]
    rows = []
    for hop in range(1, setting.hops + 1):
        # forward n reads token n - 1; the one after the delimiter's is the next hop's first
        step = hop * LENGTH + 1
        base = [outcomes[0].seconds[step] for outcomes in races]
        for i, how in enumerate(told):
            seconds = [outcomes[i].seconds[step] for outcomes in races]
            quiet = [_other_steps(outcomes[i].seconds) for outcomes in races]
            extra = [own - other for own, other in zip(seconds, quiet, strict=True)]
            rows.append(
                {
                    "hop": hop,
                    **timed(seconds, base),
                    "closing_seconds": statistics.median(extra),
                    "kv_bytes": kv_bytes(races[-1][i].cache) if hop == setting.hops else None,
                    "checked": how,
                }
            )
    return rows


def _other_steps(seconds: Sequence[float]) -> float:
    """The median step in which no hop has closed."""
    return statistics.median(one for n, one in enumerate(seconds) if n and n % LENGTH != 1)
