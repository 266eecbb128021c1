"""Settings of one generate call, on a model that has DARE."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dare_hf.config import DareConfig
from dare_hf.engine.attention_functions import watch_layers
from dare_hf.engine.settings import check_adapter, resolve
from dare_hf.errors import DareConfigError, DareStateError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def called_with(model: Any, config: Any) -> Iterator[None]:
    """Route the forwards of this thread by `config` inside the block.

    Args:
        model: The model with DARE.
        config: Training-free settings.

    Raises:
        DareConfigError: It is no DareConfig, does not fit the model, or needs an adapter.
        DareStateError: DARE is switched off, or the model routes by an adapter of its own.
    """
    state = model._dare
    controller = state.controller
    if not isinstance(config, DareConfig):
        raise DareConfigError(
            f"dare_config: expected a DareConfig; got {type(config).__name__}. Pass "
            "DareConfig(...) or DareConfig.preset(name)"
        )
    if controller.adapter is not None:
        raise DareStateError(
            "dare_config: expected a model without a router adapter, which brings its own rates "
            f"and scores; this one routes by adapter {controller.adapter.name!r}. Leave "
            "dare_config out, or take the adapter off first"
        )
    if controller.disabled:
        raise DareStateError(
            "dare_config: expected DARE switched on; got a generate inside dare_disabled. Leave "
            "the block, or leave dare_config out"
        )
    check_adapter(config, present=False)
    settings = resolve(model, config, controller.anatomy)
    if settings.observes:  # for good: another thread may be in a call of its own
        watch_layers(controller.anatomy.layers, controller.base_implementation, state.undo)
    with controller.instead(settings):
        yield
