"""The embedded models and the configuration the demo runs them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf import DareConfig
from dare_hf.demo.anole import Anole
from dare_hf.demo.volcano import Volcano
from dare_hf.errors import DareConfigError, DareStateError

if TYPE_CHECKING:
    from dare_hf.demo.runner import Runner

ASSETS = Path(__file__).parents[1] / "assets"
RUNNERS: dict[str, type[Runner]] = {"anole": Anole, "volcano": Volcano}


def runner_type(name: str) -> type[Runner]:
    """The runner of the embedded model `name`.

    Raises:
        DareConfigError: There is no such model.
    """
    if name not in RUNNERS:
        raise DareConfigError(f"model: expected {' or '.join(RUNNERS)}, got {name!r}")
    return RUNNERS[name]


def load_embedded(name: str) -> tuple[Any, Any]:
    """The embedded model `name` and its processor, from the installed package.

    Raises:
        DareConfigError: There is no such model.
        DareStateError: The installation lacks its files.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = ASSETS / runner_type(name).folder
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
    return DareConfig.preset("safe", hop_delimiters=(runner_type(name).delimiter(processor),))


def demo_config(processor: Any, name: str = "anole") -> DareConfig:
    """The rates shipped beside a model, with the model's hops.

    They were found by pruning one layer at a time on training items
    (scripts/ablate_layers.py), not by training: tokens are scored by attention.
    """
    kind = runner_type(name)
    rates = json.loads((ASSETS / kind.folder / "dare_schedule.json").read_text(encoding="utf-8"))
    return DareConfig(
        schedule=tuple(zip(rates["vision"], rates["text"], strict=True)),
        uniform_share=rates["uniform_share"],
        hop_delimiters=(kind.delimiter(processor),),
    )
