"""The command on files of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare_hf.cli.console import one_line_errors


def tables(
    results: Annotated[Path, typer.Argument(help="Folder of JSON lines files of results.")],
    model: Annotated[str | None, typer.Option(help="Only the results of this model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Page to write; else it is printed.")] = None,
) -> None:
    """Make the page of tables from files of results: accuracy, costs, paired differences.

    Each line of the files holds one run, item by item; the page says the schema.

    Example: dare-hf tables docs/results --model anole --out docs/results-anole.md
    """
    with one_line_errors():
        from dare_hf.evaluation.results import results_page

        page = results_page(results, model)
        if out is None:
            typer.echo(page, nl=False)
        else:
            out.write_text(page, encoding="utf-8")
