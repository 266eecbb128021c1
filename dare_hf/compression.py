"""A context asked about many times: read it once, keep the part of its cache that it needs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers.utils import logging

from dare_hf.architectures.locate import attention_of
from dare_hf.architectures.tensor_parallel import shared_heads
from dare_hf.cache import DareCache
from dare_hf.compat import CACHE, CACHE_NAMES
from dare_hf.engine.attach import state_of, unwrap
from dare_hf.engine.attention_functions import watch_layers
from dare_hf.engine.reading_scores import ReadingScores
from dare_hf.engine.repetition import Repetition, keeping_all, listening, reading_inputs
from dare_hf.errors import DareInputError, DareStateError, UnsupportedModelError
from dare_hf.hops.ledger_rows import know_rows
from dare_hf.hops.reconstruction import Shares, decide_context

if TYPE_CHECKING:
    from torch import nn

    from dare_hf.cache import Thinning
    from dare_hf.engine.attach import ModelState

logger = logging.get_logger("transformers.dare_hf")

_Score = Literal["repetition", "reading"]

INSTRUCTION = "Repeat the previous context:"
FIRST_TOKENS = 4
"""Tokens at the head of a context that all layers keep: attention rests on them (sinks)."""


def compress_context(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep: float = 0.5,
    *,
    score: _Score = "repetition",
    processor: Any = None,
    recent_tokens: int = 32,
    chunk_tokens: int = 2048,
) -> DareCache:
    """Read a context once and keep, in each layer, the keys that its own repetition needs.

    The context is read whole, whatever the rates of the model's configuration (those go for
    questions and answers later); then it is read once more behind itself, and each stored key is
    scored by the attention it gets. One threshold over all layers leaves the share `keep`.
    Which keys stay does not depend on any question. It costs about a second prefill, or nearly
    nothing with ``score="reading"``, which loses more.

    Ask by giving `generate` the context and a question behind it, and the cache: a copy
    (``copy.deepcopy(cache)``) for each question, or the cache itself, cropped afterwards:
    ``cache.crop(length - cache.get_seq_length())`` with `length` the context's columns.

    Args:
        model: A model with DARE, or a PeftModel around one.
        inputs: What `generate` takes for the context alone: ids, mask, images. Rows of a batch
            are compressed each by itself.
        keep: Share of the context's tokens that layers keep, mean over the layers, in (0, 1]. 1
            leaves the unpruned cache. `max_kv_tokens` of the configuration is a cap per layer.
        score: "repetition", or "reading": no second pass; keys are scored by the attention of the
            context's last 128 tokens and by how far they and their values point away from what
            all have in common.
        processor: The processor or tokenizer; then the repetition is asked for in words ("Repeat
            the previous context:"). None: the context simply follows itself.
        recent_tokens: The last tokens of the context that all layers keep, at least 1. The first 4
            (or `prefix_tokens`) and ids that are always kept stay as well.
        chunk_tokens: Tokens that are repeated at once; memory is that of the context and these.

    Returns:
        The cache of the context, pruned, with the original positions. Its report says what was
        kept; stored scores are those it was cut by.

    Raises:
        DareStateError: The model has no DARE, or it is switched off, or the model keeps no cache
            (gradient checkpointing), or its attention cannot be read.
        DareInputError: An argument is out of range, the inputs are none, or a cache is given.
        UnsupportedModelError: The text model reads images beside the tokens, or heads of a layer
            lie on several devices (tensor parallelism).

    Source: docs/method.md, section 5 (reconstruction).

    Examples:
        >>> from dare_hf import apply_dare, compress_context
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> model = apply_dare(tiny_model("llava"))
        >>> context = tiny_inputs(model, text=120)
        >>> cache = compress_context(model, context, keep=0.5)
        >>> cache.get_seq_length() == context["input_ids"].shape[1]
        True
        >>> cache.kept_lengths().float().mean().item() < cache.get_seq_length()
        True
    """
    started = time.perf_counter()
    _check(inputs, keep, recent_tokens, chunk_tokens)
    _check_score(score, processor)
    state = state_of(model)
    _check_model(state, unwrap(model))
    controller, cache = state.controller, DareCache()
    controller.follow_adapter()
    prunes = keep < 1 or controller.config.max_kv_tokens is not None
    if prunes:
        watch_layers(controller.anatomy.layers, controller.base_implementation, state.undo)
    reading = ReadingScores(controller, cache) if prunes and score == "reading" else None
    with listening(controller, reading) if reading else nullcontext():
        given = _prefill(model, state, inputs, cache)
    if prunes:
        repetition = Repetition(controller, cache, given, _encoded(processor), chunk_tokens)
        repetition.check()
        scores = reading.scores() if reading else repetition.scores()
        first = max(FIRST_TOKENS, controller.config.prefix_tokens)
        shares = Shares(keep, first, recent_tokens, controller.config.max_kv_tokens)
        whole = {layer for layer, least in controller.exempt.items() if not least}
        _keep(cache, decide_context(cache, scores, shares, whole), keep)
    # What is held depends on scores, so it is a given to counts, as a prompt is.
    counters = cache.hop_counters
    counters.ledgers = [None] * len(counters.ledgers)
    know_rows(cache, len(controller.anatomy.layers))
    recorder: Any = cache.recorder
    recorder.builder.set_seconds(time.perf_counter() - started)
    controller.newest.finish(recorder)
    return cache


def _check(inputs: Any, keep: Any, recent_tokens: Any, chunk_tokens: Any) -> None:
    """Refuse arguments no context can be compressed by."""
    if not isinstance(inputs, Mapping):
        raise DareInputError(
            "inputs: expected what a processor returns for the context, a mapping of generate's "
            f"arguments (input_ids, attention_mask, images); got {type(inputs).__name__}"
        )
    if carried := [name for name in CACHE_NAMES if inputs.get(name) is not None]:
        raise DareInputError(
            f"inputs: expected a context from its start; got {carried[0]!r} among them. Leave the "
            "cache out, and give the whole context"
        )
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if not number or not 0 < keep <= 1:
        raise DareInputError(f"keep: expected a share in (0, 1]; got {keep!r}")
    for name, value in (("recent_tokens", recent_tokens), ("chunk_tokens", chunk_tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DareInputError(f"{name}: expected an int of at least 1; got {value!r}")


def _check_score(score: Any, processor: Any) -> None:
    """Refuse an unknown score, and words for one that says none."""
    if score not in get_args(_Score):
        raise DareInputError(f"score: expected one of {list(get_args(_Score))}; got {score!r}")
    if score == "reading" and processor is not None:
        raise DareInputError(
            "processor: expected none with score='reading', which repeats nothing; got one. Leave "
            "it out, or take score='repetition'"
        )


def _check_model(state: ModelState, model: nn.Module) -> None:
    """Refuse a model whose keys cannot be scored now."""
    controller = state.controller
    if controller.disabled:
        raise DareStateError(
            "expected a model whose DARE is switched on; got one inside dare_disabled (or whose "
            "adapter peft has switched off), which cannot go on with a pruned cache. Leave the "
            "block first"
        )
    shared = [shared_heads(attention_of(layer), model) for layer in controller.anatomy.layers]
    if any(shared):
        raise UnsupportedModelError(
            "compress_context: expected a model whose attention heads lie on one device a layer; "
            "got one under tensor parallelism, whose processes would keep different keys. Load it "
            "with device_map instead, or use max_kv_tokens"
        )


def _encoded(processor: Any) -> tuple[int, ...]:
    """The ids of the instruction; none without a tokenizer."""
    if processor is None:
        return ()
    tokenizer = getattr(processor, "tokenizer", processor)
    return tuple(tokenizer.encode(INSTRUCTION, add_special_tokens=False))


def _prefill(
    model: Any, state: ModelState, inputs: Mapping[str, Any], cache: DareCache
) -> dict[str, Any]:
    """Read the context whole into `cache`, as generate does; what the text model got."""
    controller = state.controller
    with keeping_all(controller), reading_inputs(controller.anatomy.text_model) as calls:
        model.generate(
            **inputs,
            **{CACHE: cache},
            use_cache=True,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
        )
    seen = cache.get_seq_length()
    if not seen:
        raise DareStateError(
            "compress_context: expected a model that keeps a cache; got one that keeps none "
            "(gradient checkpointing in training mode?). Call model.eval() first"
        )
    if len(calls) != 1 or len(cache.log) != seen:
        raise DareInputError(
            f"inputs: expected a context that generate reads in one forward; it made {len(calls)}. "
            "Leave out prefill_chunk_size, guidance_scale, prompt lookup and assistants, here and "
            "in model.generation_config"
        )
    return calls[0]


def _keep(cache: DareCache, decided: list[Thinning], keep: float) -> None:
    """Let go of what is decided, and note what stays."""
    counters = cache.hop_counters
    tokens = int((cache.log.modality >= 0).sum()) * len(decided)
    kept = sum(sum(change.kept) for change in decided)
    # The hop that follows the context has nothing more to compact.
    counters.compacted = [max(hop, 1) for hop in counters.compacted]
    cache.decide(decided)
    cache.settle()
    note = f"compress_context: asked for {keep:.4g} of the context, mean over the layers; "
    note += f"{kept / tokens:.4g} is kept"
    if kept > keep * tokens + len(decided) * len(counters.compacted):
        note += ", since first, last and always kept tokens go beyond it"
        logger.warning_once(note)
    recorder: Any = cache.recorder
    recorder.builder.note(note)
