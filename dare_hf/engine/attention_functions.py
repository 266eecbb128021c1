"""Attention functions that let a scorer read queries, keys and values on their way.

HF resolves attention by name. For each implementation a `dare_<name>` is registered that calls
the original and, only while a forward asks for it, scores the keys by the last queries. The
mask function of the same name is registered with it: without one, masks vanish silently.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dare_hf.architectures.locate import attention_of
from dare_hf.errors import DareStateError
from dare_hf.routing.scores import Softmax
from dare_hf.scoring.observe import AttentionCall
from dare_hf.simulation.damping import is_marked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from dare_hf.engine.undo import UndoRecord
    from dare_hf.routing.scores import HeadMean

PREFIX = "dare_"


class View:
    """An object that shows another attention implementation than its own, and in all else is it.

    A config may be shared by models, so that of one model's attention a view is set: nothing is
    written on the config. And transformers 5.23 looks the flash kernels up by
    `module.config._attn_implementation`, which the original function must find by its own name.
    """

    def __init__(self, inner: Any, implementation: str) -> None:
        vars(self).update(_inner=inner, _attn_implementation=implementation)

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # of a copy that is being made
            raise AttributeError(name)
        value = getattr(self._inner, name)
        return View(value, self._attn_implementation) if name == "config" else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _watched, (self._inner, self._attn_implementation.removeprefix(PREFIX))


def watch(attention: nn.Module, implementation: str, undo: UndoRecord) -> None:
    """Let an attention module call the observing twin of its implementation.

    Args:
        attention: The module; it resolves its function by the name in its config.
        implementation: The name of the original.
        undo: Where it is recorded.
    """
    config: Any = attention.config
    if not isinstance(config, View):
        undo.set(attention, "config", _watched(config, implementation))


def watch_layers(layers: Iterable[nn.Module], implementation: str, undo: UndoRecord) -> None:
    """Let the attention of these decoder layers be read, as `watch` does for one."""
    for layer in layers:
        watch(attention_of(layer), implementation, undo)


def _watched(config: Any, implementation: str) -> View:
    return View(config, observed_name(implementation))


def reads_positions(attention: nn.Module) -> bool:
    """Whether an attention computes with `position_ids` itself (a scale by position)."""
    return "position_ids" in inspect.signature(type(attention).forward).parameters


def observed_name(implementation: str) -> str:
    """Name of the observing twin of an attention implementation; registered on first use."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _observing(implementation))
        masks = ALL_MASK_ATTENTION_FUNCTIONS
        if implementation in masks.valid_keys():
            AttentionMaskInterface.register(name, masks[implementation])
    return name


def check_attention(config: Any, implementation: str) -> None:
    """Refuse a text model whose attention is another than when DARE was put on.

    Masks are gathered in the form of that one, and scores are read by its watching twin.

    Args:
        config: The text config.
        implementation: The name it had.

    Raises:
        DareStateError: It is another now.
    """
    if (now := config._attn_implementation) != implementation:
        raise DareStateError(
            f"expected the attention implementation the model had when DARE was put on, "
            f"{implementation!r}; it is {now!r} now (set_attn_implementation?). Call "
            "remove_dare(model), set the attention implementation, then apply_dare(model) again"
        )


def _observing(implementation: str) -> Any:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = _original(module, implementation)
        state = module.__dict__.get("_dare")
        caller = View(module, implementation) if "flash" in implementation else module
        if state is None or not (state.watching or is_marked(attention_mask)):
            return function(caller, query, key, value, attention_mask, *args, **kwargs)
        if "flash" in implementation and state.controller.context is not None:
            # gaps in the ids of one row would be read as packed sequences (transformers 5.23,
            # modeling_flash_attention_utils._is_packed_sequence); RoPE is already computed
            kwargs["position_ids"] = None
        query, key, value = tensors = state.tensors(query, key, value)
        softmax = _softmax(query, state.mean, kwargs)
        call = AttentionCall(softmax, kwargs.get("sliding_window"), attention_mask)
        call = call._replace(mask=state.before_attention(tensors, call))
        output = function(caller, query, key, value, call.mask, *args, **kwargs)
        state.after_attention(tensors, call)
        return output

    attend.__name__ = PREFIX + implementation
    return attend


def _original(module: nn.Module, implementation: str) -> Any:
    if implementation == "eager":  # not in the interface: each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _softmax(query: Tensor, mean: HeadMean, arguments: Mapping[str, Any]) -> Softmax:
    """What an attention function does, by the keyword arguments transformers calls it with."""
    scaling, sinks = arguments.get("scaling"), arguments.get("s_aux")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Softmax(
        scaling, mean, arguments.get("softcap"), None if sinks is None else sinks.detach()
    )
