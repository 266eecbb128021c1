"""Task score, costs and time of a model on a user's rows, with a configuration or without."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.api import dare_applied, last_report
from dare_hf.config import DareConfig
from dare_hf.evaluation.costs import PHASES
from dare_hf.evaluation.intervals import mean_score
from dare_hf.evaluation.measurement import setting as machine
from dare_hf.evaluation.processes import ALONE, Processes
from dare_hf.tuning.answers import MAX_NEW_TOKENS, Metric, answer, checker, named_metric
from dare_hf.tuning.journal import Journal
from dare_hf.tuning.loading import as_used, prepare
from dare_hf.tuning.rows import Inline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row

Costs = dict[str, dict[str, float]]


def evaluate_rows(
    model: Any,
    rows: str | Path | Sequence[Row],
    metric: Metric | str,
    *,
    config: DareConfig | str | os.PathLike[str] | None = None,
    processor: Any = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    out: str | Path | None = None,
    load_in_4bit: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Answer each row greedily and score it.

    Args:
        model: A plain model, which is left as it is; or the folder or hub id of one.
        rows: A JSON lines file of rows, or what `read_rows` returned.
        metric: See `Metric`.
        config: As `apply_dare` takes it; None measures the unpruned model.
        processor: The model's processor or tokenizer; None reads it from the model's folder.
        max_new_tokens: Most tokens of a generated answer.
        out: A file that gets a line for each row when it is done; a run that was killed goes on
            behind them and has the same result.
        load_in_4bit: Load the backbone in nf4, where a folder is given.
        progress: Called with ("rows", rows done, rows in all).
        processes: Those that share the rows; each of them calls this alike, the first one writes
            `out`, and all have the result. See `together`.

    Returns:
        `n`, `accuracy` (the mean score), `accuracy_interval`, `flops_ratio` and `kv_ratio` (None
        where nothing is pruned), `seconds`, `right` (a 1 or 0 for each row; None where scores are
        shares), `scores`, and the setting.

    Raises:
        DareError: The rows, the model or the configuration cannot be used, or `out` is of another
            run; the text says why.
    """
    metric = named_metric(metric)
    model, prompts, given = prepare(
        model, rows, processor, also=checker(metric), load_in_4bit=load_in_4bit
    )
    about = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "metric": str(metric),
        "config": named_config(config),
        "rows": fingerprint(given),
        "max_new_tokens": max_new_tokens,
    }

    def ask(rows: Sequence[Row]) -> list[dict[str, Any]]:
        said, score = answer(model, prompts, rows[0], metric, max_new_tokens)
        return [{"said": said, "score": score}]

    journal = Journal(out, about, processes)
    groups = [[row] for row in given]
    found = ask_all(model, groups, ask, journal, prompts, config, progress, processes)
    return {**about, "rows": len(given)} | summary(found) | machine(model)


def ask_all(
    model: Any,
    groups: Sequence[Sequence[Row]],
    ask: Callable[[Sequence[Row]], list[dict[str, Any]]],
    journal: Journal,
    prompts: Prompts,
    config: DareConfig | str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Ask a model about rows, group by group; a group that the journal holds whole is not asked.

    Args:
        model: A plain model, which is left as it is.
        groups: All rows in order, those of a generate call together.
        ask: Makes one generate call for a group; a JSON object of each row, "score" among it.
        journal: Gets a line a row when its group is done; at the end it is in the rows' order.
        prompts: Of the model's processor.
        config: As `apply_dare` takes it; None leaves the model unpruned.
        progress: Called with ("rows", rows done, rows in all).
        processes: Those that share the groups; the journal was made with them.

    Returns:
        Those objects in order, with "seconds" and "costs" (None where nothing is pruned): an equal
        part of the group's for each of its rows.
    """
    dare = (
        nullcontext(model)
        if config is None
        else dare_applied(model, config, processor=prompts.processor)
    )
    numbers = iter(range(1, sum(map(len, groups)) + 1))
    keys = [[str(next(numbers)) for _ in group] for group in groups]
    total = [key for group in keys for key in group]
    missing = [k for k, group in enumerate(keys) if any(key not in journal for key in group)]
    done = len(total) - sum(len(keys[k]) for k in missing)

    def told(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress("rows", done, len(total))

    def keep(place: int, items: list[dict[str, Any]]) -> None:
        for key, item in zip(keys[missing[place]], items, strict=True):
            if key not in journal:
                journal[key] = item
        told(len(items))

    def measured(place: int) -> list[dict[str, Any]]:
        return _measured(model, groups[place], ask, config is not None)

    told(0)
    with as_used(model), dare:
        processes.mapped(missing, measured, keep)
    journal.put_in_order(total)
    return [journal[key] for key in total]


def fingerprint(rows: Sequence[Row]) -> str:
    """What tells rows from others: all they say, and their images' bytes."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.line, row.messages, row.answer, row.choices)).encode())
        for file in row.images:
            digest.update(file.read_bytes() if isinstance(file, Path | Inline) else file.tobytes())
    return digest.hexdigest()[:16]


def named_config(config: DareConfig | str | os.PathLike[str] | None) -> Any:
    """A configuration as a journal holds it."""
    if config is None or isinstance(config, DareConfig):
        return None if config is None else config.to_dict()
    folder = Path(config)
    files = sorted(folder.glob("adapter_*")) if folder.is_dir() else []
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return f"{os.fspath(config)} {digest}" if files else os.fspath(config)


def _measured(
    model: Any,
    group: Sequence[Row],
    ask: Callable[[Sequence[Row]], list[dict[str, Any]]],
    pruned: bool,
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    items = ask(group)
    part = {"seconds": (time.perf_counter() - start) / len(group), "costs": None}
    if pruned:
        report = last_report(model)
        totals = {"kv": (report.kv_bytes, report.kv_bytes_baseline)}
        totals |= {phase: (report.flops[phase], report.flops_baseline[phase]) for phase in PHASES}
        part["costs"] = {
            name: {"got": got / len(group), "full": full / len(group)}
            for name, (got, full) in totals.items()
        }
    return [item | part for item in items]


def summary(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean score with its interval, costs and seconds of what `ask_all` returned."""
    scores = [item["score"] for item in items]
    whole = all(score in (0.0, 1.0) for score in scores)
    costs = [item["costs"] for item in items if item["costs"] is not None]
    flops = {phase: _ratio(costs, phase) for phase in PHASES} | {"all": _ratio(costs, *PHASES)}
    return {
        "n": len(items),
        "accuracy": sum(scores) / len(scores),
        "accuracy_interval": list(mean_score(scores)),
        "flops_ratio": flops if costs else None,
        "kv_ratio": _ratio(costs, "kv") if costs else None,
        "seconds": sum(item["seconds"] for item in items),
        "right": "".join(str(int(score)) for score in scores) if whole else None,
        "scores": scores,
    }


def _ratio(costs: Sequence[Costs], *names: str) -> float | None:
    got, full = (sum(c[n][part] for c in costs for n in names) for part in ("got", "full"))
    return got / full if full else None
