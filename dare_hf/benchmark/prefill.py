"""Prefill time with DARE against the unpatched model, in interleaved pairs (docs/benchmark.md)."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers

import dare_hf
from dare_hf import DareConfig, apply_dare, last_report, register_scorer, remove_dare
from dare_hf.architectures.locate import locate
from dare_hf.benchmark.random_llava import (
    DTYPES,
    Setting,
    build_inputs,
    build_model,
    linear_scorer,
)
from dare_hf.errors import DareConfigError
from dare_hf.report.flops import head_flops, shapes_of, unpruned_flops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

SCORER = "bench_linear"
VISION_RETENTION, TEXT_RETENTION = 0.4, 0.7
_WARM_UP = 2


def run(setting: Setting, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Times two series, retention 0.4 / 0.7 and 1.0 / 1.0, each against the unpatched model.

    Args:
        setting: What is run.
        progress: Receives a line of text now and then.

    Returns:
        The JSON line of docs/benchmark.md.

    Raises:
        DareConfigError: Unknown dtype, or no such device here.
    """
    _check(setting)
    tell = (lambda text: None) if progress is None else progress
    with _threads(setting.threads), torch.inference_mode():
        tell(f"building a model of {setting.layers} layers x {setting.hidden}")
        plain = build_model(setting)
        inputs = build_inputs(setting, plain)
        register_scorer(SCORER, linear_scorer(setting))
        series = {}
        for name, rates in (
            ("pruned", (VISION_RETENTION, TEXT_RETENTION)),
            ("retention_1", (1.0, 1.0)),
        ):
            tell(f"{name}: vision {rates[0]}, text {rates[1]}, {setting.pairs} pairs")
            series[name] = time_pairs(plain, inputs, rates, setting)
    return {
        "bench": "prefill",
        **asdict(setting),
        "vision_tokens": setting.vision,
        "text_tokens": setting.tokens - setting.vision,
        "parameters": sum(p.numel() for p in plain.model.language_model.parameters()),
        **series,
        "hardware": _hardware(setting.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dare_hf": dare_hf.__version__,
    }


def time_pairs(
    plain: nn.Module, inputs: dict[str, Any], rates: tuple[float, float], setting: Setting
) -> dict[str, Any]:
    """Alternates prefills of the unpatched model and of a patched one that shares its weights."""
    shared = {id(p): p for p in (*plain.parameters(), *plain.buffers())}
    patched = copy.deepcopy(plain, shared)
    config = DareConfig(
        vision_retention=rates[0], text_retention=rates[1], schedule="constant", scorer=SCORER
    )
    apply_dare(patched, config)
    try:
        for _ in range(_WARM_UP):
            _seconds(plain, inputs, setting)
            _seconds(patched, inputs, setting)
        times = [_pair(plain, patched, inputs, setting, k % 2 == 1) for k in range(setting.pairs)]
        output = patched(**inputs)  # held: the report reads the bytes of a living cache
        report = last_report(patched)
        del output
    finally:
        remove_dare(patched)
    flops = sum(report.flops.values())
    full = _unpruned_flops(plain, setting)
    ratios = sorted(dare / unpatched for unpatched, dare in times)
    return {
        "vision_retention": rates[0],
        "text_retention": rates[1],
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [ratios[0], ratios[-1]],
        "flops_ratio": flops / full,
        "gflops": flops / 1e9,
        "gflops_unpatched": full / 1e9,
        "kv_ratio": report.kv_bytes / report.kv_bytes_baseline,
        "seconds": statistics.median(dare for _, dare in times),
        "seconds_unpatched": statistics.median(unpatched for unpatched, _ in times),
    }


def _pair(
    plain: nn.Module, patched: nn.Module, inputs: dict[str, Any], setting: Setting, swap: bool
) -> tuple[float, float]:
    """Seconds of (unpatched, patched); `swap` runs the patched one first."""
    if swap:
        dare = _seconds(patched, inputs, setting)
        return _seconds(plain, inputs, setting), dare
    return _seconds(plain, inputs, setting), _seconds(patched, inputs, setting)


def _seconds(model: nn.Module, inputs: dict[str, Any], setting: Setting) -> float:
    _wait(setting.device)
    start = time.perf_counter()
    model(**inputs)
    _wait(setting.device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _unpruned_flops(model: nn.Module, setting: Setting) -> int:
    parts = locate(model)
    shapes = shapes_of(parts.layers, parts.text_config)
    head = head_flops(setting.hidden, setting.vocab, 1)
    return unpruned_flops(shapes, [setting.tokens], [setting.tokens]) + head


def _check(setting: Setting) -> None:
    if setting.dtype not in DTYPES:
        raise DareConfigError(f"dtype: expected one of {list(DTYPES)}, got {setting.dtype!r}")
    cuda = setting.device.startswith("cuda")
    if not cuda and setting.device != "cpu":
        raise DareConfigError(f"device: expected cpu or cuda, got {setting.device!r}")
    if cuda and not torch.cuda.is_available():
        raise DareConfigError(f"device: expected one that is there, got {setting.device!r}")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {capability}, {os.cpu_count()} cores"


def text(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    lines = [
        f"prefill of {result['vision_tokens']} vision + {result['text_tokens']} text tokens, "
        f"{result['parameters'] / 1e6:.1f}M parameters, {result['device']} {result['dtype']}, "
        f"{result['threads']} thread(s), {result['pairs']} pairs",
        f"{'retention (vision, text)':26}{'unpatched':>11}{'DARE':>9}"
        f"{'time':>7}{'FLOPs':>7}{'KV':>6}",
    ]
    for name in ("pruned", "retention_1"):
        one = result[name]
        low, high = one["time_ratio_range"]
        label = f"{one['vision_retention']}, {one['text_retention']}"
        lines.append(
            f"{label:26}{one['seconds_unpatched']:>9.3f} s{one['seconds']:>7.3f} s"
            f"{one['time_ratio']:>7.3f}{one['flops_ratio']:>7.3f}{one['kv_ratio']:>6.2f}"
            f"  (time {low:.3f} to {high:.3f})"
        )
    return "\n".join(lines)
