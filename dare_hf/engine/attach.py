"""What routing puts on a model's instances, and how it is taken off again."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from dare_hf.architectures.locate import attention_of, numbers_queries
from dare_hf.architectures.tensor_parallel import head_mean, shared_heads
from dare_hf.cache.refused import check_attention_cache, refuse_continuous_batching
from dare_hf.compat import warn_untested
from dare_hf.engine.attention_functions import observed_name
from dare_hf.engine.controller import Controller
from dare_hf.engine.generate import routed_generate
from dare_hf.engine.masks import is_flash
from dare_hf.engine.routed_layer import LayerState, parameter_names, routed_forward
from dare_hf.errors import DareStateError
from dare_hf.report.flops import shapes_of
from dare_hf.routers.holder import device_of
from dare_hf.routers.router import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.settings import Settings
    from dare_hf.engine.undo import UndoRecord

Owner = Literal["apply_dare", "peft"]


@dataclass
class ModelState:
    """What DARE keeps on the model itself, as `model._dare`.

    Attributes:
        controller: The controller all routed layers share.
        generate: The model's own generate, a bound method.
        undo: What was changed.
        owner: Who put DARE on, and has to take it off.
    """

    controller: Controller
    generate: Callable[..., Any]
    undo: UndoRecord
    owner: Owner


def unwrap(model: Any) -> Any:
    """The transformers model inside peft's wrappers."""
    while isinstance(model, (PeftModel, BaseTuner)):
        model = model.base_model if isinstance(model, PeftModel) else model.model
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def state_of(model: Any) -> ModelState:
    """What DARE keeps on `model`, or on the model inside its wrapper.

    Raises:
        DareStateError: The model has no DARE.
    """
    state = getattr(unwrap(model), "__dict__", {}).get("_dare")
    if state is None:
        raise DareStateError(
            "expected a model with DARE; this one has none. Call apply_dare(model) first"
        )
    return state


def check_free(target: Any) -> None:
    """Refuse a model that has DARE already.

    Raises:
        DareStateError: It has; the text says how to take it off.
    """
    state = vars(target).get("_dare")
    if state is None:
        return
    way = "Call remove_dare(model) first"
    if state.owner == "peft":
        way = (
            "Its adapters are peft's: use model.load_adapter, model.set_adapter, or take DARE off "
            "by model.unload() or model.delete_adapter(name) first"
        )
    raise DareStateError(f"expected a model without DARE; this one has it. {way}")


def new_controller(settings: Settings, anatomy: Anatomy) -> Controller:
    """The controller of a model that has no DARE yet."""
    warn_untested()
    implementation = anatomy.text_config._attn_implementation
    check_attention_cache(implementation)
    exempt = _exempt_layers(anatomy, implementation)
    controller = Controller(settings, anatomy, implementation, exempt)
    controller.notes += _notes(anatomy, exempt)
    return controller


def new_router(settings: Settings, anatomy: Anatomy, index: int) -> Router:
    """A fresh router for one layer, on its device."""
    layer, config = anatomy.layers[index], settings.config
    router = Router(
        anatomy.text_config.hidden_size,
        settings.layer_rates(index),
        learned=config.learns_rates,
        normalize=config.normalize_input,
    )
    if router.weight.device.type == "meta":  # peft's low_cpu_mem_usage: the weights come later
        return router
    return router.to(device_of(layer))


def attach(target: Any, controller: Controller, undo: UndoRecord, owner: Owner) -> ModelState:
    """Set what routing needs on the model's instances, recorded in `undo`."""
    anatomy = controller.anatomy
    state = ModelState(controller, target.generate, undo, owner)
    for module in anatomy.hooked:
        undo.set(module, "_dare", state)
        undo.hook(module.register_forward_pre_hook(_open_forward, with_kwargs=True))
        undo.hook(module.register_forward_hook(_close_forward, prepend=True, always_call=True))
    undo.set(target, "generate", types.MethodType(routed_generate, target))
    refusal = types.MethodType(refuse_continuous_batching, target)
    undo.set(target, "init_continuous_batching", refusal)
    for index, layer in enumerate(anatomy.layers):
        layer_state = LayerState(
            controller=controller,
            index=index,
            inner=layer.forward,
            names=parameter_names(type(layer).forward),
            causal=bool(getattr(attention_of(layer), "is_causal", True)),
            mean=head_mean(shared_heads(attention_of(layer), target)),
        )
        undo.set(layer, "_dare", layer_state)
        undo.set(attention_of(layer), "_dare", layer_state)
        undo.set(layer, "forward", types.MethodType(routed_forward, layer))
    return state


def watch_attention(target: Any, state: ModelState, settings: Settings) -> None:
    """Let attention be read where these settings need it."""
    if not settings.observes:
        return
    anatomy = state.controller.anatomy
    name = observed_name(state.controller.base_implementation)
    for layer in anatomy.unrouted:
        # an indexer asks for the implementation by name (transformers 5.23, minimax_m3_vl)
        if hasattr(attention := getattr(layer, "self_attn", None), "config"):
            state.undo.set(attention, "config", copy.copy(attention.config))
    for config in _attention_configs(target, anatomy):
        if config._attn_implementation_internal != name:
            state.undo.set(config, "_attn_implementation_internal", name)


def _exempt_layers(anatomy: Anatomy, implementation: str) -> dict[int, int]:
    """Layers that keep everything, and from how many logical tokens on.

    Sliding layers under flash attention, whose window counts stored tokens; and those that number
    their queries themselves (llama4 without RoPE), from where that makes a difference.
    """
    attentions = [attention_of(layer) for layer in anatomy.layers]
    found = {i: least for i, a in enumerate(attentions) if (least := numbers_queries(a))}
    if is_flash(implementation):
        windows = (getattr(attention, "sliding_window", None) for attention in attentions)
        found |= {i: 0 for i, window in enumerate(windows) if window is not None}
    return found


def _notes(anatomy: Anatomy, exempt: Mapping[int, int]) -> list[str]:
    """What every report of this model says was left unpruned or counted otherwise."""
    notes = []
    if any(shape.window for shape in shapes_of(anatomy.layers, anatomy.text_config)):
        notes.append(
            "sliding-window layers are counted with all tokens on both sides: this cache stores "
            "them so; transformers' own cache would hold the window only"
        )
    if anatomy.unrouted:
        every = len(anatomy.unrouted) + len(anatomy.layers)
        kinds = ", ".join(sorted({type(module).__name__ for module in anatomy.unrouted}))
        notes.append(
            f"{len(anatomy.unrouted)} of {every} layers ({kinds}: no self-attention, or a sparse "
            "one) run every token; rates, FLOPs and bytes are those of the others"
        )
    if slides := sorted(i for i, least in exempt.items() if not least):
        notes.append(
            f"layers {slides} keep everything: flash attention counts their sliding "
            "window in stored tokens"
        )
    if numbered := sorted(i for i, least in exempt.items() if least):
        notes.append(
            f"layers {numbered} keep everything from {exempt[numbered[0]]} tokens on: their "
            "attention scales a query by its place among those it is given"
        )
    return notes


def _attention_configs(target: Any, anatomy: Anatomy) -> list[Any]:
    """The config objects attention and masks of the text model are resolved from."""
    found = [anatomy.text_config, target.config.get_text_config()]
    found += [module.config.get_text_config() for module in anatomy.hooked]
    found += [attention_of(layer).config for layer in anatomy.layers]
    return list({id(config): config for config in found}.values())


@functools.cache
def _forward_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _open_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = dict(zip(_forward_names(type(module)), args, strict=False)) | kwargs
    return (), module._dare.controller.before_forward(module, given)


def _close_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    module._dare.controller.after_forward(module, failed=output is None)
