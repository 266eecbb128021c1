"""Runs a series over lengths and batches, and tells it as one JSON object and as a table."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.benchmark import batch, decode, generate, hops, memory, prefill
from dare_hf.benchmark.figures import machine
from dare_hf.benchmark.kvpress_peer import NAME as KVPRESS
from dare_hf.benchmark.kvpress_peer import with_kvpress
from dare_hf.benchmark.systems import on_systems, random_subject
from dare_hf.errors import DareConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dare_hf.benchmark.figures import Row
    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject

SERIES: dict[str, Any] = {
    "prefill": prefill,
    "decode": decode,
    "generate": generate,
    "hops": hops,
    "memory": memory,
    "batch": batch,
}
ROUNDS = {"prefill": 9, "decode": 48, "generate": 5, "hops": 3, "memory": 1, "batch": 24}
"""Timed rounds where the caller says no number."""

_AXES = ("hop", "batch", "tokens")


def bench(
    series: str,
    setting: Setting,
    *,
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    peer: str | None = None,
    subject: Subject | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run one series.

    Args:
        series: One of SERIES.
        setting: What is run, at which size.
        lengths: Prompt tokens, each of which is run; none: those of the setting.
        batches: Rows, likewise; the batch series has its own.
        peer: "kvpress", where it is installed.
        subject: The model; None: the random one of the setting.
        progress: Receives a line of text now and then.

    Returns:
        The JSON line of docs/benchmark.md.

    Raises:
        DareConfigError: Something asked for is unknown, or not there.
        DareStateError: A run is wrong; no time is told.
    """
    check(series, setting, peer)
    module, rows = SERIES[series], list[Any]()
    with _threads(setting.threads):
        if subject is None:
            progress(f"building a model of {setting.layers} layers x {setting.hidden}")
            subject = random_subject(setting)
        own = batches or (batch.BATCHES if series == "batch" else (setting.batch,))
        for tokens, many in product(lengths or (setting.tokens,), own):
            here = replace(setting, tokens=tokens, batch=many)
            size = f"{tokens} tokens" if subject.score else "its own prompt"
            progress(f"{series}: {size}, {many} row(s), {setting.pairs} round(s)")
            rows += run_at(subject, module, here, peer)
    return {
        "bench": series,
        **asdict(replace(setting, tokens=rows[0]["tokens"], batch=rows[0]["batch"])),
        **subject.facts,
        "peer": peer,
        "rows": rows,
        **machine(setting.device),
    }


def check(series: str, setting: Setting, peer: str | None) -> None:
    """Refuse what cannot be run, before any model is made.

    Raises:
        DareConfigError: The text says what.
    """
    setting.check()
    if series not in SERIES:
        raise DareConfigError(f"series: expected one of {list(SERIES)}, got {series!r}")
    if peer not in (None, KVPRESS):
        raise DareConfigError(f"peer: expected {KVPRESS!r}, got {peer!r}")


def run_at(subject: Subject, module: Any, setting: Setting, peer: str | None) -> list[Row]:
    """The rows of a series at one length and batch, each with its system and size.

    Args:
        subject: What is run.
        module: The series: its `run`, `NAMES` and, where DARE needs more, `FIELDS`.
        setting: At which size.
        peer: As for `bench`.
    """
    inputs, fields = subject.inputs(setting), getattr(module, "FIELDS", {})
    with (
        on_systems(subject, module.NAMES, **fields) as own,
        with_kvpress(subject, own, inputs, wanted=peer is not None) as systems,
    ):
        found = module.run(subject, systems, setting)
    size = {"tokens": inputs["input_ids"].shape[1], "batch": setting.batch}
    names = [system.name for system in systems]
    return [{"system": names[n % len(names)], **size, **row} for n, row in enumerate(found)]


def axis(rows: Sequence[Row]) -> str:
    """What the rows differ in: hop, batch or tokens."""
    for name in _AXES:
        if len({row.get(name) for row in rows}) > 1:
            return name
    return "tokens"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "hop": ("hop", str),
    "seconds": ("ms", lambda v: f"{1e3 * v:.2f}"),
    "seconds_ratio": ("to plain", lambda v: f"{v:.3f}"),
    "seconds_ratio_range": ("10 to 90 %", lambda v: f"{v[0]:.3f}-{v[1]:.3f}"),
    "first_token": ("first ms", lambda v: f"{1e3 * v:.2f}"),
    "first_token_ratio": ("to plain", lambda v: f"{v:.3f}"),
    "closing_seconds": ("closing ms", lambda v: f"{1e3 * v:.2f}"),
    "tokens_per_second": ("tokens/s", lambda v: f"{v:.1f}"),
    "flops_ratio": ("FLOPs", lambda v: f"{v:.3f}"),
    "peak_bytes": ("peak MiB", lambda v: f"{v / 2**20:.1f}"),
    "peak_ratio": ("to plain", lambda v: f"{v:.3f}"),
    "rss_bytes": ("RSS MiB", lambda v: f"{v / 2**20:.1f}"),
    "kv_ratio": ("KV", lambda v: f"{v:.2f}"),
    "checked": ("checked by", str),
}


def text(result: dict[str, Any]) -> str:
    """The result for people: a table of Markdown under a line that says what was run."""
    rows = result["rows"]
    head = (
        f"{result['bench']}: {result['model']}, {result['parameters'] / 1e6:.1f}M parameters, "
        f"{result['device']} {result['dtype']} {result['attn']}, {result['threads']} thread(s), "
        f"{result['pairs']} round(s), {result['clock']} clock, load {result['load']:.1f}"
    )
    columns = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    names = ["system", "tokens", "batch", *(_COLUMNS[name][0] for name in columns)]
    lines = [head, "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["system"], str(row["tokens"]), str(row["batch"])]
        for name in columns:
            value = row.get(name)
            cells.append("" if value is None else _COLUMNS[name][1](value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
