"""What commands share: refusals in one line, bars, the option --json."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dare_hf.errors import DareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dare_hf.demo.runner import Runner

REFUSED = 2  # exit code of everything that was refused with a reason
INTERRUPTED = 130  # as shells have it

AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON line on stdout, all else on stderr.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A refusal is one line on stderr and exit code 2; every command runs in it."""
    importlib.import_module("dare_hf.peft_method")  # which the console script has put off
    from dare_hf.evaluation.processes import OtherProcessError, is_first

    try:
        yield
    except OtherProcessError as error:
        if is_first() and not error.told:
            typer.echo(f"dare-hf: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    except DareError as error:
        typer.echo(f"dare-hf: {error}", err=True)
        raise typer.Exit(REFUSED) from error


def embedded_runner(name: str) -> Runner:
    """An embedded model, ready on as many threads as it is worth."""
    import torch
    from transformers.utils import logging

    from dare_hf.demo import embedded

    if threads := embedded.runner_type(name).threads:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    return embedded.load_runner(name)


def show_no_bars(model: str) -> None:
    """No bars, and warnings once; one thread for so small a model as the embedded ones."""
    import torch
    from transformers.utils import logging

    from dare_hf.evaluation.processes import is_first
    from dare_hf.tuning.loading import EMBEDDED

    if not is_first():
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    if Path(model).name in {*EMBEDDED, *EMBEDDED.values()}:
        torch.set_num_threads(1)


@contextmanager
def told_if_interrupted(saved: Callable[[], str]) -> Iterator[None]:
    """An interrupt is one line on stderr, which says what was saved, and exit code 130.

    Args:
        saved: Says it.
    """
    from dare_hf.evaluation.processes import is_first

    try:
        yield
    except KeyboardInterrupt as error:
        if is_first():
            typer.echo(f"dare-hf: interrupted; {saved()}", err=True)
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per side on stderr, of the first process; yields what takes (side, done, total)."""
    from dare_hf.evaluation.processes import is_first

    if not is_first():
        yield lambda side, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:5}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    # rich sends prints above its bar, to stderr: right on a terminal, wrong for a pipe of stdout.
    shared = sys.stdout.isatty()
    stderr = Console(stderr=True)
    with Progress(*columns, *times, console=stderr, redirect_stdout=shared) as bars:
        tasks: dict[str, object] = {}

        def tell(side: str, done: int, total: int) -> None:
            if side not in tasks:
                tasks[side] = bars.add_task(side, total=total)
            bars.update(tasks[side], completed=done, total=total)  # ty: ignore[invalid-argument-type]

        yield tell
