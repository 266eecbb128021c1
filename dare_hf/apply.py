"""Putting DARE on a model and taking it off: the one entry."""

from __future__ import annotations

import functools
import inspect
import types
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import logging

from dare_hf.adapters import Anatomy, locate
from dare_hf.attention import observed_name
from dare_hf.config import DareConfig
from dare_hf.context import TokenRules
from dare_hf.controller import Controller
from dare_hf.errors import DareConfigError, DareStateError, UnsupportedModelError
from dare_hf.generate import routed_generate
from dare_hf.hops import resolve_delimiters
from dare_hf.masks import is_flash
from dare_hf.modality import check_ids, special_token_ids, vision_token_ids
from dare_hf.routed_layer import LayerState, parameter_names, routed_forward
from dare_hf.routing.retention import build_table
from dare_hf.scorers import make_scorer
from dare_hf.undo import UndoRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dare_hf.report import DareReport


logger = logging.get_logger("dare_hf")


@dataclass
class ModelState:
    """What DARE keeps on the model itself, as `model._dare`.

    Attributes:
        controller: The controller all routed layers share.
        generate: The model's own generate, a bound method.
        undo: What was changed.
    """

    controller: Controller
    generate: Callable[..., Any]
    undo: UndoRecord


def apply_dare(
    model: nn.Module, config: DareConfig | str | None = None, *, processor: Any = None
) -> nn.Module:
    """Make `model` route its tokens; in place.

    Args:
        model: A supported vision-language model of transformers.
        config: What to prune, None for the safe training-free preset.
        processor: Only needed when `config.hop_delimiters` holds strings.

    Returns:
        The same model.

    Raises:
        DareConfigError: The configuration does not fit this model.
        DareStateError: The model already has DARE.
        UnsupportedModelError: The architecture cannot be routed.
    """
    if isinstance(config, str):
        raise DareConfigError(
            "config: expected a DareConfig or None; trained adapters cannot be loaded by this "
            f"version yet, got the path {config!r}"
        )
    config = DareConfig.preset("safe") if config is None else config
    if not isinstance(config, DareConfig):
        raise DareConfigError(f"config: expected a DareConfig; got {type(config).__name__}")
    target = _unwrap(model)
    if not isinstance(target, nn.Module):
        raise UnsupportedModelError(
            f"model: expected a loaded vision-language model of transformers; got {model!r}"
        )
    if "_dare" in vars(target):
        raise DareStateError(
            "expected a model without DARE; this one has it. Call remove_dare(model) first"
        )
    anatomy = locate(target)
    controller = _controller(target, config, anatomy, processor)
    undo = UndoRecord()
    try:
        _attach(target, controller, undo)
    except BaseException:
        undo.undo()
        raise
    return model


def remove_dare(model: nn.Module) -> nn.Module:
    """Take DARE off: the model is exactly what it was.

    Raises:
        DareStateError: The model has no DARE.
    """
    target = _unwrap(model)
    _state(target).undo.undo()
    return model


@contextmanager
def dare_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the plain model inside the block, in this thread.

    Raises:
        DareStateError: The model has no DARE.
    """
    controller = _state(_unwrap(model)).controller
    with controller.disable():
        yield model


def last_report(model: nn.Module) -> DareReport:
    """The report of this thread's last generate or forward of `model`, as plain numbers.

    Raises:
        DareStateError: The model has no DARE, or nothing has run yet.
    """
    return _state(_unwrap(model)).controller.last_report()


def _state(target: nn.Module) -> ModelState:
    state = getattr(target, "__dict__", {}).get("_dare")
    if state is None:
        raise DareStateError(
            "expected a model with DARE; this one has none. Call apply_dare(model) first"
        )
    return state


def _unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _controller(
    target: nn.Module, config: DareConfig, anatomy: Anatomy, processor: Any
) -> Controller:
    _check_model(target, config)
    spec, model_config = anatomy.spec, target.config
    rows = target.get_input_embeddings().weight.shape[0]
    delimiters = resolve_delimiters(config.hop_delimiters, processor)
    check_ids("image_token_ids", config.image_token_ids, model_config, rows)
    check_ids("always_keep_token_ids", config.always_keep_token_ids, model_config, rows)
    for sequence in delimiters:
        check_ids("hop_delimiters", sequence, model_config, rows)
    scorer = make_scorer(config, (spec.pre_attention_norm, spec.key_projection))
    table = build_table(
        len(anatomy.layers),
        schedule=config.schedule,
        vision_retention=config.vision_retention,
        text_retention=config.text_retention,
        cut_layer=config.cut_layer,
        plan_every=config.plan_every,
        max_hops=config.max_hops if config.hop_aware else 1,
        hop_decay=config.hop_decay if config.hop_aware else 1.0,
        scorer_needs_history=scorer.needs_attention,
    )
    prunes_text = min(min(row) for row in table.text) < 1.0
    if prunes_text and scorer.untrained:
        _warn_text(config)
    rules = TokenRules(
        vision_ids=vision_token_ids(model_config, config.image_token_ids),
        type_ids=spec.type_ids,
        keep_ids=tuple(sorted(config.always_keep_token_ids)),
        protected_ids=special_token_ids(model_config, getattr(target, "generation_config", None)),
        protect_text=prunes_text and scorer.untrained,
        prefix=config.prefix_tokens,
        delimiters=delimiters,
        window=config.decode_window,
    )
    implementation = anatomy.text_config._attn_implementation
    exempt = _exempt_layers(anatomy, implementation)
    controller = Controller(config, table, scorer, rules, anatomy, implementation, exempt)
    if exempt:
        controller.notes.append(
            f"layers {sorted(exempt)} keep everything: flash attention counts their sliding "
            "window in stored tokens"
        )
    return controller


def _check_model(target: nn.Module, config: DareConfig) -> None:
    if not hasattr(target, "generate"):
        raise UnsupportedModelError(
            f"expected a model with generate (…ForConditionalGeneration); got "
            f"{type(target).__name__}"
        )
    for name, value in (("decode", "routed"), ("score_scaling", "multiply")):
        if getattr(config, name) == value:
            raise DareConfigError(
                f"{name}: expected a trained router adapter for {value!r}; got a configuration "
                f"without one. Leave {name} at its default"
            )


def _warn_text(config: DareConfig) -> None:
    logger.warning(
        "text_retention=%s with the untrained scorer %r: pruning text without training changes "
        "answers. Set text_retention=1.0, or train a router",
        config.text_retention,
        config.scorer,
    )


def _exempt_layers(anatomy: Anatomy, implementation: str) -> frozenset[int]:
    """Sliding layers under flash attention: its window counts stored tokens, not logical ones."""
    if not is_flash(implementation):
        return frozenset()
    windows = (getattr(layer.self_attn, "sliding_window", None) for layer in anatomy.layers)
    return frozenset(i for i, window in enumerate(windows) if window is not None)


def _attach(target: nn.Module, controller: Controller, undo: UndoRecord) -> None:
    """Set what routing needs on the model's instances, recorded in `undo`."""
    anatomy = controller.anatomy
    state = ModelState(controller, getattr(target, "generate"), undo)  # noqa: B009 - no typed attribute
    for module in anatomy.hooked:
        undo.set(module, "_dare", state)
        undo.hook(module.register_forward_pre_hook(_open_forward, with_kwargs=True))
        undo.hook(module.register_forward_hook(_close_forward, prepend=True, always_call=True))
    undo.set(target, "generate", types.MethodType(routed_generate, target))
    for index, layer in enumerate(anatomy.layers):
        layer_state = LayerState(
            controller=controller,
            index=index,
            inner=layer.forward,
            names=parameter_names(type(layer).forward),
            causal=bool(getattr(layer.self_attn, "is_causal", True)),
            exempt=index in controller.exempt,
        )
        undo.set(layer, "_dare", layer_state)
        undo.set(layer.self_attn, "_dare", layer_state)
        undo.set(layer, "forward", types.MethodType(routed_forward, layer))
    observes = controller.config.resolved_hop_score == "observed"
    if observes or controller.scorer.needs_attention or controller.rules.closes_hops:
        name = observed_name(controller.base_implementation)
        for config in _attention_configs(target, anatomy):
            undo.set(config, "_attn_implementation_internal", name)


def _attention_configs(target: nn.Module, anatomy: Anatomy) -> list[Any]:
    """The config objects attention and masks of the text model are resolved from."""
    found = [anatomy.text_config, target.config.get_text_config()]
    found += [module.config.get_text_config() for module in anatomy.hooked]
    found += [layer.self_attn.config for layer in anatomy.layers]
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
