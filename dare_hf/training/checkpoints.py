"""Adapters in a trainer's checkpoint: routers and a LoRA beside them.

transformers (5.23) saves one active adapter of those it attached, so a LoRA beside routers stops a
Trainer at its first checkpoint, and it loads none of them back. Of a PeftModel's adapters it loads
the best checkpoint of the one named "default" alone, and transformers 5.19 resumes one of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from dare_hf.errors import AdapterMismatchError, DareStateError
from dare_hf.routers.files import check_tensors, shapes
from dare_hf.routers.sharded import in_parts, whole

_PREFIX = "base_model.model."


def attached(model: Any) -> list[str]:
    """Names of the adapters transformers attached; none for a PeftModel, which saves its own."""
    own = not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False)
    return list(model.peft_config) if own else []


def save_adapters(model: Any, folder: str | Path, write: bool = True) -> None:
    """Save attached adapters, each to `folder/<name>`; what is active or trained stays so.

    Args:
        model: A transformers model with adapters.
        folder: Where to.
        write: Whether this process does. All of them call this where FSDP2 has sharded the model.
    """
    names, tensors = attached(model), None
    if any(map(in_parts, model.parameters())):
        named = {key: t for key, t in model.state_dict().items() if _of(names, key)}
        tensors = {key: whole(tensor) for key, tensor in named.items()}
    if not write:
        return
    active = list(model.active_adapters())
    trained = [(p, p.requires_grad) for p in model.parameters()]
    for name in names:
        model.set_adapter(name)
        model.save_pretrained(Path(folder) / name, state_dict=tensors)
    model.set_adapter(active)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)


def _of(adapters: list[str], key: str) -> bool:
    """Whether a tensor is one of these adapters', by its name as peft makes it."""
    return any(f".{name}." in key or key.endswith(f".{name}") for name in adapters)


def load_adapters(model: Any, folder: str | Path) -> None:
    """Load a checkpoint's adapters into those the model has, in place.

    Args:
        model: A transformers model with adapters, or a PeftModel.
        folder: What `save_adapters`, or a PeftModel's `save_pretrained`, wrote.

    Raises:
        DareStateError: An adapter has no folder there.
        AdapterMismatchError: A file's tensors are not those of the adapter.
    """
    wrapped = isinstance(model, PeftModel)
    for name in model.peft_config:
        # peft writes its "default" into the folder itself
        place = Path(folder) if wrapped and name == "default" else Path(folder) / name
        if not (place / "adapter_config.json").is_file():
            raise DareStateError(
                f"checkpoint: expected the adapter {name!r} in {place}; got none there. Resume "
                "with the adapters, and their names, that the checkpoint was written with"
            )
        weights = load_peft_weights(str(place), device="cpu")
        if not wrapped:
            weights = {key.removeprefix(_PREFIX): tensor for key, tensor in weights.items()}
        own = get_peft_model_state_dict(model, adapter_name=name)
        check_tensors(shapes(weights.items()), shapes(own.items()))
        unread = set_peft_model_state_dict(model, weights, adapter_name=name).unexpected_keys
        if unread:
            raise AdapterMismatchError(
                f"{unread[0]}: expected a tensor of the adapter {name!r}; got one this model has "
                f"no place for, in {place}. Resume on the base model of the checkpoint"
            )
