"""The embedded models and the configuration the demo runs them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf import DareConfig
from dare_hf.errors import DareConfigError, DareStateError

if TYPE_CHECKING:
    from transformers import ChameleonForConditionalGeneration, ChameleonProcessor

ASSETS = Path(__file__).parents[1] / "assets"
MODELS = {"anole": "dare-tiny-anole"}
PLANNED = ("volcano",)


def load_embedded(name: str) -> tuple[ChameleonForConditionalGeneration, ChameleonProcessor]:
    """The embedded model `name` and its processor, from the installed package.

    Raises:
        DareConfigError: There is no such model, or not yet.
        DareStateError: The installation lacks its files.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if name not in MODELS:
        later = " (this one is planned)" if name in PLANNED else ""
        raise DareConfigError(f"model: expected {' or '.join(MODELS)}, got {name!r}{later}")
    folder = ASSETS / MODELS[name]
    if not (folder / "config.json").exists():
        raise DareStateError(
            f"expected the embedded model {MODELS[name]} in the installed package, got no files "
            f"at {folder}: reinstall dare-hf"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def safe_config(processor: Any) -> DareConfig:
    """The preset "safe", what a model nobody has measured gets, an image's end ending a hop."""
    return DareConfig.preset("safe", hop_delimiters=(processor.image_end_token_id,))


def demo_config(processor: Any, name: str = "anole") -> DareConfig:
    """The rates shipped beside a model, with the end of an image as the end of a hop.

    They were found by pruning one layer at a time on training mazes
    (scripts/ablate_anole_layers.py), not by training: tokens are scored by attention.
    """
    rates = json.loads((ASSETS / MODELS[name] / "dare_schedule.json").read_text())
    return DareConfig(
        schedule=tuple(zip(rates["vision"], rates["text"], strict=True)),
        uniform_share=rates["uniform_share"],
        hop_delimiters=(processor.image_end_token_id,),
    )
