"""The generate DARE puts on a model: a DareCache, the prompt's length, nothing else."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from dare_hf.cache import DareCache
from dare_hf.cache.refused import check_cache, check_implementation
from dare_hf.compat import CACHE, check_new_images, check_prefill_chunks, named_cache
from dare_hf.engine.call_config import called_with
from dare_hf.engine.counted_call import CountedCall
from dare_hf.engine.peft_places import check_prepared
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.forward.modality import check_mask
from dare_hf.forward.packed import check_packed
from dare_hf.routing.selection import isin_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from dare_hf.engine.controller import Controller

logger = logging.get_logger("transformers.dare_hf")


@dataclass
class LoopOffer:
    """A hop loop for the next generate of this context, past wrappers that check kwargs."""

    loop: Any
    taken: bool = False


_OFFER: ContextVar[LoopOffer | None] = ContextVar("dare_hf_hop_loop", default=None)


@contextmanager
def offered_loop(loop: Any) -> Iterator[LoopOffer]:
    """Let the first generate of a model with DARE inside the block run `loop`."""
    offer = LoopOffer(loop)
    token = _OFFER.set(offer)
    try:
        yield offer
    finally:
        _OFFER.reset(token)


def _take_loop(kwargs: dict[str, Any]) -> Any:
    """The hop loop of this call, taken out of its keyword arguments; None without one."""
    offer, loop = _OFFER.get(), kwargs.pop("hop_loop", None)
    if loop is None and offer is not None and not offer.taken:
        offer.taken, loop = True, offer.loop
    if loop is not None and not hasattr(loop, "prepare"):
        raise DareInputError(
            f"hop_loop: expected a dare_hf.generation.HopLoop; got {type(loop).__name__}. Pass "
            "HopLoop(on_hop=...)"
        )
    return loop


def routed_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """HF's generate with a DareCache; takes what it takes, and what DARE does.

    Args:
        model: The model it was put on.
        args: As HF's generate.
        kwargs: As HF's generate, and modality_mask [B, tokens]: 1 for vision, 0 for text, over
            the prompt; needed where only inputs_embeds are given. hop_loop: a
            `dare_hf.generation.HopLoop`. dare_config: a DareConfig for this call alone.

    Raises:
        DareInputError: A foreign cache, a cache_implementation, a wrong modality_mask, packed
            sequences, or a hop_loop together with what it cannot serve.
        DareConfigError: A dare_config that does not fit the model or needs an adapter.
        DareStateError: A hop_loop or dare_config inside `dare_disabled`, or a dare_config beside a
            router adapter.
        UnsupportedModelError: A PeftModel with virtual tokens has called it.
    """
    if (config := kwargs.pop("dare_config", None)) is not None:
        with called_with(model, config):
            return routed_generate(model, *args, **kwargs)
    state = model._dare
    controller, inner = state.controller, state.generate
    loop = _take_loop(kwargs)
    if controller.disabled:
        controller.newest.note_uncounted()
        if loop is not None:
            raise DareStateError(
                "hop_loop: expected DARE switched on, which counts the hops; got a generate inside "
                "dare_disabled. Leave the block; retention 1.0 prunes nothing"
            )
        return inner(*args, **kwargs)
    check_prepared(model)
    check_packed(kwargs)
    controller.follow_adapter()
    kwargs = named_cache(kwargs)
    names = ("inputs", "generation_config")
    given = dict(zip(names, args, strict=False)) | kwargs
    config = given.get("generation_config")
    kwargs = _with_cache(model, kwargs, config)
    check_prefill_chunks(_setting(model, kwargs, config, "prefill_chunk_size"))
    mask = kwargs.pop("modality_mask", None)
    if mask is None and controller.anatomy.spec.generates_inside:
        mask = _placeholders(given, controller.rules.vision_ids)
    call = _call(given, kwargs.get(CACHE), mask)
    ids = given.get("input_ids", given.get("inputs"))
    check_new_images(model, call.start, ids, controller.rules.vision_ids)
    call.continues = _continues(model, given, config)
    if kwargs.get(CACHE) is not None:
        kwargs[CACHE].drafts = bool(getattr(config, "is_assistant", False))
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _CountedStreamer(kwargs["streamer"], controller, call)
    if loop is not None:
        args, kwargs = (), loop.prepare(model, call, args, kwargs)
    with controller.generating(call, kwargs.get(CACHE)):
        return inner(*args, **kwargs)


class _CountedStreamer(BaseStreamer):
    """The caller's streamer; whoever reads it to its end in another thread finds the report.

    Generate ends a streamer before it returns.

    Args:
        inner: The caller's.
        controller: The model's controller.
        call: The generate that writes to it.
    """

    def __init__(self, inner: Any, controller: Controller, call: CountedCall) -> None:
        self._inner, self._controller, self._call = inner, controller, call

    def put(self, value: Tensor) -> None:
        """Pass new ids on."""
        self._inner.put(value)

    def end(self) -> None:
        """Close the report, then pass the end on."""
        self._controller.finish(self._call)
        self._inner.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _with_cache(model: Any, kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """The keyword arguments with a DareCache in them, where a cache is used at all."""
    check_cache(kwargs.get(CACHE))
    check_implementation(kwargs.get("cache_implementation"))
    own = getattr(model.generation_config, "cache_implementation", None)
    given = getattr(config, "cache_implementation", None)
    if given != own:  # the checkpoint's own may come in a copy of its config
        check_implementation(given)
    if own is not None:
        logger.info("cache_implementation=%r of the checkpoint is replaced by DareCache", own)
        kwargs["cache_implementation"] = None
    if kwargs.get(CACHE) is None and _uses_cache(model, kwargs, config):
        kwargs[CACHE] = DareCache()
    return kwargs


def _uses_cache(model: Any, kwargs: dict[str, Any], config: Any) -> bool:
    found = _setting(model, kwargs, config, "use_cache")
    return found is None or bool(found)


def _setting(model: Any, kwargs: dict[str, Any], config: Any, name: str) -> Any:
    """What generate will use for `name`: the call's, the given config's, the model's, else None."""
    sources = (
        kwargs.get(name),
        getattr(config, name, None),
        getattr(model.generation_config, name, None),
    )
    return next((source for source in sources if source is not None), None)


def _continues(model: Any, given: dict[str, Any], config: Any) -> bool:
    """Whether the caller will hold the cache after generate returned."""
    if given.get(CACHE) is not None:
        return True
    sources = (
        given.get("return_dict_in_generate"),
        getattr(config, "return_dict_in_generate", None),
        getattr(model.generation_config, "return_dict_in_generate", None),
    )
    return any(bool(source) for source in sources)


def _call(given: dict[str, Any], cache: DareCache | None, mask: Tensor | None) -> CountedCall:
    ids = given.get("inputs")
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None:
            ids = given[name]
    start = cache.get_seq_length() if cache is not None else 0
    length = ids.shape[1] if ids is not None else 1
    if given.get("inputs_embeds") is not None and start:
        length += start
    rows = 1 if ids is None else ids.shape[0]
    wider = mask is not None and mask.shape[:1] == (rows,) and mask.shape[1:] > (length,)
    if mask is not None and not wider:  # that is held to the prompt the first forward brings
        check_mask(mask, rows, length - start, start)
    prompt = None if ids is None or ids.is_floating_point() else ids
    return CountedCall(prompt_length=length, start=start, modality_mask=mask, prompt=prompt)


def _placeholders(given: dict[str, Any], vision_ids: Sequence[int]) -> Tensor | None:
    """Bool[B, S]: where the prompt's ids stand for vision; the text model sees embeddings only."""
    ids = given.get("input_ids")
    return None if ids is None else isin_ids(ids, vision_ids)
