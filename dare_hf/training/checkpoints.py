"""Adapters that transformers attached, in a trainer's checkpoint: each in a folder of its name.

transformers (5.23) saves one active adapter, so a LoRA beside routers stops a Trainer at its first
checkpoint, and loads none back: its Trainer does both for a PeftModel only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights

from dare_hf.errors import AdapterMismatchError, DareStateError
from dare_hf.routers.files import check_tensors, shapes

if TYPE_CHECKING:
    from collections.abc import Iterable

_PREFIX = "base_model.model."


def attached(model: Any) -> list[str]:
    """Names of the adapters transformers attached; none for a PeftModel, which has its own way."""
    return list(model.peft_config) if getattr(model, "_hf_peft_config_loaded", False) else []


def save_adapters(model: Any, folder: str | Path, names: Iterable[str] | None = None) -> None:
    """Save attached adapters, each to `folder/<name>`; what is active or trained stays so.

    Args:
        model: A transformers model with adapters.
        folder: Where to.
        names: Which of them; all by default.
    """
    active = list(model.active_adapters())
    trained = [(p, p.requires_grad) for p in model.parameters()]
    for name in attached(model) if names is None else names:
        model.set_adapter(name)
        model.save_pretrained(Path(folder) / name)
    model.set_adapter(active)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def load_adapters(model: Any, folder: str | Path) -> None:
    """Load what `save_adapters` wrote into the adapters the model has, in place.

    Args:
        model: A transformers model with adapters of the same names.
        folder: Where from.

    Raises:
        DareStateError: An adapter has no folder there.
        AdapterMismatchError: A file's tensors are not those of the adapter.
    """
    for name in attached(model):
        place = Path(folder) / name
        if not (place / "adapter_config.json").is_file():
            raise DareStateError(
                f"checkpoint: expected the adapter {name!r} in {place}; got no such folder. Resume "
                "with the adapters, and their names, that the checkpoint was written with"
            )
        saved = load_peft_weights(str(place), device="cpu")
        weights = {key.removeprefix(_PREFIX): tensor for key, tensor in saved.items()}
        own = model.get_adapter_state_dict(name)
        check_tensors(shapes(weights.items()), shapes(own.items()))
        unread = set_peft_model_state_dict(model, weights, adapter_name=name).unexpected_keys
        if unread:
            raise AdapterMismatchError(
                f"{unread[0]}: expected a tensor of the adapter {name!r}; got one this model has "
                f"no place for, in {place}. Resume on the base model of the checkpoint"
            )
