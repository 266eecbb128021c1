"""Adapters of peft that find tokens by their place in the sequence, or bring tokens of their own.

A routed layer is given some of a row's tokens only, so that a place there is another token; and
virtual tokens stand in no ids, or in a cache that is not DARE's. Both are refused, by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner
from peft.tuners.xlora.layer import XLoraLayer

from dare_hf.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_PLAIN = "run it inside `with dare_disabled(model)`, or without DARE"


def check_virtual_tokens(model: Any) -> None:
    """Refuse a PeftModel whose active adapter puts virtual tokens before the prompt.

    Args:
        model: A model, or what peft has wrapped around one.

    Raises:
        UnsupportedModelError: It does.
    """
    while isinstance(model, (PeftModel, BaseTuner)):
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            config = model.active_peft_config
            raise UnsupportedModelError(
                f"{getattr(config.peft_type, 'value', config.peft_type)}: expected an adapter of "
                f"peft without virtual tokens; got num_virtual_tokens={config.num_virtual_tokens}, "
                "which are in no ids and are put into the prompt or the cache behind DARE's back. "
                f"Activate another adapter, or {_PLAIN}"
            )
        model = model.model if isinstance(model, BaseTuner) else model.base_model


def check_prepared(model: Any) -> None:
    """Refuse a generate that a PeftModel with virtual tokens has called.

    It puts its own `prepare_inputs_for_generation` on the model while generate runs.

    Args:
        model: The model whose generate is called.

    Raises:
        UnsupportedModelError: It has.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    check_virtual_tokens(getattr(prepare, "__self__", None))


def check_places(layers: Iterable[nn.Module]) -> None:
    """Refuse decoder layers in which an active adapter tells tokens by their place.

    Args:
        layers: The decoder layers.

    Raises:
        UnsupportedModelError: There is one.
    """
    for layer in layers:
        for module in layer.modules():
            if (name := _by_place(module)) is not None:
                raise UnsupportedModelError(
                    f"{name}: expected adapters of peft that treat a token alike wherever it "
                    "stands; got one that counts places in the sequence, of which a routed layer "
                    f"is given some only. Activate another adapter, or {_PLAIN}"
                )


def _by_place(module: nn.Module) -> str | None:
    """What peft calls the thing by which a module tells tokens by their place; None for nothing."""
    forward = vars(module).get("forward")
    if isinstance(getattr(forward, "__self__", None), XLoraLayer):
        return "XLORA"
    variants: Any = getattr(module, "lora_variant", None)
    if not variants or getattr(module, "disable_adapters", False):
        return None
    active = [variants.get(name) for name in getattr(module, "active_adapters", ())]
    places = any(isinstance(variant, ALoraLinearVariant) for variant in active)
    return "alora_invocation_tokens" if places else None
