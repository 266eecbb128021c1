"""What commands share: refusals in one line, bars, the option --json."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from dare_hf.errors import DareError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFUSED = 2  # exit code of everything that was refused with a reason

AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON line on stdout, all else on stderr.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A refusal is one line on stderr and exit code 2."""
    try:
        yield
    except DareError as error:
        typer.echo(f"dare-hf: {error}", err=True)
        raise typer.Exit(REFUSED) from error


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per side on stderr; yields what takes (side, done, total)."""
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
    with Progress(*columns, *times, console=Console(stderr=True)) as bars:
        tasks: dict[str, object] = {}

        def tell(side: str, done: int, total: int) -> None:
            if side not in tasks:
                tasks[side] = bars.add_task(side, total=total)
            bars.update(tasks[side], completed=done, total=total)  # ty: ignore[invalid-argument-type]

        yield tell
