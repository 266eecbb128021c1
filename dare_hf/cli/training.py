"""`dare-hf train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare_hf.cli.console import one_line_errors, progress, told_if_interrupted


def _kept(folder: str) -> str:
    """What is left of a training that was interrupted."""
    from dare_hf.recipes.run import last_checkpoint

    found = last_checkpoint(folder)
    if found is None:
        return "nothing was saved. With save_every in the recipe a run leaves checkpoints"
    return f"the last checkpoint is {found}: the same command with --resume goes on from there"


def train(
    config: Annotated[Path, typer.Option(help="YAML file; examples/router.yaml is one.")],
    model: Annotated[str | None, typer.Option(help="Instead of the file's model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Instead of the file's folder.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the file's steps.")] = None,
    load_in_4bit: Annotated[bool, typer.Option(help="Load the backbone in nf4.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's last checkpoint.")] = False,
) -> None:
    """Train routers, alone or with a LoRA, as a file says.

    The adapters are saved to `dare/` and `lora/` in the output folder, with the training log.
    In several processes: torchrun --nproc_per_node 2 -m dare_hf.cli train --config FILE

    Example: dare-hf train --config examples/router.yaml --out runs/mine
    """
    with one_line_errors():
        from dare_hf import recipes
        from dare_hf.evaluation.processes import is_first, together
        from dare_hf.training import end_processes

        folder = None if out is None else str(out)
        quantised = True if load_in_4bit else None
        recipe = recipes.load_recipe(
            config, model=model, out=folder, steps=steps, load_in_4bit=quantised
        )
        interrupted = told_if_interrupted(lambda: _kept(recipe.out))
        with interrupted, together(), progress() as tell:
            result = recipes.train(recipe, resume=resume, progress=tell)
        if is_first():
            for name, place in result.folders.items():
                typer.echo(f"{name}: {place}")
        end_processes()
