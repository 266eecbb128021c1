"""tune: the smallest budget that keeps a model's answers on a user's rows."""

from __future__ import annotations

import random
from base64 import b64decode, b64encode
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dare_hf.architectures.locate import locate
from dare_hf.config import DareConfig
from dare_hf.engine.attach import check_free, unwrap
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.evaluation.processes import ALONE, Processes
from dare_hf.forward.delimiters import resolve_delimiters
from dare_hf.tuning.answers import MAX_NEW_TOKENS, checker, metric_of, named_metric
from dare_hf.tuning.bench import Bench, Measured, Scoring
from dare_hf.tuning.candidates import families, takes
from dare_hf.tuning.fidelity import BATCH
from dare_hf.tuning.journal import Journal
from dare_hf.tuning.loading import as_used, prepare
from dare_hf.tuning.machine import measure_machine
from dare_hf.tuning.result import Bounds, TuneResult, promised
from dare_hf.tuning.router_fit import fitted
from dare_hf.tuning.row_eval import fingerprint
from dare_hf.tuning.search import Search, choose, read_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dare_hf.tuning.candidates import LayerCosts
    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row

JOURNAL, ROUTER = "tune.jsonl", "router"  # what a run that was killed goes on from
LEAST_ROWS = 8
SAFE = "preset safe"


@dataclass(frozen=True)
class _Run:
    """What one run of `tune` works on."""

    model: Any
    prompts: Prompts
    fit: Bench
    held_out: Bench
    images: bool
    fields: dict[str, Any]
    folder: Path
    tell: Callable[[str, int, int], None]
    processes: Processes


def tune(
    model: Any,
    rows: str | Path | Sequence[Row],
    *,
    out: str | Path | None = None,
    max_drop: float = 1.0,
    target: str | None = None,
    metric: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    processor: Any = None,
    fields: Mapping[str, Any] | None = None,
    router: bool = True,
    seed: int = 0,
    batch_size: int = BATCH,
    load_in_4bit: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes = ALONE,
) -> TuneResult:
    """Find the cheapest configuration that keeps the model's answers, and what it promises.

    Half of the rows fit a router and steer the search over budgets; the other half decide. A drop
    is points of task score where answers are given, else 100 x (1 - agreement).

    Args:
        model: A plain model, which is left as it is; or the folder or hub id of one.
        rows: A JSON lines file of rows, or what `read_rows` returned; 64 are enough.
        out: Folder for what was measured, as it comes: a run that was killed goes on there, if it
            is called in the same way. `TuneResult.save(out)` completes it.
        max_drop: Points that may be lost, >= 0.
        target: "kv=0.5" or "flops=0.6": a share that may not be exceeded.
        metric: How answers are scored, see `Metric`; by default likelihood where all rows have
            choices, else exact.
        max_new_tokens: Most tokens of a generated answer that is scored.
        processor: The model's processor or tokenizer; None reads it from the model's folder.
        fields: Fields of DareConfig that every configuration has, e.g. hop_delimiters.
        router: Fit a router and try it; without it only training-free configurations are tried.
        seed: Which rows are held out.
        batch_size: Most rows of a generate call.
        load_in_4bit: Load the backbone in nf4, where a folder is given.
        progress: Called with (stage, done, about how many).
        processes: As `evaluate_rows` takes them. Batches are shared; the first process alone fits
            the router and takes the times.

    Raises:
        DareError: The rows, the model or an argument cannot be used; the text says why.
    """
    if not max_drop >= 0:
        raise DareInputError(f"max_drop: expected points >= 0; got {max_drop}")
    aim = read_target(target)
    chosen_metric = None if metric is None else named_metric(metric)

    def check(given: Sequence[Row]) -> None:
        if len(given) < LEAST_ROWS:
            raise DareInputError(
                f"rows: expected at least {LEAST_ROWS}, half of them held out; got {len(given)}"
            )
        if chosen_metric is not None:
            checker(chosen_metric)(given)
        metric_of(given)

    model, prompts, given = prepare(model, rows, processor, also=check, load_in_4bit=load_in_4bit)
    check_free(unwrap(model))
    scoring = Scoring(chosen_metric or metric_of(given), max_new_tokens)
    held = _fields(fields, prompts.processor)
    about = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "rows": fingerprint(given),
        "seed": seed,
        "metric": None if scoring.metric is None else str(scoring.metric),
        "max_new_tokens": max_new_tokens,
        "fields": {name: repr(value) for name, value in held.items()},
        "batch_size": batch_size,
    }
    with ExitStack() as stack:
        kept = out if processes.first else None
        folder = Path(kept or stack.enter_context(TemporaryDirectory()))
        journal = Journal(folder / JOURNAL, about, processes)
        stack.enter_context(as_used(model))
        shares = _split(given, seed)
        fit, held_out = (
            Bench(model, prompts, share, name, scoring, journal, batch_size, processes)
            for share, name in zip(shares, ("fit", "held-out"), strict=True)
        )
        fit.by_score = held_out.by_score = fit.by_score and held_out.by_score
        tell = progress or (lambda stage, done, total: None)
        images = any(row.images for row in given)
        run = _Run(model, prompts, fit, held_out, images, held, folder, tell, processes)
        return _tuned(run, max_drop, aim, router, about | {"rows": len(given)})


def _tuned(
    run: _Run, max_drop: float, aim: Any, with_router: bool, about: dict[str, Any]
) -> TuneResult:
    router, costs, note = _router(run) if with_router else (None, None, "")
    kinds = families(run.fields, router, costs)
    stages = _Stages(run.tell, "budgets")
    able = partial(takes, run.model, router=router)
    search = Search(run.fit, run.images, router, max_drop, aim, stages.count, able)
    stages.most = search.expected(len(kinds)) + 1
    safe = DareConfig.preset("safe", **_beside(run.fields))
    search.measure(SAFE, safe)
    tried = search.run(kinds)
    run.tell("budgets", stages.done, stages.done)

    looked = _Stages(run.tell, "held out", most=2)

    def on_held_out(family: str, config: DareConfig) -> Measured:
        one = run.held_out.measure(family, config, router)
        looked.count(one)
        return one

    best, seen = choose(search, on_held_out)
    if all(one.family != SAFE for one in seen):
        seen.append(on_held_out(SAFE, safe))
    machine = None
    if best is not None:
        parts = (run.model, run.prompts, run.held_out.rows, best.config, router)
        machine = run.processes.from_first(lambda: measure_machine(*parts))
    return promised(
        best,
        [*tried, *seen],
        Bounds(max_drop, aim),
        about=about,
        router=router,
        machine=machine,
        by_score=run.held_out.by_score,
        scored=run.held_out.scoring.metric is not None,
        notes=[note] if note else [],
        untrained=_untrained(run.model),
    )


def _router(run: _Run) -> tuple[Path | None, LayerCosts | None, str]:
    """The fitted adapter's folder, what pruning each layer costs, and why there is none."""
    if "scorer" in run.fields:
        return None, None, ""
    run.tell("router", 0, 1)
    files, costs, note = run.processes.from_first(lambda: _fitted(run))
    run.tell("router", 1, 1)
    if files is None:
        return None, None, note
    if not run.processes.first:
        (run.folder / ROUTER).mkdir()
        for name, data in files.items():
            (run.folder / ROUTER / name).write_bytes(b64decode(data))
    return run.folder / ROUTER, costs, ""


def _fitted(run: _Run) -> tuple[dict[str, str] | None, LayerCosts | None, str]:
    """The adapter's files, base64, what pruning each layer costs, and why there is no adapter."""
    folder = run.folder / ROUTER
    try:
        costs = fitted(run.model, run.fit.references, run.fields, folder)
    except (DareConfigError, DareInputError, DareStateError) as error:
        return None, None, f"No router was fitted: {error}"
    others = [] if run.processes.count == 1 else sorted(folder.iterdir())
    return {file.name: b64encode(file.read_bytes()).decode() for file in others}, costs, ""


@dataclass
class _Stages:
    """Counts the configurations measured."""

    tell: Callable[[str, int, int], None]
    stage: str
    done: int = 0
    most: int = 1

    def count(self, _: Measured) -> None:
        """One more."""
        self.done += 1
        self.tell(self.stage, self.done, max(self.most, self.done))


def _split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Half to fit, half to decide, each in the rows' order."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    half = len(rows) // 2
    return [rows[i] for i in sorted(order[:half])], [rows[i] for i in sorted(order[half:])]


def _fields(fields: Mapping[str, Any] | None, processor: Any) -> dict[str, Any]:
    """Fields every configuration has, checked; delimiters as ids."""
    found = dict(fields or {})
    DareConfig(**found)
    if found.get("scorer") == "router" or found.get("schedule") == "learned":
        raise DareConfigError(
            "fields: expected none that needs a trained adapter; got scorer 'router' or schedule "
            "'learned'. tune fits a router by itself"
        )
    if found.get("hop_delimiters"):
        found["hop_delimiters"] = resolve_delimiters(found["hop_delimiters"], processor)
    return found


def _beside(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What of the fields goes beside what makes the preset "safe"."""
    own = ("schedule", "vision_retention", "text_retention", "plan_every", "uniform_share")
    return {name: value for name, value in fields.items() if name not in own}


def _untrained(model: Any) -> bool:
    """Whether the decoder's norms are all as they were made, which training never leaves."""
    norms = [
        parameter
        for layer in locate(unwrap(model)).layers
        for name, parameter in layer.named_parameters()
        if "norm" in name.rpartition(".")[0].lower() and parameter.ndim == 1
    ]
    return bool(norms) and all(bool((norm == norm[0]).all()) for norm in norms)
