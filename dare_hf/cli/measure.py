"""`dare-hf conformance`: what holds everywhere."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Annotated

import typer

from dare_hf.cli.console import AsJson, one_line_errors, progress


class ModelKind(StrEnum):
    """What `conformance` runs."""

    vision = "vision"
    text = "text"


def conformance(
    only: Annotated[
        list[str] | None, typer.Option(help="Only this model_type; may be given again.")
    ] = None,
    kind: Annotated[
        ModelKind, typer.Option(help="text: language models (AutoModelForCausalLM).")
    ] = ModelKind.vision,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Hold every image-text-to-text architecture of transformers to the laws, or every text one.

    Builds a tiny random model of each, runs it with and without DARE and compares tokens, logits,
    stored bytes and what is left after removal. Exit code 1 if a row fails.

    Example: dare-hf conformance --only llava --only qwen2_5_vl
    """
    with one_line_errors():
        from dare_hf.conformance import Kind, run_all
        from dare_hf.conformance.runner import architectures

        rows = []
        names = only or list(architectures(Kind(kind.value)))
        with progress() as tell:
            for row in run_all(names, kind=Kind(kind.value), jobs=jobs):
                rows.append(row)
                line = f"{row.status:8} {row.model_type:24} {row.seconds:5.1f} s  {row.reason}"
                typer.echo(line, err=as_json)
                tell("rows", len(rows), len(names))
        if as_json:
            sys.stdout.write(json.dumps({"rows": [row.to_dict() for row in rows]}) + "\n")
        else:
            counts = {s: sum(row.status == s for row in rows) for s in ("pass", "refused", "fail")}
            typer.echo(", ".join(f"{count} {status}" for status, count in counts.items()))
        if any(row.status == "fail" for row in rows):
            raise typer.Exit(1)
