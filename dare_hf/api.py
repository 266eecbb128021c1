"""Putting DARE on a model and taking it off: the one entry."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from dare_hf.architectures.locate import locate
from dare_hf.config import DareConfig
from dare_hf.config.dare_config import PRESETS
from dare_hf.engine.active_adapter import ActiveAdapter
from dare_hf.engine.attach import (
    attach,
    check_free,
    new_controller,
    new_router,
    router_shapes,
    state_of,
    unwrap,
    watch_attention,
)
from dare_hf.engine.peft_places import check_virtual_tokens
from dare_hf.engine.settings import check_adapter, made_for, resolve
from dare_hf.engine.undo import UndoRecord
from dare_hf.errors import DareConfigError, DareStateError, UnsupportedModelError
from dare_hf.routers.files import check_made_for, read_adapter, read_routers
from dare_hf.routers.holder import NAME, AppliedRouters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.settings import Settings
    from dare_hf.report import DareReport

logger = logging.get_logger("transformers.dare_hf")

# The name of the one adapter that apply_dare puts on a model.
ADAPTER = "default"


def apply_dare(
    model: nn.Module,
    config: DareConfig | str | os.PathLike[str] | None = None,
    *,
    processor: Any = None,
) -> nn.Module:
    """Make `model` route its tokens; in place.

    Args:
        model: A supported model of transformers, or a PeftModel around one.
        config: What to prune, None for `DareConfig()`, which is training-free and safe; or the name
            of a preset; or a folder or hub id, of a training-free configuration or of a trained
            router adapter, whose configuration and weights are read. Such an adapter is not one of
            peft's: LoRA adapters on the same model stay as they are.
        processor: Only needed when `hop_delimiters` of the configuration holds strings.

    Returns:
        The same model.

    Raises:
        DareConfigError: The configuration does not fit this model, or there is no such adapter.
        DareStateError: The model already has DARE.
        UnsupportedModelError: The architecture cannot be routed, or an adapter of peft on it tells
            tokens by their place, or brings virtual ones.
        AdapterMismatchError: The adapter was made for another depth, width or architecture.

    Examples:
        >>> from dare_hf import DareConfig, apply_dare
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llava")
        >>> apply_dare(model, DareConfig(vision_retention=0.5)) is model
        True
        >>> model.generate(**tiny_inputs(model, text=6), max_new_tokens=2).shape[0]
        1
    """
    target = unwrap(model)
    if not isinstance(target, nn.Module):
        raise UnsupportedModelError(
            f"model: expected a loaded model of transformers; got {model!r}"
        )
    file = None
    if isinstance(config, str) and config in PRESETS:
        config = DareConfig.preset(config)
    elif isinstance(config, (str, os.PathLike)):
        config, file = read_adapter(os.fspath(config))
    config = DareConfig() if config is None else config
    if not isinstance(config, DareConfig):
        raise DareConfigError(
            f"config: expected a DareConfig, a preset's name, a folder or hub id, or None; got "
            f"{type(config).__name__}"
        )
    check_free(target)
    check_virtual_tokens(model)
    anatomy = locate(target)
    check_made_for(config, made_for(anatomy))
    check_adapter(config, present=file is not None)
    settings = resolve(target, config, anatomy, processor)
    weights = None if file is None else read_routers(file, router_shapes(settings, anatomy))
    controller = new_controller(settings, anatomy)
    undo = UndoRecord()
    try:
        state = attach(target, controller, undo, owner="apply_dare")
        watch_attention(state, settings)
        if "save_pretrained" not in vars(target):
            undo.put(target, "save_pretrained", _save_pretrained)
        if weights is not None:
            _put_routers(anatomy, settings, weights, undo)
            controller.adapter = ActiveAdapter(anatomy.layers)
            controller.adapter.settings[ADAPTER] = settings
            controller.follow_adapter()
    except BaseException:
        undo.undo()
        raise
    return model


def remove_dare(model: nn.Module) -> nn.Module:
    """Take DARE off: the model is exactly what it was.

    Raises:
        DareStateError: The model has no DARE, or peft owns its adapter.

    Examples:
        >>> from dare_hf import apply_dare, remove_dare
        >>> from dare_hf.testing import tiny_model
        >>> model = apply_dare(tiny_model("llava"))
        >>> remove_dare(model) is model
        True
    """
    state = state_of(model)
    if state.owner == "peft":
        raise DareStateError(
            "expected a model that apply_dare was called on; the adapter of this one is peft's. "
            "Call model.unload() on the PeftModel, or model.delete_adapter(name)"
        )
    state.undo.undo()
    return model


@contextmanager
def dare_applied(
    model: nn.Module,
    config: DareConfig | str | os.PathLike[str] | None = None,
    *,
    processor: Any = None,
) -> Iterator[nn.Module]:
    """Put DARE on for the length of a block; afterwards the model is exactly what it was.

    Args:
        model: As `apply_dare` takes it.
        config: As `apply_dare` takes it.
        processor: As `apply_dare` takes it.

    Raises:
        DareError: Whatever `apply_dare` refuses.

    Examples:
        >>> from dare_hf import dare_applied
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llava")
        >>> with dare_applied(model, "safe"):
        ...     pruned = model.generate(**tiny_inputs(model), max_new_tokens=2)
    """
    apply_dare(model, config, processor=processor)
    state = state_of(model)
    try:
        yield model
    finally:
        if vars(unwrap(model)).get("_dare") is state:  # else the block has taken it off itself
            state.undo.undo()


@contextmanager
def dare_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without DARE inside the block, in this thread; LoRA adapters stay on.

    Raises:
        DareStateError: The model has no DARE.

    Examples:
        >>> from dare_hf import apply_dare, dare_disabled
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> model = apply_dare(tiny_model("llava"))
        >>> with dare_disabled(model):
        ...     plain = model.generate(**tiny_inputs(model), max_new_tokens=2)
    """
    with state_of(model).controller.disable():
        yield model


def last_report(model: nn.Module) -> DareReport:
    """The report of the newest finished generate or forward of `model`, as plain numbers.

    Of whatever thread; where several run at once, each cache has its own (`cache.report`). A note
    says where the model ran again without one.

    Raises:
        DareStateError: The model has no DARE, nothing has run yet, or DARE is switched off now.

    Examples:
        >>> from dare_hf import apply_dare, last_report
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> model = apply_dare(tiny_model("llava"))
        >>> output = model.generate(**tiny_inputs(model), max_new_tokens=2)
        >>> report = last_report(model)
        >>> report.kv_bytes < report.kv_bytes_baseline
        True
    """
    controller = state_of(model).controller
    if controller.disabled:
        raise DareStateError(
            "expected a model whose DARE is switched on; got one inside dare_disabled (or whose "
            "adapter peft has switched off), where the plain model runs and nothing is counted. "
            "Leave the block first"
        )
    return controller.newest.report()


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own save_pretrained, and a word."""
    logger.warning_once(
        "save_pretrained: DARE is no part of the checkpoint. Call apply_dare again on the model "
        "that is loaded from it"
    )
    return type(model).save_pretrained(model, *args, **kwargs)


def _put_routers(
    anatomy: Anatomy, settings: Settings, weights: list[dict[str, Tensor]], undo: UndoRecord
) -> None:
    """Give each layer a router with the weights of an adapter's file, frozen."""
    fresh = [new_router(settings, anatomy, i) for i in range(len(anatomy.layers))]
    for layer, router, tensors in zip(anatomy.layers, fresh, weights, strict=True):
        with torch.no_grad():
            router.load_state_dict(tensors)
        router.requires_grad_(False)
        undo.child(layer, NAME, AppliedRouters({ADAPTER: router}))
