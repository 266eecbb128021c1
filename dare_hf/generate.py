"""The generate DARE puts on a model: a DareCache, the prompt's length, nothing else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from dare_hf.cache import DareCache
from dare_hf.context import GenerationCall
from dare_hf.controller import check_cache
from dare_hf.errors import DareInputError
from dare_hf.modality import mask_to_modality

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.get_logger("dare_hf")


def routed_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """HF's generate with a DareCache; takes what it takes, and `modality_mask`.

    Args:
        model: The model it was put on.
        args: As HF's generate.
        kwargs: As HF's generate, and modality_mask [B, tokens]: 1 for vision, 0 for text, over
            the prompt; needed where only inputs_embeds are given.

    Raises:
        DareInputError: A foreign cache, a cache_implementation, or a wrong modality_mask.
    """
    state = model._dare
    controller, inner = state.controller, state.generate
    if controller.disabled:
        return inner(*args, **kwargs)
    names = ("inputs", "generation_config")
    given = dict(zip(names, args, strict=False)) | kwargs
    config = given.get("generation_config")
    kwargs = _with_cache(model, kwargs, config)
    mask = kwargs.pop("modality_mask", None)
    call = _call(given, kwargs.get("past_key_values"), mask)
    call.continues = _continues(model, given, config)
    controller.enter_generate(call)
    started = time.perf_counter()
    try:
        return inner(*args, **kwargs)
    finally:
        controller.leave_generate(time.perf_counter() - started)


def _with_cache(model: Any, kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """The keyword arguments with a DareCache in them, where a cache is used at all."""
    kwargs = dict(kwargs)
    check_cache(kwargs.get("past_key_values"))
    asked = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if asked is not None:
        raise DareInputError(
            "cache_implementation: expected none, since DARE brings its own cache; got "
            f"{asked!r}. Leave it out, or run inside `with dare_disabled(model)`"
        )
    own = getattr(model.generation_config, "cache_implementation", None)
    if own is not None:
        logger.info("cache_implementation=%r of the checkpoint is replaced by DareCache", own)
        kwargs["cache_implementation"] = None
    if kwargs.get("past_key_values") is None and _uses_cache(model, kwargs, config):
        kwargs["past_key_values"] = DareCache()
    return kwargs


def _uses_cache(model: Any, kwargs: dict[str, Any], config: Any) -> bool:
    for source in (kwargs.get("use_cache"), getattr(config, "use_cache", None)):
        if source is not None:
            return bool(source)
    return getattr(model.generation_config, "use_cache", None) is not False


def _continues(model: Any, given: dict[str, Any], config: Any) -> bool:
    """Whether the caller will hold the cache after generate returned."""
    if given.get("past_key_values") is not None:
        return True
    sources = (
        given.get("return_dict_in_generate"),
        getattr(config, "return_dict_in_generate", None),
        getattr(model.generation_config, "return_dict_in_generate", None),
    )
    return any(bool(source) for source in sources)


def _call(given: dict[str, Any], cache: DareCache | None, mask: Tensor | None) -> GenerationCall:
    ids = given.get("inputs")
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None:
            ids = given[name]
    start = cache.get_seq_length() if cache is not None else 0
    length = ids.shape[1] if ids is not None else 1
    if given.get("inputs_embeds") is not None and start:
        length += start
    if mask is not None:
        mask_to_modality(mask, ids.shape[0], min(length - start, ids.shape[1]))
    return GenerationCall(prompt_length=length, start=start, modality_mask=mask)
