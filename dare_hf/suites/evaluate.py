"""A model on a benchmark, pruned or not; a killed run goes on behind the items it has done."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError
from dare_hf.evaluation.measurement import setting as machine
from dare_hf.evaluation.processes import ALONE, Processes
from dare_hf.suites.base import Item, Scoring, Suite, Verdict, taken
from dare_hf.suites.embspatial import EmbSpatial
from dare_hf.suites.multihop_spatial import MultihopSpatial
from dare_hf.suites.records import read_records
from dare_hf.suites.vsr import Vsr
from dare_hf.suites.vstar import Vstar
from dare_hf.suites.winoground import Winoground
from dare_hf.tuning.answers import likelihoods
from dare_hf.tuning.fidelity import greedy, on_device
from dare_hf.tuning.journal import Journal
from dare_hf.tuning.loading import prepare
from dare_hf.tuning.row_eval import ask_all, fingerprint, named_config, summary

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from dare_hf.config import DareConfig
    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (Vsr(), Vstar(), EmbSpatial(), Winoground(), MultihopSpatial())
}


def named_suite(name: str) -> Suite:
    """The benchmark of that name.

    Raises:
        DareInputError: There is none.
    """
    if name not in SUITES:
        raise DareInputError(f"benchmark: expected one of {', '.join(SUITES)}; got {name!r}")
    return SUITES[name]


def evaluate_suite(
    model: Any,
    benchmark: str,
    data: str | Path,
    *,
    scoring: Scoring | str | None = None,
    config: DareConfig | str | os.PathLike[str] | None = None,
    processor: Any = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    load_in_4bit: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Answer each item of a benchmark and score it as its authors do, and as VoCoT does.

    Args:
        model: A plain model, which is left as it is; or the folder or hub id of one.
        benchmark: One of `SUITES`.
        data: The folder the benchmark was downloaded to, or its data file.
        scoring: One of the benchmark's own; None takes the first of them.
        config: As `apply_dare` takes it; None measures the unpruned model.
        processor: The model's processor; None reads it from the model's folder.
        batch_size: Most sequences of a generate call; each choice of an item is one. One item at
            a time where the tokenizer cannot pad.
        max_new_tokens: Most tokens of a generated answer; None takes the benchmark's own.
        out: A file that gets a line for each item when its batch is done; a run that was killed
            goes on behind them and has the same result.
        load_in_4bit: Load the backbone in nf4, where a folder is given.
        progress: Called with ("rows", items done, items in all).
        processes: As `evaluate_rows` takes them; batches are shared.

    Returns:
        What `evaluate_rows` returns, with `unparsed` (share of answers that do not parse),
        `totals` (the benchmark's further figures) and `peak_memory_bytes` (of the accelerator;
        of the process, where there is none; None on Windows without one; of the process that took
        most, where there are several).

    Raises:
        DareError: The data, the model or the configuration cannot be used, or `out` is of another
            run; the text says why, and of data the file and line.
    """
    suite = named_suite(benchmark)
    scoring = _named_scoring(suite, scoring)
    items = [
        item
        for record in read_records(Path(data), suite.files)
        for item in suite.ask(record, scoring)
    ]
    rows = [item.row for item in items]
    model, prompts, _ = prepare(model, rows, processor, load_in_4bit=load_in_4bit)
    length = max_new_tokens or suite.max_new_tokens
    about = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "benchmark": benchmark,
        "metric": str(scoring),
        "config": named_config(config),
        "items": _fingerprint(items),
        "max_new_tokens": length if scoring is Scoring.generation else None,
        "batch_size": batch_size,
    }
    ask = _asker(suite, scoring, model, prompts, items, length)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    groups = batches(rows, batch_size if prompts.tokenizer.pad_token_id is not None else 1)
    journal = Journal(out, about, processes)
    found = ask_all(model, groups, ask, journal, prompts, config, progress, processes)
    peaks = processes.gathered(_peak_memory(model))
    return {
        **about,
        **summary(found),
        "unparsed": sum(not one["parsed"] for one in found) / len(found),
        "totals": suite.totals(scoring, items, found),
        "peak_memory_bytes": None if None in peaks else max(peaks),
    } | machine(model)


def _asker(
    suite: Suite, scoring: Scoring, model: Any, prompts: Prompts, items: Sequence[Item], length: int
) -> Callable[[Sequence[Row]], list[Verdict]]:
    """What asks about rows of items in one generate call."""
    of_row = {id(item.row): item for item in items}

    def ask(group: Sequence[Row]) -> list[Verdict]:
        picked = [of_row[id(row)] for row in group]
        if scoring is Scoring.likelihood:
            return _chosen(suite, model, prompts, picked)
        return _read(suite, model, prompts, picked, length)

    return ask


def batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows in order, at most `size` sequences a batch (one for each choice), at least one row."""
    made: list[list[Row]] = []
    room = 0
    for row in rows:
        sequences = max(len(row.choices), 1)
        if sequences > room:
            made.append([])
            room = size
        made[-1].append(row)
        room -= sequences
    return made


def _named_scoring(suite: Suite, name: str | None) -> Scoring:
    if name is None:
        return suite.scorings[0]
    if name not in suite.scorings:
        raise DareInputError(
            f"metric: expected {' or '.join(suite.scorings)} for {suite.name}; got {name!r}"
        )
    return Scoring(name)


def _read(
    suite: Suite, model: Any, prompts: Prompts, items: Sequence[Item], length: int
) -> list[Verdict]:
    inputs = on_device(model, prompts.encode([item.row for item in items]))
    ids = greedy(model, inputs, length, prompts.pad_id).tolist()
    said = [prompts.text(one) for one in ids]
    return [{"said": text} | suite.read(text, item) for text, item in zip(said, items, strict=True)]


def _chosen(suite: Suite, model: Any, prompts: Prompts, items: Sequence[Item]) -> list[Verdict]:
    made = []
    found = likelihoods(model, prompts, [item.row for item in items])
    for item, (sums, tokens) in zip(items, found, strict=True):
        one: Verdict = {"sums": sums, "tokens": tokens}
        said = item.row.choices[taken(one, suite.reduction)]
        made.append({"said": said, "score": float(said == item.row.answer), "parsed": True} | one)
    return made


def _fingerprint(items: Sequence[Item]) -> str:
    facts = repr([item.facts for item in items]).encode()
    rows = fingerprint([item.row for item in items])
    return hashlib.sha256(rows.encode() + facts).hexdigest()[:16]


def _peak_memory(model: Any) -> int | None:
    """Most bytes held on the accelerator since it was reset, or by this process so far."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts KiB
