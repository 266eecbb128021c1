"""What routing puts on a model's instances, and how it is taken off again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner

from dare_hf.architectures.locate import attention_of, sees_all
from dare_hf.architectures.tensor_parallel import head_mean, shared_heads
from dare_hf.cache.refused import check_attention_cache, refuse_continuous_batching
from dare_hf.compat import warn_untested
from dare_hf.engine.attention_functions import reads_positions, watch_layers
from dare_hf.engine.controller import Controller
from dare_hf.engine.generate import routed_generate
from dare_hf.engine.masks import is_flash
from dare_hf.engine.methods import current, named, passed, positional
from dare_hf.engine.peft_places import check_places
from dare_hf.engine.routed_layer import LayerState, routed_forward
from dare_hf.engine.settings import exempt_layers
from dare_hf.errors import DareStateError
from dare_hf.report.flops import shapes_of
from dare_hf.routers.holder import device_of
from dare_hf.routers.router import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.settings import Settings
    from dare_hf.engine.undo import UndoRecord

Owner = Literal["apply_dare", "peft"]


@dataclass
class ModelState:
    """What DARE keeps on the model itself, as `model._dare`.

    Attributes:
        controller: The controller all routed layers share.
        generate: The model's own generate.
        undo: What was changed.
        owner: Who put DARE on, and has to take it off.
    """

    controller: Controller
    generate: Callable[..., Any]
    undo: UndoRecord
    owner: Owner


def unwrap(model: Any) -> Any:
    """The transformers model inside peft's wrappers."""
    while isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        model = model.model if isinstance(model, BaseTuner) else model.base_model
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
    """The controller of a model that has no DARE yet.

    Raises:
        DareStateError: Its attention reads a paged cache.
        UnsupportedModelError: An adapter of peft tells tokens by their place.
    """
    warn_untested()
    implementation = anatomy.text_config._attn_implementation
    check_attention_cache(implementation)
    check_places(anatomy.layers)
    exempt = exempt_layers(anatomy)
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
        mean_update=config.mean_update is True,
        skips=config.decode == "routed",
    )
    if router.weight.device.type == "meta":  # peft's low_cpu_mem_usage: the weights come later
        return router
    return router.to(device_of(layer))


def router_shapes(settings: Settings, anatomy: Anatomy) -> list[dict[str, tuple[int, ...]]]:
    """What an adapter's file has to hold: for each layer the shapes of its router by name."""
    hidden, learned = anatomy.text_config.hidden_size, settings.config.learns_rates
    optional = settings.config.mean_update is True, settings.config.decode == "routed"
    hops = len(settings.table.vision)
    return [Router.saved_shapes(hidden, hops, learned, *optional) for _ in anatomy.layers]


def attach(target: Any, controller: Controller, undo: UndoRecord, owner: Owner) -> ModelState:
    """Set what routing needs on the model's instances, recorded in `undo`."""
    anatomy = controller.anatomy
    state = ModelState(controller, current(target, "generate"), undo, owner)
    for module in anatomy.hooked:
        undo.set(module, "_dare", state)
        undo.set(module, "_dare_forward", current(module, "forward"))
        undo.put(module, "forward", watched_forward)
    undo.put(target, "generate", routed_generate)
    undo.put(target, "extra_repr", _shown)
    undo.put(target, "init_continuous_batching", refuse_continuous_batching)
    flash = is_flash(controller.base_implementation)
    for index, layer in enumerate(anatomy.layers):
        layer_state = LayerState(
            controller=controller,
            index=index,
            source=anatomy.sources[index],
            inner=current(layer, "forward"),
            names=tuple(positional(type(layer)))[1:],
            causal=bool(getattr(attention_of(layer), "is_causal", True)),
            sees_all=sees_all(attention_of(layer), anatomy.text_config),
            mean=head_mean(shared_heads(attention_of(layer), target)),
            drops_positions=flash and not reads_positions(attention_of(layer)),
            stream=anatomy.text_config.altup_active_idx if anatomy.spec.streams else None,
        )
        undo.set(layer, "_dare", layer_state)
        undo.set(attention_of(layer), "_dare", layer_state)
        undo.put(layer, "forward", routed_forward)
    return state


def _shown(model: Any) -> str:
    """What `print(model)` says first: that DARE is on, and how it prunes."""
    kind = type(model)
    own, config = kind.extra_repr(model), vars(model)["_dare"].controller.config
    schedule = config.schedule if isinstance(config.schedule, str) else "by layer"
    rates = (
        ""
        if schedule == "by layer"
        else (
            f", vision_retention={config.vision_retention:.3g}, "
            f"text_retention={config.text_retention:.3g}"
        )
    )
    told = f"DARE is on: schedule={schedule!r}{rates}, scorer={config.scorer!r}"
    return f"{own}\n{told}" if own else told


def watch_attention(state: ModelState, settings: Settings) -> None:
    """Let attention be read where these settings need it.

    And where flash attention must not be handed the positions that its module reads.
    """
    layers, implementation = state.controller.anatomy.layers, state.controller.base_implementation
    if not settings.observes:
        flash = is_flash(implementation)
        layers = [layer for layer in layers if flash and reads_positions(attention_of(layer))]
    watch_layers(layers, implementation, state.undo)


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


def watched_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward DARE puts on a model, called as `model(...)` or as `model.forward(...)`."""
    if "_dare" not in vars(module):  # a wrapper made since has outlived DARE
        return type(module).forward(module, *args, **kwargs)
    controller, failed = vars(module)["_dare"].controller, True
    given = controller.before_forward(module, named(type(module), args, kwargs))
    args, kwargs = passed(type(module), len(args), given)
    try:
        output = vars(module)["_dare_forward"](*args, **kwargs)
        failed = False
    finally:
        controller.after_forward(module, failed=failed)
    return output
