"""HopLoop: between two hops a callback looks at what was thought and may add input."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.utils import logging

from dare_hf.architectures.locate import attention_of
from dare_hf.cache.mixed import recurs
from dare_hf.compat import CACHE
from dare_hf.engine.generate import offered_loop
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.generation.hop_decode import Decoding
from dare_hf.generation.hop_input import HopInputReader
from dare_hf.generation.hop_types import HopInput, HopPrompt, HopState, OnHop
from dare_hf.generation.interleaved import decode_images, find_images, image_token_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dare_hf.engine.counted_call import CountedCall
    from dare_hf.generation.hop_types import Piece
    from dare_hf.generation.vq_decoder import ImageDecoder

logger = logging.get_logger("transformers.dare_hf")


class HopLoop:
    """Calls `on_hop` whenever a row closes a hop, and injects what it returns.

    `model.generate(..., hop_loop=loop)` runs it. A loop holds no state of a run: it may serve
    several models and calls.

    Args:
        on_hop: Called with the HopState of one row; returns a HopInput, or None for nothing. Rows
            that are finished are not asked. Or an object with a method `begin`, such as
            BoxRefocus: given the HopPrompt of each generate, it returns the function for that call.
        max_hops: Last hop after which the callback is asked, counted per row from 1; None for no
            limit. Generation goes on after it.
        processor: The model's processor, for text and images; a tokenizer is enough for text.
        decoder: Turns image tokens that a Chameleon-type model drew into pictures
            (`dare_hf.generation.interleaved.load_decoder`); needs the processor too.

    Raises:
        DareConfigError: `on_hop` cannot be called or `max_hops` is no count.

    Source: docs/method.md, section 1.

    Examples:
        >>> from dare_hf import DareConfig, apply_dare
        >>> from dare_hf.generation import HopInput, HopLoop
        >>> from dare_hf.testing import tiny_inputs, tiny_model
        >>> model = apply_dare(tiny_model("llava"), DareConfig(decode_window=2))
        >>> loop = HopLoop(on_hop=lambda hop: HopInput(input_ids=[50, 51]), max_hops=1)
        >>> output = model.generate(**tiny_inputs(model), hop_loop=loop, max_new_tokens=4)
        >>> [50, 51] == output[0, -4:-2].tolist()
        True
    """

    def __init__(
        self,
        on_hop: Callable[[HopState], HopInput | None] | OnHop,
        max_hops: int | None = None,
        *,
        processor: Any = None,
        decoder: ImageDecoder | None = None,
    ) -> None:
        if not callable(on_hop) and not callable(getattr(on_hop, "begin", None)):
            raise DareConfigError(
                f"on_hop: expected a function of a HopState; got {type(on_hop).__name__}"
            )
        whole = isinstance(max_hops, int) and not isinstance(max_hops, bool)
        if max_hops is not None and not (whole and max_hops >= 0):
            raise DareConfigError(f"max_hops: expected a count >= 0 or None; got {max_hops!r}")
        self.on_hop, self.max_hops = on_hop, max_hops
        self.processor, self.decoder = processor, decoder

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.generate(*args, **kwargs, hop_loop=self)`, also through wrappers.

        Args:
            model: A model with DARE, or a wrapper whose generate reaches one.
            args: As generate takes them.
            kwargs: As generate takes them.

        Returns:
            What generate returns.

        Raises:
            DareStateError: The model has no DARE.
        """
        if isinstance(model, nn.Module) and not any("_dare" in vars(m) for m in model.modules()):
            raise DareStateError(_NO_DARE)
        with offered_loop(self) as offer:
            output = model.generate(*args, **kwargs)
        if not offer.taken:
            raise DareStateError(_NO_DARE)
        return output

    def prepare(
        self, model: Any, call: CountedCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """The keyword arguments with which HF's generate runs this loop.

        Raises:
            DareInputError: An argument that cannot be served together with a loop.
        """
        names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        for name in ("assistant_model", "custom_generate", "synced_gpus"):
            if kwargs.get(name):
                raise DareInputError(
                    f"hop_loop: expected no {name}; got one. Leave it out, or generate without "
                    "hop_loop"
                )
        if kwargs.get(CACHE) is None:
            raise DareInputError(
                "hop_loop: expected use_cache=True, since hops are counted by the cache; got "
                "use_cache=False. Leave it out"
            )
        controller = model._dare.controller
        if not controller.rules.closes_hops:
            logger.warning_once(
                "hop_loop: the DareConfig has neither hop_delimiters nor decode_window, so no hop "
                "closes and the callback is never asked"
            )
        tokenizer = kwargs.pop("tokenizer", None)
        _keep_stop_strings(model, kwargs, tokenizer)
        host = _Host(self, model, self.processor or tokenizer, kwargs)
        kwargs["custom_generate"] = Decoding(model, call, host, kwargs.get("streamer"))
        return kwargs


_NO_DARE = (
    "HopLoop: expected a model with DARE; this one has none. Call apply_dare(model, config) first"
)


def _keep_stop_strings(model: Any, kwargs: dict[str, Any], tokenizer: Any) -> None:
    """Make the criterion of stop strings here: HF hands a custom loop no tokenizer (5.23)."""
    sources = (kwargs.get("generation_config"), model.generation_config)
    given = [getattr(source, "stop_strings", None) for source in sources]
    strings = next((s for s in [kwargs.get("stop_strings"), *given] if s is not None), None)
    if strings is None:
        return
    if tokenizer is None:
        raise DareInputError(
            "stop_strings: expected the model's tokenizer beside them; got none. Pass "
            "tokenizer=processor.tokenizer to generate"
        )
    criteria = kwargs.get("stopping_criteria") or []
    criteria = [*criteria, StopStringCriteria(tokenizer, strings)]
    kwargs["stopping_criteria"] = StoppingCriteriaList(criteria)
    kwargs["stop_strings"] = None


class _Host:
    """Asks the callback for the rows of one generate.

    Args:
        loop: The loop.
        model: The model.
        processor: Processor or tokenizer, or None.
        inputs: The keyword arguments of generate.

    Attributes:
        vision_ids: Ids of vision tokens.
        slides: Whether some layers attend within a sliding window only.
        recurs: Whether some layers keep a state that padding would enter.
    """

    def __init__(
        self, loop: HopLoop, model: Any, processor: Any, inputs: Mapping[str, Any]
    ) -> None:
        self.loop, self.model, self.inputs = loop, model, inputs
        self.on_hop, self.samples = loop.on_hop, 1
        controller = model._dare.controller
        self.vision_ids = controller.rules.vision_ids
        layers = controller.anatomy.layers
        self.slides = any(getattr(attention_of(m), "sliding_window", None) for m in layers)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        anatomy = controller.anatomy
        self.recurs = bool(anatomy.unrouted) and recurs(anatomy.text_config, anatomy.slots)
        self.reader = HopInputReader(model, processor)
        self._pictures: dict[int, list[Any]] = {}

    def begin(self, run: Decoding) -> None:
        """Let a callback that wants to know the prompt make itself ready for this call.

        Raises:
            DareInputError: Several rows, in a model with recurrent layers.
        """
        if len(run.ids) > 1 and self.recurs:
            raise DareInputError(
                f"hop_loop: expected one row, since this {self.model.config.model_type} has "
                "recurrent layers (linear attention, Mamba, convolution), whose state takes the "
                f"padding beside another row's injected tokens for tokens; got {len(run.ids)} "
                "rows. Generate row by row"
            )
        self.samples = run.config.num_return_sequences or 1
        if (begin := getattr(self.loop.on_hop, "begin", None)) is None:
            return
        encoded = (run.kwargs.get("mm_encoder_outputs") or {}).get("image")
        prompt = HopPrompt(
            model=self.model,
            ids=run.ids,
            start=run.call.start,
            inputs=self.inputs,
            encoded=encoded,
            samples=self.samples,
            tokenizer=self.tokenizer,
        )
        self.on_hop = begin(prompt)

    def ask(self, run: Decoding, rows: list[int]) -> dict[int, Piece]:
        """What the rows whose hop has just closed get injected."""
        pieces = {}
        for row in rows:
            index = run.cache.hop_counters.open_hops()[row] - 1
            if self.loop.max_hops is not None and index > self.loop.max_hops:
                continue
            answer = self.on_hop(self._state(run, row, index))
            self._pictures.pop(row, None)
            if answer is not None:
                pieces[row] = self.reader.read(answer)
                self._pictures[row] = answer.pictures
        return pieces

    def _state(self, run: Decoding, row: int, index: int) -> HopState:
        cache = run.cache
        ends = cache.hop_counters.ends[row]
        # Columns of the ids may begin later than those of the cache (carried, or embeddings).
        offset = cache.get_seq_length() - run.ids.shape[1]
        first, last = max(ends[index - 1] + 1 - offset, 0), ends[index] + 1 - offset
        real = cache.log.modality[row, first + offset : last + offset] >= 0
        ids = run.ids[row, first:last][real.to(run.ids.device)].cpu()
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert cache.report is not None
        images = [*self._pictures.get(row, []), *self._drawn(ids)]
        return HopState(index, text, ids, images, cache.report, row, self.samples)

    def _drawn(self, ids: torch.Tensor) -> list[Any]:
        """Pictures a Chameleon-type model has drawn in these ids."""
        loop = self.loop
        if loop.decoder is None or loop.processor is None:
            return []
        codes = set(image_token_ids(self.model))
        begin, count = loop.processor.image_start_token_id, loop.processor.image_seq_length
        drawn = [span for span in find_images(ids.tolist(), begin, count) if set(span) <= codes]
        return decode_images(self.model, loop.processor, drawn, loop.decoder)
