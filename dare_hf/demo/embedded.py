"""The embedded models and the configuration the demo runs them with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf import DareConfig
from dare_hf.assets import board, model_path
from dare_hf.demo.anole import Anole
from dare_hf.demo.board import Board
from dare_hf.demo.volcano import Volcano
from dare_hf.errors import DareConfigError, DareStateError

if TYPE_CHECKING:
    from dare_hf.demo.runner import Runner

ASSETS = Path(__file__).parents[1] / "assets"
RUNNERS: dict[str, type[Runner]] = {"anole": Anole, "volcano": Volcano, "board": Board}


def runner_type(name: str) -> type[Runner]:
    """The runner of the embedded model `name`.

    Raises:
        DareConfigError: There is no such model.
    """
    if name not in RUNNERS:
        raise DareConfigError(f"model: expected {', '.join(RUNNERS)}, got {name!r}")
    return RUNNERS[name]


def load_embedded(name: str) -> tuple[Any, Any]:
    """The embedded model `name` and its processor, from the installed package.

    Raises:
        DareConfigError: There is no such model.
        DareStateError: The installation lacks its files, or what they are made of (`model_path`).
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = ASSETS / runner_type(name).folder
    if folder.name == board.NAME:
        folder = model_path(board.NAME)
    if not (folder / "config.json").exists():
        raise DareStateError(
            f"expected the embedded model {folder.name} in the installed package, got no files "
            f"at {folder}: reinstall dare-hf"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def load_runner(name: str) -> Runner:
    """The embedded model `name`, ready to solve its task; errors as `load_embedded`."""
    return runner_type(name)(*load_embedded(name))


def safe_config(processor: Any, name: str = "anole") -> DareConfig:
    """The preset "safe", what a model nobody has measured gets, with the model's hops."""
    return DareConfig.preset("safe", hop_delimiters=runner_type(name).delimiters(processor))


def demo_config(processor: Any, name: str = "anole") -> DareConfig:
    """A model's own way of being pruned without training, with its hops.

    Rates shipped beside it were found by pruning one layer at a time on training items
    (scripts/ablate_layers.py), not by training: tokens are scored by attention.
    """
    kind = runner_type(name)
    if kind.training_free is not None:
        return replace(kind.training_free, hop_delimiters=kind.delimiters(processor))
    rates = json.loads((ASSETS / kind.folder / "dare_schedule.json").read_text(encoding="utf-8"))
    return DareConfig(
        schedule=tuple(zip(rates["vision"], rates["text"], strict=True)),
        uniform_share=rates["uniform_share"],
        hop_delimiters=kind.delimiters(processor),
    )
