"""dare-board: a pretrained text model from PyPI under a tower and a LoRA that were trained here.

The installed package holds what was trained, in float16, and the small files of a model's folder.
On first use they are put together with the text model into a folder that `from_pretrained` takes:
the text model dequantised, the LoRA added to its weights, all in float32. It lies under HF_HOME, by
the checksums of what it was made of, so that another version makes another folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.assets import backbone
from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

NAME = "dare-board"
FOLDER = Path(__file__).parent / NAME
CHECKSUMS = "checksums.json"
COPIED = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
TOWER, LORA = "tower.safetensors", "lora.safetensors"
PARTS = ("vision_tower", "multi_modal_projector")
"""What TOWER holds, by the first part of its tensors' names."""
RENAMED, IMAGE = "<gh_stars>", "<image>"
"""A special token that chats never hold, and what it is called instead."""


def model_folder() -> Path:
    """The folder for `from_pretrained`; made when it is missing, which takes half a minute.

    Raises:
        DareStateError: The trained files are missing or damaged, the extra is not installed, its
            file is not the one wanted, or the cache cannot be written.
    """
    from huggingface_hub import constants

    made_of = json.dumps([checked(FOLDER), backbone.SHA256], sort_keys=True)
    version = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    target = Path(constants.HF_HOME) / "dare_hf" / f"{NAME}-{version}"
    if not target.is_dir():
        text_model, tokenizer = backbone.read()
        compose(FOLDER, text_model, tokenizer.backend_tokenizer.to_str(), target)
    return target


def is_shipped() -> bool:
    """Whether this installation has the trained files."""
    return (FOLDER / CHECKSUMS).is_file()


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of each shipped file, by name."""
    return {name: backbone.sha256(folder / name) for name in (*COPIED, TOWER, LORA)}


def checked(folder: Path) -> dict[str, str]:
    """The checksums of shipped files, which agree with those written beside them.

    Raises:
        DareStateError: They do not, or a file is missing.
    """
    if not (folder / CHECKSUMS).is_file():
        raise DareStateError(
            f"expected the trained weights of {NAME} in the installed package, got none in "
            f"{folder}: this version of dare-hf was built without them; docs/board.md says how "
            "they are trained"
        )
    wanted = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    missing = [name for name in wanted if not (folder / name).is_file()]
    damaged = [] if missing else [n for n, s in checksums(folder).items() if wanted.get(n) != s]
    if missing or damaged:
        raise DareStateError(
            f"expected the files of {NAME} as {CHECKSUMS} lists them in {folder}; got "
            f"{'none of' if missing else 'another'} {', '.join(missing or damaged)}: reinstall "
            "dare-hf"
        )
    return wanted


def compose(folder: Path, text_model: LlamaForCausalLM, tokenizer: str, target: Path) -> None:
    """Writes the folder of the whole model, in one step that can be seen from outside.

    Two processes may do so at once: both write the same, and one of them comes first.

    Args:
        folder: Of the shipped files.
        text_model: Pretrained.
        tokenizer: Its tokenizer.json.
        target: The folder to make; its parents are made too.

    Raises:
        DareStateError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as made:
            whole = Path(made) / "model"
            _assembled(folder, text_model).save_pretrained(whole)
            for name in COPIED:
                shutil.copyfile(folder / name, whole / name)
            (whole / "tokenizer.json").write_text(with_image_token(tokenizer), encoding="utf-8")
            try:
                whole.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first
                    raise
    except OSError as error:
        raise DareStateError(
            f"expected to write {NAME} (0.6 GB) to {target}; got {error}: set HF_HOME to a folder "
            "with room"
        ) from error


def with_image_token(tokenizer: str) -> str:
    """A tokenizer.json with IMAGE in the place of RENAMED."""
    return tokenizer.replace(f'"{RENAMED}"', f'"{IMAGE}"')


def _assembled(folder: Path, text_model: LlamaForCausalLM) -> Any:
    """The model of the shipped configuration with all weights, float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    tower = load_file(folder / TOWER)
    for part in PARTS:
        held = {name: tensor for name, tensor in tower.items() if name.startswith(f"{part}.")}
        state = {name.removeprefix(f"{part}."): tensor for name, tensor in held.items()}
        getattr(model.model, part).load_state_dict(state)
    _add_lora(model, load_file(folder / LORA))
    return model


def _add_lora(model: Any, lora: dict[str, Tensor]) -> None:
    """Adds B A to every weight that has a pair, `<module>.lora_A` and `<module>.lora_B`."""
    import torch

    with torch.no_grad():
        for name, down in lora.items():
            place, inside, _ = name.partition(".lora_A")
            if inside:
                up = lora[f"{place}.lora_B"]
                model.get_parameter(f"{place}.weight").add_(up.float() @ down.float())
