"""What differs between the versions of transformers this package accepts: 5.19 to 5.24.

Nothing else in the package looks at a version. Older ones are not accepted: up to 5.18 generate
gives the beams of a row with several images those images in the wrong order, with or without DARE;
up to 5.17 it does not encode images before it begins, and needs huggingface_hub < 2.0. Newer ones
are not tested: they run with a warning, and what they call by another name is refused.
"""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers.cache_utils import Cache
from transformers.integrations import peft as integration
from transformers.utils import logging

from dare_hf.errors import DareInputError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

OLDEST = "5.19"
"""The oldest version of transformers that passes the tests; pyproject declares the same."""
NEWEST = "5.24"
"""The newest one; pyproject excludes what comes after it."""

OLDEST_PEFT = "0.21"
"""The oldest version of peft that passes the tests; pyproject declares the same."""

logger = logging.get_logger("transformers.dare_hf")

_BROKEN = {
    ("llama4", "5.24.0"): "its forward asks its text model's output for image_outputs, which that "
    "does not have"
}
_READ_BY_POSITION = {"gemma3": "token_type_ids", "shieldgemma2": "token_type_ids"}


def minor(version: str) -> tuple[int, int]:
    """Major and minor number of a version: "5.23.0.dev0" is (5, 23)."""
    first, second = version.split(".")[:2]
    return int(first), int(second)


VERSION = minor(transformers.__version__)
"""Major and minor number of the transformers that runs."""

CACHE_NAMES = ("past_key_values", "cache")
"""What the cache is called: up to 5.23, and since 5.24."""
CACHE = CACHE_NAMES[VERSION >= (5, 24)]
"""Its name among the arguments of generate, models, layers and attention, and in their outputs."""


def untested() -> str:
    """A sentence about a transformers newer than the tested ones; empty for a tested one."""
    if minor(NEWEST) >= VERSION:
        return ""
    return (
        f"transformers {transformers.__version__} is not tested with this dare_hf, which knows "
        f"{OLDEST} to {NEWEST}: install a version of those, or run `dare-hf conformance` to see "
        "what holds"
    )


def warn_untested() -> None:
    """Say once that this transformers is newer than the tested ones."""
    if text := untested():
        logger.warning_once(text)


def broken(model_type: str | None) -> str:
    """Why this transformers itself cannot run an architecture, empty where it can.

    Args:
        model_type: `config.model_type` of the model.
    """
    return _BROKEN.get((model_type, transformers.__version__), "")


def named_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the cache under the one name that this transformers reads.

    Args:
        kwargs: Of generate or a forward; the cache may have either name.

    Raises:
        DareInputError: Two caches are given.
    """
    found = {name: kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None}
    if len(found) > 1:
        raise DareInputError(
            "cache, past_key_values: expected one of these two names of the same argument; got "
            "both. Leave one out"
        )
    named = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    asked = any(name in kwargs for name in CACHE_NAMES)
    return named | {CACHE: next(iter(found.values()), None)} if asked else named


def stray_cache(kwargs: Mapping[str, Any]) -> str | None:
    """Name of an argument that holds a cache and is none of `CACHE_NAMES`."""
    stray = (n for n, value in kwargs.items() if isinstance(value, Cache) and n not in CACHE_NAMES)
    return next(stray, None)


def check_takes_cache(*modules: nn.Module) -> None:
    """Refuse modules that take their cache by a name this package does not know.

    Args:
        modules: Text model and decoder layers. A forward of a subclass may hide its arguments
            behind `*args, **kwargs`; then those of the class it inherits from tell.

    Raises:
        UnsupportedModelError: No forward of a module's classes has an argument of that name.
    """
    for kind in {type(module) for module in modules}:
        if not any(CACHE in _arguments(base) for base in kind.__mro__):
            raise UnsupportedModelError(
                f"{kind.__name__}: expected a forward that takes its cache as {CACHE!r}, as in "
                f"transformers {OLDEST} to {NEWEST}; got one without. "
                f"{untested() or 'This class is not tested with DARE'}"
            )


def _arguments(kind: type) -> tuple[str, ...]:
    forward = vars(kind).get("forward")
    return tuple(inspect.signature(forward).parameters) if callable(forward) else ()


def cache_of(output: Any) -> Any:
    """The cache in the output of generate or of a forward; None where there is none."""
    return getattr(output, CACHE, None)


def adapter_methods() -> dict[str, types.FunctionType]:
    """What transformers calls for its adapters, where it refuses the peft that is tested here.

    transformers 5.24 asks `add_adapter`, `set_adapter` and the like for peft 0.22, newer than every
    release of its day; their code is that of 5.23, which asks for 0.20, and works with 0.21.

    Returns:
        Name and function of each method that would refuse, with its floor at `OLDEST_PEFT`; none
        where the peft in use is new enough for it, or older than is tested.
    """
    if not minor(OLDEST_PEFT) <= minor(peft.__version__) < minor(integration.MIN_PEFT_VERSION):
        return {}
    return {
        name: _with_floor(method)
        for name, method in vars(integration.PeftAdapterMixin).items()
        if "MIN_PEFT_VERSION" in getattr(getattr(method, "__code__", None), "co_names", ())
    }


def call_adapter_method(name: str, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call one of `adapter_methods` on a model; found by name, so that a pickle can hold it."""
    return adapter_methods()[name](model, *args, **kwargs)


def _with_floor(method: types.FunctionType) -> types.FunctionType:
    """The same code with another floor under peft, changing nothing in transformers itself."""
    names = {**method.__globals__, "MIN_PEFT_VERSION": OLDEST_PEFT}
    own = types.FunctionType(
        method.__code__, names, method.__name__, method.__defaults__, method.__closure__
    )
    own.__kwdefaults__ = method.__kwdefaults__
    return own


class AdapterSource(NamedTuple):
    """Where peft or transformers is loading an adapter from.

    Attributes:
        place: A folder or hub id; None where the tensors are given.
        tensors: The tensors that are given.
        hub: subfolder, revision, token and the like, as `hf_hub_download` takes them.
        direct: Whether transformers loads it, into the model itself.
    """

    place: str | None
    tensors: Mapping[str, Tensor] | None
    hub: dict[str, Any]
    direct: bool


def adapter_source() -> AdapterSource | None:
    """Where the load that is now in progress takes an adapter from; None outside of one.

    A loader of peft (0.21) or transformers (5.19 to 5.24) puts routing on the model before it opens
    the file of the weights, tells the tuner nothing of that file, and nothing at all when it cannot
    be read. So that a bad file is refused before anything is changed, its place is read off the
    loader's own frame; where that has no such name the adapter is refused at its first use.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in _LOADERS:
        frame = frame.f_back
    if frame is None:
        return None
    found = frame.f_locals
    asked = getattr(found.get("load_config"), "download_kwargs", None)
    asked = asked or found.get("hf_hub_download_kwargs") or found.get("kwargs") or {}
    known = inspect.signature(hf_hub_download).parameters
    hub = {name: asked[name] for name in asked if name in known}
    place, tensors = found.get(_LOADERS[frame.f_code]), found.get("adapter_state_dict")
    if place is None and tensors is None:
        return None
    direct = _LOADERS[frame.f_code] == "peft_model_id"
    return AdapterSource(None if place is None else str(place), tensors, hub, direct)


_LOADERS: dict[types.CodeType, str] = {
    getattr(loader, "__func__", loader).__code__: name
    for loader, name in (
        (peft.PeftModel.from_pretrained, "model_id"),
        (peft.PeftModel.load_adapter, "model_id"),
        (peft.PeftMixedModel.from_pretrained, "model_id"),
        (peft.PeftMixedModel.load_adapter, "model_id"),
        (integration.PeftAdapterMixin.load_adapter, "peft_model_id"),
    )
}


def check_prefill_chunks(size: int | None) -> None:
    """Refuse a prefill in chunks where transformers computes something else than the prompt.

    Args:
        size: `prefill_chunk_size` of this generate, None for a prefill in one piece.

    Raises:
        DareInputError: transformers is older than 5.23: it leaves images out of every chunk, and
            (up to 5.20) begins a carried cache anew.
    """
    if size is None or VERSION >= (5, 23):
        return
    raise DareInputError(
        "prefill_chunk_size: expected transformers >= 5.23, whose chunks bring their images along; "
        f"got {size} with transformers {transformers.__version__}, which leaves the images out. "
        "Leave it out, or upgrade transformers"
    )


def check_new_images(
    model: nn.Module, past: int, ids: Tensor | None, vision_ids: tuple[int, ...]
) -> None:
    """Refuse images behind a carried cache where transformers does not place them.

    Args:
        model: The model generate is called on.
        past: Logical tokens in the cache.
        ids: Long[B, N] the ids it is given, of the whole sequence or of what is new.
        vision_ids: Ids that stand for images.

    Raises:
        DareInputError: transformers is older than 5.23 and the model has multimodal RoPE, whose
            positions it continues as text, or is a Gemma 3, whose two-way mask it misreads.
    """
    if VERSION >= (5, 23) or not past or ids is None or not misplaces(model):
        return
    new = ids[:, past:] if ids.shape[1] > past else ids
    if bool(torch.isin(new, torch.tensor(vision_ids, dtype=ids.dtype, device=ids.device)).any()):
        raise DareInputError(
            f"{CACHE}: expected transformers >= 5.23 for new images behind a cache of "
            f"{past} tokens; got transformers {transformers.__version__}, which places the images "
            f"of a {model.config.model_type} wrongly there. Pass the whole conversation without "
            "a cache, or upgrade transformers"
        )


def misplaces(model: nn.Module) -> bool:
    """Whether this transformers misplaces the images of later turns of this model."""
    mrope = any("rope_deltas" in vars(module) for module in model.modules())
    return VERSION < (5, 23) and (mrope or model.config.model_type in _READ_BY_POSITION)


def checkpoints(layer: nn.Module) -> bool:
    """Whether this layer recomputes itself in a backward, so that transformers keeps no cache.

    Since 5.24 it does so only where gradients are recorded.
    """
    on = getattr(layer, "gradient_checkpointing", False) and layer.training
    return bool(on) and (VERSION < (5, 24) or torch.is_grad_enabled())


def check_checkpoints(layer: nn.Module) -> None:
    """Refuse gradient checkpoints that enclose the routed layer, whose router would run twice.

    Args:
        layer: A decoder layer in a training forward with hops or routers.

    Raises:
        DareInputError: Checkpointing is on and transformers is older than 5.23, where a layer's
            checkpoint lies around its `forward`, not inside.
    """
    if VERSION >= (5, 23) or not getattr(layer, "gradient_checkpointing", False):
        return
    if layer.training:
        raise DareInputError(
            "gradient_checkpointing: expected transformers >= 5.23 in a training forward with "
            f"routers or hops; got transformers {transformers.__version__}, whose checkpoints "
            "would run the router twice. Switch it off, or upgrade transformers"
        )


def processed(processor: Any, **kwargs: Any) -> Any:
    """What a Chameleon processor makes of texts that go on, without a separator behind them.

    Up to 5.22 it appends the separator whatever `return_for_text_completion` says.

    Args:
        processor: A ChameleonProcessor.
        kwargs: As it takes them; `return_tensors="pt"`, and `padding_side="left"` for several.
    """
    batch = processor(return_for_text_completion=True, **kwargs)
    if VERSION >= (5, 23):
        return batch
    ids = batch["input_ids"]
    if not (ids[:, -1] == processor.tokenizer.sep_token_id).all():
        return batch
    for name, value in batch.items():
        if value.shape[:2] == ids.shape and value.ndim == 2:
            batch[name] = value[:, :-1]
    return batch


def span_inputs(model: Any, inputs: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a forward over new tokens behind a cache, with type ids the mask can read.

    Gemma 3 reads them by position, so that they must cover the whole sequence; up to 5.22
    `prepare_inputs_for_generation` cuts them to the new tokens.

    Args:
        model: The model.
        inputs: What `prepare_inputs_for_generation` made.
        carried: The model_kwargs of generate, which cover the whole sequence.
    """
    name = _READ_BY_POSITION.get(model.config.model_type)
    if VERSION >= (5, 23) or name is None or carried.get(name) is None:
        return inputs
    return inputs | {name: carried[name]}
