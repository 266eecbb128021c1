"""One arm of a comparison: what is put on a plain model before it is measured."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.api import apply_dare
from dare_hf.config import DareConfig
from dare_hf.engine.attach import check_free
from dare_hf.errors import AdapterMismatchError, DareInputError
from dare_hf.routers.files import read_adapter

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUTERS, LORA = "dare", "lora"  # the folders `dare-hf train` writes
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Arm:
    """Pruning, weights, both or neither.

    Attributes:
        name: What tables call it.
        config: How it prunes; None leaves the model unpruned.
        routers: Folder of a trained router adapter; its configuration is `config`.
        lora: Folder of a LoRA adapter of peft.
    """

    name: str
    config: DareConfig | None = None
    routers: Path | None = None
    lora: Path | None = None

    @property
    def parts(self) -> str:
        """What it consists of, in words."""
        parts = ["trained routers"] if self.routers else []
        if self.config and not self.routers:
            parts = ["pruning without training"]
        parts += ["a LoRA, merged"] if self.lora else []
        return " and ".join(parts) or "the plain model"

    def on(self, model: Any) -> Any:
        """A copy of a plain model with this arm on it, in eval mode; `model` stays as it is.

        A LoRA is merged into the copy's weights, so that it costs no FLOPs of its own.

        Raises:
            DareStateError: The model has DARE already.
            AdapterMismatchError: An adapter was made for another model.
            DareConfigError: The configuration does not fit the model.
        """
        check_free(model)
        made = copy.deepcopy(model)
        if self.lora is not None:
            made = _merged(made, self.lora)
        if self.config is not None and self.routers is not None:
            # load_adapter sets inference_mode on the configuration it is given
            made.load_adapter(str(self.routers), ROUTERS, peft_config=replace(self.config))
        elif self.config is not None:
            apply_dare(made, self.config)
        return made.eval()


def trained_arm(
    name: str, folder: Path, *, lora: Path | None = None, ends: Sequence[int] = ()
) -> Arm:
    """The arm of a trained adapter.

    Args:
        name: What tables call it.
        folder: What `dare-hf train` wrote, with `dare/` in it, and `lora/` where one was trained;
            or the folder of a router adapter itself.
        lora: A LoRA instead of the one in `folder`.
        ends: Ids of which one has to end hops (see `Task.ends`): the first is added where the
            adapter's own delimiters have none of them.

    Raises:
        DareInputError: There is no such adapter, or `lora` is none of peft's LoRA adapters.
        DareConfigError: The router adapter cannot be read.
        AdapterMismatchError: Its tensors are not what its configuration says.
    """
    routers = folder if (folder / _CONFIG).is_file() else folder / ROUTERS
    if not (routers / _CONFIG).is_file():
        raise DareInputError(
            f"adapter: expected a folder with {_CONFIG}, or one with {ROUTERS}/{_CONFIG} as "
            f"`dare-hf train` writes it; got {folder}"
        )
    config, _ = read_adapter(str(routers))
    if ends and not set(ends) & set(config.hop_delimiters):
        config = replace(config, hop_delimiters=(*config.hop_delimiters, ends[0]))
    beside = folder / LORA
    if lora is None and routers != folder and beside.is_dir():
        lora = beside
    return Arm(name, config, routers, None if lora is None else checked_lora(lora))


def checked_lora(folder: Path) -> Path:
    """The folder, if a LoRA adapter of peft is in it.

    Raises:
        DareInputError: There is none.
    """
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder)) if folder.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DareInputError(f"lora: expected one of peft's in {folder}; got {error}") from error
    if not isinstance(config, LoraConfig):
        got = "no such folder" if config is None else f"peft_type {config.peft_type}"
        raise DareInputError(f"lora: expected a LoRA adapter of peft in {folder}; got {got}")
    return folder


def _merged(model: Any, folder: Path) -> Any:
    """The model with the LoRA added to its weights, and no trace of peft."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's: an old name, missing keys (see below)
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder))
        except (RuntimeError, ValueError) as error:
            raise _other_model(model, folder, str(error).strip().splitlines()[0]) from error
        # peft (0.21) says nothing of tensors that the model has no place for
        differ = set(load_peft_weights(str(folder))) ^ set(get_peft_model_state_dict(wrapped))
        if differ:
            raise _other_model(model, folder, f"{len(differ)} tensors do not fit: {min(differ)}")
        return wrapped.merge_and_unload()


def _other_model(model: Any, folder: Path, reason: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"lora: expected a LoRA made for this {model.config.model_type} model; got {folder}: "
        f"{reason}"
    )
