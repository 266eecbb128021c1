"""What a configuration saves on this machine: seconds and bytes, measured in pairs."""

from __future__ import annotations

import time
from contextlib import nullcontext
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.api import dare_disabled, last_report
from dare_hf.evaluation.measurement import setting
from dare_hf.tuning.candidates import candidate
from dare_hf.tuning.fidelity import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dare_hf.config import DareConfig
    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row

PAIRS = 5
_DECODED = 16


def measure_machine(
    model: Any, prompts: Prompts, rows: Sequence[Row], config: DareConfig, router: Path | None
) -> dict[str, Any]:
    """Prefill and decode of the longest row, alone, with the configuration and without.

    Args:
        model: The plain model.
        prompts: Builds its inputs.
        rows: At least one.
        config: The configuration.
        router: Folder of the fitted router adapter.

    Returns:
        `prefill_seconds` and `decode_seconds` (a token), `{"full", "dare"}` medians of five
        interleaved pairs; `kv_bytes` of that row at the end and `peak_bytes` of the accelerator
        (None on a CPU), likewise; `tokens` of the prompt; and the machine.
    """
    longest = max(rows, key=lambda row: prompts.encode([row])["input_ids"].shape[1])
    inputs = on_device(model, prompts.encode([longest]))
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {"full": [], "dare": []} for phase in ("prefill", "decode")
    }
    peak: dict[str, int | None] = {"full": None, "dare": None}
    with candidate(model, config, router):
        for pair in range(PAIRS + 1):  # the first warms up
            for side in ("full", "dare"):
                with dare_disabled(model) if side == "full" else nullcontext():
                    one, _ = _timed(model, prompts, inputs, 1)
                    many, peak[side] = _timed(model, prompts, inputs, 1 + _DECODED)
                if pair:
                    seconds["prefill"][side].append(one)
                    seconds["decode"][side].append(max(many - one, 0.0) / _DECODED)
        report = last_report(model)
    return {
        "tokens": inputs["input_ids"].shape[1],
        "prefill_seconds": {side: median(found) for side, found in seconds["prefill"].items()},
        "decode_seconds": {side: median(found) for side, found in seconds["decode"].items()},
        "kv_bytes": {"full": report.kv_bytes_baseline, "dare": report.kv_bytes},
        "peak_bytes": peak,
    } | setting(model)


def _timed(
    model: Any, prompts: Prompts, inputs: dict[str, Any], length: int
) -> tuple[float, int | None]:
    """Seconds of a generate of exactly `length` tokens, and the accelerator's peak bytes."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    model.generate(
        **inputs,
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        num_beams=1,
        pad_token_id=prompts.pad_id,
    )
    if cuda:
        torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device) if cuda else None
    return time.perf_counter() - start, peak
