"""`dare-hf convert`: the papers' checkpoints as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare_hf.cli.console import one_line_errors

app = typer.Typer(help="Write a paper's checkpoint as a folder that transformers loads.")

Source = Annotated[Path, typer.Argument(help="Folder of the downloaded checkpoint.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; must not exist.")]


@app.command()
def volcano(
    source: Source,
    out: Out,
    tower: Annotated[
        Path | None,
        typer.Option(help="config.json of its CLIP tower, if that is not CLIP-L/14 at 336."),
    ] = None,
) -> None:
    """VolCano (luoruipu1/Volcano-7b, of VoCoT) as a LLaVA.

    One file of weights is in memory at a time, and no code of the folder runs.

    Example: dare-hf convert volcano Volcano-7b volcano-llava
    """
    with one_line_errors():
        from dare_hf.convert import convert_volcano

        convert_volcano(source, out, tower)
        typer.echo(f"a LLaVA: {out}")


@app.command()
def anole(
    source: Source,
    out: Out,
    decoder: Annotated[
        Path | None, typer.Option(help="Folder or file of the VQGAN that has the decoder.")
    ] = None,
) -> None:
    """Anole (leloy/Anole-7b-v0.1-hf) with its image decoder beside it, so that it can draw.

    One file of weights is in memory at a time, and no code of the folder runs.

    Example: dare-hf convert anole Anole-7b-v0.1-hf anole --decoder vqgan.ckpt
    """
    with one_line_errors():
        from dare_hf.convert import convert_anole

        convert_anole(source, out, decoder)
        typer.echo(f"a Chameleon that draws: {out}")
