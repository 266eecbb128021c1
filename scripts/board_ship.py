"""What the package ships of dare-board: its small files, and what was trained, in float16."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from board_lora import SCALING
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from dare_hf.assets import board


def ship(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    lora: dict[str, Tensor],
    folder: Path,
) -> None:
    """Writes the files; adapters that lie in the folder stay.

    Args:
        model: With the trained tower and projector; its text model is not shipped.
        processor: Its tokenizer is not shipped either: it comes with the text model.
        lora: Weights of stage 2 by name.
        folder: Where; made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        _config(model).save_pretrained(made)
        model.generation_config.save_pretrained(made)
        processor.save_pretrained(made)
        for name in board.COPIED:
            shutil.copyfile(Path(made) / name, folder / name)
    tower = {
        f"{part}.{name}": tensor
        for part in board.PARTS
        for name, tensor in getattr(model.model, part).state_dict().items()
    }
    _save(tower, folder / board.TOWER)
    _save(
        {_short(name): _scaled(name, tensor) for name, tensor in lora.items()}, folder / board.LORA
    )
    found = json.dumps(board.checksums(folder), indent=2)
    (folder / board.CHECKSUMS).write_text(found + "\n", encoding="utf-8")


def _config(model: LlavaForConditionalGeneration) -> LlavaConfig:
    """As save_pretrained of the model would write it, without where the text model lay."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], "float32"
    config.text_config._name_or_path = ""
    vars(config.text_config).pop("_model_name_or_path", None)
    return config


def _short(name: str) -> str:
    """`<module>.lora_A` of peft's `<module>.lora_A.<adapter>.weight`."""
    place, which, _ = name.partition(".lora_A" if ".lora_A." in name else ".lora_B")
    return place + which


def _scaled(name: str, tensor: Tensor) -> Tensor:
    """With the LoRA's scaling, a power of two, in B."""
    return tensor * SCALING if ".lora_B." in name else tensor


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """In float16; what is not of floating point stays.

    Raises:
        OverflowError: A value is too large for float16.
    """
    halves = {n: t.detach().half() if t.is_floating_point() else t for n, t in tensors.items()}
    for name, tensor in halves.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise OverflowError(f"{name} does not fit into float16")
    save_file({name: tensor.contiguous() for name, tensor in halves.items()}, file)
