"""Adding an adapter to a model of transformers, whichever peft is installed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from dare_hf.compat import adapter_methods, call_adapter_method
from dare_hf.engine.methods import Bound

if TYPE_CHECKING:
    from peft import PeftConfig


def add_adapter(model: Any, config: PeftConfig, adapter_name: str = "default") -> None:
    """What `model.add_adapter` of transformers does, also where it refuses the tested peft.

    transformers 5.24 refuses every peft before 0.22 in `add_adapter`, `set_adapter`,
    `active_adapters` and the like. Afterwards these work on this model as they do in 5.23; so they
    do once it has a router adapter by any other way (`load_adapter`, `from_pretrained`).

    Args:
        model: A transformers model; not a PeftModel.
        config: A DareConfig for routers, a LoraConfig for a LoRA beside them.
        adapter_name: The new adapter, which is then the only active one.

    Raises:
        DareError: As `get_peft_model` with a DareConfig.
        ValueError: The model has an adapter of that name.
    """
    fresh = [name for name in adapter_methods() if name not in vars(model)]
    for name in fresh:
        setattr(model, name, Bound(model, name, functools.partial(call_adapter_method, name)))
    try:
        model.add_adapter(config, adapter_name)
    except BaseException:
        for name in fresh:
            vars(model).pop(name, None)
        raise
