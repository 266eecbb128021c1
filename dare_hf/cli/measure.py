"""`dare-hf conformance` and `dare-hf bench`: what holds everywhere, and what it saves."""

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


def bench(
    tokens: Annotated[int, typer.Option(min=20, help="Prompt tokens, 9 in 10 vision.")] = 640,
    pairs: Annotated[int, typer.Option(min=1, help="Interleaved pairs per series.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and inputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Time prefill with DARE against the unpatched model, beside the ratio of their FLOPs.

    A random Llama-type text model of 109.5M parameters behind LLaVA's interface, batch 1; retention
    0.4 vision / 0.7 text in every layer, then 1.0, with a linear scorer. Random weights: speed
    only, no quality.

    Example: dare-hf bench --tokens 1280 --pairs 21 --json
    """
    with one_line_errors():
        from dare_hf.benchmark import prefill, random_llava

        setting = random_llava.Setting(
            tokens=tokens, pairs=pairs, threads=threads, seed=seed, device=device, dtype=dtype
        )
        result = prefill.run(setting, progress=lambda text: typer.echo(text, err=True))
        typer.echo(prefill.text(result), err=as_json)
        if as_json:
            sys.stdout.write(json.dumps(result) + "\n")
