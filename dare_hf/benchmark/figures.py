"""From times to figures: medians, spreads, bytes, and the machine they belong to."""

from __future__ import annotations

import os
import platform
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

import dare_hf
from dare_hf import DareCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.benchmark.race import Outcome

Row = dict[str, Any]
"""One line of a series: a system at a number of tokens, rows or hops."""

_SPREAD = (10, 90)  # per cent of the rounds that are left out below and above


def timed(seconds: Sequence[float], base: Sequence[float], name: str = "seconds") -> Row:
    """Median and spread of a system's times, and of their ratios to the plain model's.

    Args:
        seconds: Per round.
        base: The plain model's, round for round.
        name: What the median is called.
    """
    ratios = [ours / plain for ours, plain in zip(seconds, base, strict=True)]
    return {
        name: statistics.median(seconds),
        f"{name}_range": _spread(seconds),
        f"{name}_ratio": statistics.median(ratios),
        f"{name}_ratio_range": _spread(ratios),
    }


def _spread(values: Sequence[float]) -> list[float]:
    """What a tenth of the values is below and above."""
    return [float(end) for end in np.percentile(list(values), _SPREAD)]


def kv_bytes(cache: Any) -> int:
    """Bytes of the tensors that hold keys and values, spare columns and pads included."""
    if isinstance(cache, DareCache):
        return cache.allocated_bytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def kv_figures(outcome: Outcome, plain: Outcome) -> Row:
    """Bytes held for keys and values, and as a share of what the plain model holds."""
    held = kv_bytes(outcome.cache)
    return {"kv_bytes": held, "kv_ratio": held / kv_bytes(plain.cache)}


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions: what a figure has to be stated with."""
    return {
        "hardware": _hardware(device),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dare_hf": dare_hf.__version__,
    }


def _hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {capability}, {os.cpu_count()} cores"
