"""`dare-hf bench`: times and bytes with DARE and without, on a random model or the user's own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare_hf.cli.console import AsJson, one_line_errors
from dare_hf.errors import DareConfigError

if TYPE_CHECKING:
    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject

_PROMPT = "Describe the image."


class Series(StrEnum):
    """What is measured."""

    prefill = "prefill"
    decode = "decode"
    generate = "generate"
    hops = "hops"
    memory = "memory"
    batch = "batch"


def bench(
    series: Annotated[Series, typer.Option(help="What is measured.")] = Series.prefill,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=20, help="Prompt tokens, 9 in 10 vision (640); may be given again."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows (1); may be given again.")
    ] = None,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Rows of other lengths, down to half, padded.")
    ] = False,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds of all systems (by series).")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of generate: tokens written.")] = 32,
    hops: Annotated[int, typer.Option(min=1, help="Of hops: how many close.")] = 8,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers (12).")] = None,
    width: Annotated[int | None, typer.Option(min=64, help="Hidden width (768).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and inputs.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 (float32; the model's own).")
    ] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: of the thread, for a busy machine.")
    ] = "wall",
    attn: Annotated[str, typer.Option(help="Attention implementation.")] = "sdpa",
    peer: Annotated[str | None, typer.Option(help="kvpress: race it too.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint of yours: folder or id.")] = None,
    image: Annotated[Path | None, typer.Option(help="Of --model: the picture.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model with DARE against the same weights without it, and with a static cache.

    The systems take turns step by step, so that noise hits all alike. No time is told of a run
    whose tokens fail the masked oracle. Without --model: random weights (speed only, no quality),
    12 layers x 768 behind LLaVA's interface.

    Example: dare-hf bench --series decode --tokens 640 --tokens 2560 --json
    """
    with one_line_errors():
        from dare_hf.benchmark import random_llava, runner

        named: dict[str, Any] = {"layers": layers, "hidden": width, "dtype": dtype}
        setting = random_llava.Setting(
            batch=(batch or [1])[0],
            ragged=ragged,
            pairs=pairs or runner.ROUNDS[series.value],
            new_tokens=new_tokens,
            hops=hops,
            threads=threads,
            seed=seed,
            device=device,
            attn=attn,
            clock=clock,
            **{name: value for name, value in named.items() if value is not None},
        )
        if width is not None:
            setting = replace(setting, intermediate=8 * width // 3)
        runner.check(series.value, setting, peer)
        subject = None
        if model is not None or image is not None:
            _refuse_with_model(
                series,
                model,
                image,
                {"--tokens": tokens, "--layers": layers, "--width": width, "--ragged": ragged},
            )
            subject, setting = _own(str(model), Path(str(image)), setting, dtype)
        result = runner.bench(
            series.value,
            setting,
            lengths=tokens or (),
            batches=batch or (),
            peer=peer,
            subject=subject,
            progress=lambda text: typer.echo(text, err=True),
        )
        _tell(result, plot, as_json)


def _tell(result: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    from dare_hf.benchmark.runner import text

    typer.echo(text(result), err=as_json)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    if plot is not None:
        from dare_hf.benchmark.picture import draw

        draw(result, plot)


def _refuse_with_model(
    series: Series, model: str | None, image: Path | None, options: dict[str, Any]
) -> None:
    """What only the random model has."""
    if model is None or image is None:
        raise DareConfigError("bench: expected --model and --image together; got one of them")
    if told := [name for name, value in options.items() if value]:
        raise DareConfigError(
            f"{told[0]}: expected none with --model, whose sizes and prompt are its own; leave it"
        )
    if series is Series.hops:
        raise DareConfigError(
            "--series hops: expected the random model, whose delimiter is no word; got --model. "
            "`dare-hf report` shows the hops of a model of yours"
        )


def _own(model: str, image: Path, setting: Setting, dtype: str | None) -> tuple[Subject, Setting]:
    """The user's checkpoint with a picture."""
    import torch

    from dare_hf.benchmark.checkpoint import checkpoint_subject, setting_of
    from dare_hf.cli.console import show_no_bars
    from dare_hf.tuning.fidelity import on_device
    from dare_hf.tuning.loading import prepare
    from dare_hf.tuning.rows import asked

    show_no_bars(model)
    row = asked(_PROMPT, [image])
    loaded, prompts, _ = prepare(model, [row])
    loaded = loaded.to(setting.device, getattr(torch, dtype) if dtype else loaded.dtype)
    loaded.set_attn_implementation(setting.attn)
    subject = checkpoint_subject(
        model, loaded, lambda rows: on_device(loaded, prompts.encode([row] * rows)), setting
    )
    return subject, setting_of(loaded, setting)
