"""The commands on a user's own rows."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare_hf.cli.console import (
    AsJson,
    one_line_errors,
    progress,
    show_no_bars,
    told_if_interrupted,
)
from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BENCHMARKS = "vsr, vstar, embspatial, winoground, multihopspatial"
# Options that several of them have.
Model = Annotated[str, typer.Argument(help="Folder or hub id of a model; anole, volcano.")]
Data = Annotated[Path, typer.Option(help="JSON lines: messages, or prompt and images.")]
MetricName = Annotated[
    str | None,
    typer.Option(
        help="Of --data: exact (default), choice, regex, likelihood; of --benchmark: generation, "
        "likelihood."
    ),
]
In4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the backbone in nf4.")]


def check(
    model: Model,
    config: Annotated[str, typer.Option(help="A preset, an adapter, or a folder of `tune`.")],
    data: Data,
    floor: Annotated[float, typer.Option(help="Least agreement that passes, in (0, 1].")] = 0.98,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a generate call.")] = 8,
    load_in_4bit: In4Bit = False,
    as_json: AsJson = False,
) -> None:
    """Does a configuration keep the model's predictions on these rows? Exit code 1 if not.

    Agreement: the share of next tokens predicted as by the unpruned model, along each row's answer,
    or along the unpruned model's own of at most 32 tokens.

    Example: dare-hf check MODEL --config safe --data rows.jsonl --floor 0.98
    """
    with one_line_errors():
        from dare_hf.evaluation.processes import is_first, together
        from dare_hf.tuning import check as check_rows

        show_no_bars(model)
        with together() as processes, progress() as tell:
            found = check_rows(
                model,
                config,
                data,
                floor=floor,
                batch_size=batch_size,
                load_in_4bit=load_in_4bit,
                progress=tell,
                processes=processes,
            )
        if as_json and is_first():
            sys.stdout.write(json.dumps(found.to_dict()) + "\n")
        elif is_first():
            low, high = found.interval
            typer.echo(
                f"{'passed' if found.passed else 'failed'}: agreement {found.agreement:.4f} (95 % "
                f"interval {low:.4f} to {high:.4f}), floor {floor}; KL {found.kl:.4f} nats; "
                f"{found.rows} rows"
            )
        if not found.passed:
            raise typer.Exit(1)


def tune(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder that apply_dare takes, with card and page.")],
    max_drop: Annotated[float, typer.Option(help="Points that may be lost.")] = 1.0,
    target: Annotated[
        str | None, typer.Option(help="kv=0.5 or flops=0.6: a share not to be exceeded.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of answers: exact, choice, regex or likelihood.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a scored answer.")] = 64,
    field: Annotated[
        list[str] | None,
        typer.Option(help="NAME=JSON of DareConfig for every configuration; may be repeated."),
    ] = None,
    router: Annotated[bool, typer.Option(help="Fit a router and try it too.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Which half is held out.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a generate call.")] = 8,
    load_in_4bit: In4Bit = False,
    as_json: AsJson = False,
) -> None:
    """Does DARE pay on your model and rows? The smallest budget that keeps its answers.

    Half of the rows fit a router and steer the search, the other half decide. A run that was killed
    goes on where it was. The drop is points of task score where rows have answers, else
    100 x (1 - agreement); its 95 % interval is the promise.

    Example: dare-hf tune MODEL --data rows.jsonl --out tuned --target kv=0.5
    """
    with one_line_errors():
        from dare_hf.evaluation.processes import is_first, together
        from dare_hf.tuning import tune as tune_rows

        show_no_bars(model)
        with (
            told_if_interrupted(lambda: _kept(out)),
            together() as processes,
            _errors_only(),
            progress() as tell,
        ):
            found = tune_rows(
                model,
                data,
                out=out,
                max_drop=max_drop,
                target=target,
                metric=metric,
                max_new_tokens=max_new_tokens,
                fields=_fields(field or []),
                router=router,
                seed=seed,
                batch_size=batch_size,
                load_in_4bit=load_in_4bit,
                progress=tell,
                processes=processes,
            )
        if not is_first():
            return
        found.save(out)
        if as_json:
            sys.stdout.write(json.dumps(found.to_dict()) + "\n")
            return
        typer.echo(found.reason)
        if found.promise is not None:
            typer.echo(found.promise["text"])
        typer.echo(f"page: {out / 'report.html'}")


def _fields(given: list[str]) -> dict[str, object]:
    """Fields of DareConfig as the command line writes them.

    Raises:
        DareInputError: One is not NAME=JSON.
    """
    found: dict[str, object] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise DareInputError(
                f"field: expected NAME=JSON, e.g. prefix_tokens=4; got {text!r}"
            ) from error
    return found


def evaluate(
    model: str,
    data: Path,
    metric: str | None,
    *,
    benchmark: str | None,
    batch_size: int | None,
    config: str | None,
    out: Path | None,
    max_new_tokens: int | None,
    load_in_4bit: bool,
    as_json: bool,
) -> None:
    """`dare-hf eval --data`: the same options, inside `one_line_errors`."""
    from rich.console import Console
    from rich.table import Table

    from dare_hf.evaluation.processes import is_first, together
    from dare_hf.suites import evaluate_suite
    from dare_hf.tuning import evaluate_rows
    from dare_hf.tuning.answers import MAX_NEW_TOKENS

    show_no_bars(model)
    more: dict[str, Any] = {"config": config, "out": out, "load_in_4bit": load_in_4bit}
    interrupted = told_if_interrupted(lambda: _kept(out))
    with interrupted, together() as processes, progress() as tell:
        more |= {"progress": tell, "processes": processes}
        if benchmark is None:
            length = max_new_tokens or MAX_NEW_TOKENS
            found = evaluate_rows(model, data, metric or "exact", max_new_tokens=length, **more)
        else:
            more |= {"batch_size": batch_size or 8, "max_new_tokens": max_new_tokens}
            found = evaluate_suite(model, benchmark, data, scoring=metric, **more)
    if not is_first():
        return
    title = f"{model} on {benchmark or data}"
    lines = Table(title=title, title_justify="left", show_header=False)
    low, high = found["accuracy_interval"]
    interval = f"(95 % interval {low:.1%} to {high:.1%})"
    lines.add_row(f"{found['metric']}, {found['n']} rows", f"{found['accuracy']:.1%} {interval}")
    for name, value in _figures(found.get("totals", {})):
        lines.add_row(name, value)
    if "unparsed" in found:
        lines.add_row("answers that do not parse", f"{found['unparsed']:.1%}")
    if found["flops_ratio"] is None:
        lines.add_row("FLOPs, KV cache", "nothing is pruned")
    else:
        lines.add_row("FLOPs", f"{found['flops_ratio']['all']:.3f} of unpruned")
        lines.add_row("KV cache at the end", f"{found['kv_ratio']:.3f} of unpruned")
    lines.add_row("seconds", f"{found['seconds']:.1f}")
    if found.get("peak_memory_bytes"):
        lines.add_row("peak memory", f"{found['peak_memory_bytes'] / 2**30:.2f} GiB")
    Console(stderr=as_json).print(lines)
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")


def _figures(totals: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Name and text of each figure of a benchmark, those of groups under their group's name."""
    for name, value in totals.items():
        title = f"{above} {name}".strip()
        if not isinstance(value, dict):
            yield title, "none" if value is None else f"{value:.3f}"
        elif "interval" not in value:
            yield from _figures(value, title)
        elif value["n"]:
            low, high = value["interval"]
            text = f"{value['accuracy']:.1%} ({low:.1%} to {high:.1%}, {value['n']} items)"
            rest = {key: value[key] for key in value.keys() - {"n", "accuracy", "interval"}}
            yield title, text
            yield from _figures(rest, title)


def refuse_given(options: Mapping[str, object], data: bool) -> None:
    """Refuse options of `eval` that belong to its other form.

    Raises:
        DareInputError: One is given, or the form for items of a task is started in several
            processes.
    """
    from dare_hf.evaluation.processes import launched

    if not data and launched() > 1:
        raise DareInputError(
            f"processes: expected one for items of a task; got {launched()}. Several share the "
            "rows of --data"
        )
    given = [name for name, value in options.items() if value]
    if given:
        other = "without --data" if data else "with --data"
        raise DareInputError(f"{', '.join(given)}: expected {other} only")


def _kept(out: Path | None) -> str:
    """What is left of a run that was interrupted."""
    if out is None:
        return "nothing was saved. With --out a run goes on where it was"
    if not out.exists():
        return f"nothing was saved: {out} had not been begun"
    return f"what was measured so far is in {out}: the same command goes on from there"


@contextmanager
def _errors_only() -> Iterator[None]:
    """No warnings: what configurations on trial warn of is in the table."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
