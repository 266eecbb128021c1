"""`dare-hf report` and `dare-hf plot`: one generate, as a page and as pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dare_hf.cli.console import AsJson, one_line_errors, show_no_bars
from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from dare_hf.cli.one_run import OneRun

Model = Annotated[str, typer.Argument(help="Folder or hub id of a model; anole, volcano.")]
Prompt = Annotated[
    str | None, typer.Option(help="The question. An embedded model without one: a held-out item.")
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", help="A picture; may be given again.")
]
Config = Annotated[
    str | None,
    typer.Option(
        help='A preset, a folder, a hub id ("safe"). Of a held-out item: an adapter, or "safe".'
    ),
]
Most = Annotated[int, typer.Option(min=1, help="Most tokens of the answer to --prompt.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the held-out items.")]


def report(
    model: Model = "anole",
    prompt: Prompt = None,
    image: Images = None,
    config: Config = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    max_new_tokens: Most = 64,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run one generate with DARE and write a page about it: one file, no network needed.

    The answer, the pictures with what early, middle and late layers held of each patch at each hop,
    what each layer held of vision and text, FLOPs and KV cache beside the unpruned model's,
    seconds, notes.

    Example: dare-hf report MODEL --image photo.jpg --prompt "What is this?" --out page.html
    """
    with one_line_errors():
        show_no_bars(model)
        _check_writable(out)
        ran = _run(model, prompt, image, config, max_new_tokens, seed)
        page = ran.report.to_html(answer=ran.answer, images=ran.images, title=ran.title)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        typer.echo(f"{ran.answer}\n\n{ran.report}\n\npage: {out}", err=as_json)
        if as_json:
            found = {"title": ran.title, "answer": ran.answer, "page": str(out)}
            sys.stdout.write(json.dumps(found | ran.report.to_dict()) + "\n")


def plot(
    model: Model = "anole",
    prompt: Prompt = None,
    image: Images = None,
    config: Config = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("plots"),
    max_new_tokens: Most = 64,
    seed: Seed = 0,
) -> None:
    """Run one generate with DARE and draw what the layers held, as PNG files.

    retention_by_hop.png: the share of vision and text each layer held when each hop began.
    retention.png: the pictures, and what groups of layers held of their patches; where it is known
    how a picture's tokens lie in it, and all pictures have equal grids.

    Example: dare-hf plot MODEL --image photo.jpg --prompt "What is this?" --out plots
    """
    with one_line_errors():
        from dare_hf.demo.picture import PICTURE, RATES_PICTURE, draw
        from dare_hf.visualize import figure_and_canvas, plot_rates

        figure_and_canvas()  # what is missing is told before anything runs
        show_no_bars(model)
        ran = _run(model, prompt, image, config, max_new_tokens, seed)
        figures = {RATES_PICTURE: plot_rates(ran.report.retention, "What each layer held")}
        grids = {held.shape[1:] for seen in ran.images for held in seen.held.values()}
        if len(grids) == 1:
            figures[PICTURE] = draw([seen for seen in ran.images if seen.held], ran.title)
        elif ran.images:
            typer.echo(
                f"no {PICTURE}: expected pictures of equal, known grids; got {sorted(grids)}. "
                "`dare-hf report` takes any",
                err=True,
            )
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(out / name, dpi=150)
            typer.echo(f"picture: {out / name}")


def _run(
    model: str,
    prompt: str | None,
    images: list[Path] | None,
    config: str | None,
    max_new_tokens: int,
    seed: int,
) -> OneRun:
    """The run the options ask for.

    Raises:
        DareInputError: A model that is not embedded is asked nothing.
    """
    from dare_hf.cli import one_run
    from dare_hf.tuning.loading import EMBEDDED

    if prompt is not None:
        return one_run.question(model, prompt, images or [], config or "safe", max_new_tokens)
    if images:
        raise DareInputError("--image: expected a --prompt beside it; got none")
    if model not in EMBEDDED:
        raise DareInputError(
            f"--prompt: expected a question for {model!r}; got none. Held-out items are there for "
            f"{' and '.join(EMBEDDED)} only"
        )
    return one_run.held_out(model, seed, config)


def _check_writable(out: Path) -> None:
    """Refuse, before anything runs, a page that cannot be a file.

    Raises:
        DareInputError: It is a folder.
    """
    if out.is_dir():
        raise DareInputError(f"--out: expected a file to write; got the folder {out}")
