"""A router adapter and a LoRA for dare-tiny-volcano, trained for two steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.recipes import Recipe, train

if TYPE_CHECKING:
    from pathlib import Path


def train_pair(out: Path) -> Path:
    """The folder that `dare-hf train` would leave."""
    lora = {"r": 4, "init_lora_weights": False}  # as if it had been trained
    recipe = Recipe("volcano", str(out), task=("scene",), steps=2, batch_size=2, lora=lora)
    train(recipe)
    return out


def ship(pair: Path, root: Path, embedded: Path) -> None:
    """A folder of assets at `root`: the embedded models, and `pair` under two names."""
    for model in embedded.glob("*/config.json"):
        made = root / model.parent.name
        made.mkdir(parents=True)
        for file in model.parent.iterdir():
            if file.name != "adapters":
                (made / file.name).symlink_to(file)
    adapters = root / "dare-tiny-volcano" / "adapters"
    adapters.mkdir()
    for name in ("dare-l", "dare-lh"):
        (adapters / name).symlink_to(pair, target_is_directory=True)
