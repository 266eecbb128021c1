"""The decoding loop of a hop loop: HF's sampling, with room for input between two steps.

transformers runs it as `custom_generate`: generate prepares inputs, processors and criteria once,
as for any call, and hands them over. The loop follows GenerationMixin._sample (5.23); so a run in
which nothing is injected is the run without a loop.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from dare_hf.compat import CACHE, span_inputs
from dare_hf.errors import DareInputError
from dare_hf.generation.hop_block import Block, Carried

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.engine.counted_call import CountedCall
    from dare_hf.generation.hop_types import Piece

# Limits that count columns from the start of the row: they grow by every injected column.
_COLUMN_LIMITS: dict[type, str] = {
    MaxLengthCriteria: "max_length",
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    ForcedEOSTokenLogitsProcessor: "max_length",
    ExponentialDecayLengthPenalty: "regulation_start",
}


_SLIDING_NOTE = (
    "rows that got no input were padded between two of their tokens, and sliding windows count "
    "those columns: such a row sees fewer tokens there than it would alone"
)


class Limits:
    """Copies of processors and criteria whose limits count columns.

    Args:
        lists: Processor and criteria lists; the copies take their members' places.
    """

    def __init__(self, *lists: list[Any]) -> None:
        self._members: list[tuple[Any, str]] = []
        for members in lists:
            for i, member in enumerate(members):
                if (name := _COLUMN_LIMITS.get(type(member))) is not None:
                    members[i] = copy.copy(member)
                    self._members.append((members[i], name))

    def grow(self, columns: int) -> None:
        """Move every limit by injected columns, which count for none of them."""
        for member, name in self._members:
            setattr(member, name, getattr(member, name) + columns)


@dataclass
class Record:
    """What generate returns beside the ids: one entry per sampled step."""

    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    attentions: list[Any] = field(default_factory=list)
    hidden_states: list[Any] = field(default_factory=list)

    def output(self, config: Any, ids: Tensor, cache: Any) -> GenerateDecoderOnlyOutput:
        """HF's output, with what the generation config asks for."""
        asked = {
            "scores": config.output_scores,
            "logits": config.output_logits,
            "attentions": config.output_attentions,
            "hidden_states": config.output_hidden_states,
        }
        fields = {name: tuple(getattr(self, name)) if on else None for name, on in asked.items()}
        sequences = cast("torch.LongTensor", ids)
        return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache}, **fields)


class Decoding:
    """One run of the decoding loop.

    Args:
        model: The model generate was called on.
        call: The running generate.
        host: Asks the callback; see `HopLoop`.
        streamer: Hears the tokens, or None.
    """

    def __init__(self, model: Any, call: CountedCall, host: Any, streamer: Any) -> None:
        self.model, self.call, self.host, self.streamer = model, call, host, streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What HF calls in place of `_sample`."""
        _refuse(generation_config, logits_processor, input_ids)
        self.ids, self.kwargs, self.config = input_ids, model_kwargs, generation_config
        self.processors, self.criteria = logits_processor, stopping_criteria
        self.limits = Limits(logits_processor, stopping_criteria)
        self.pad = generation_config._pad_token_tensor
        self.record = Record()
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.carried = Carried(self.model, (input_ids, model_kwargs), self.host.vision_ids)
        self.host.begin(self)
        outputs = self.model._prefill(input_ids, generation_config, model_kwargs)
        with self.model._optimize_model_for_decode():
            self._loop(outputs)
        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return self.ids
        return self.record.output(generation_config, self.ids, self.kwargs[CACHE])

    @property
    def cache(self) -> DareCache:
        """The cache of the run."""
        return self.kwargs[CACHE]

    def _loop(self, outputs: Any) -> None:
        closed: list[int] = []
        while True:
            pieces = self.host.ask(self, closed) if closed else {}
            logits = self._inject(outputs, pieces) if pieces else self._after(outputs)
            del outputs
            self._choose(logits)
            if bool(self.unfinished.max() == 0):
                return
            before = self.cache.hop_counters.open_hops()
            outputs = self._step()
            after = self.cache.hop_counters.open_hops()
            alive = self.unfinished.tolist() if before != after else []
            closed = [row for row, on in enumerate(alive) if on and after[row] > before[row]]

    def _step(self) -> Any:
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=1, **self.kwargs
        )
        return self.model(**inputs, return_dict=True)

    def _after(self, outputs: Any) -> Tensor:
        """Take a forward's outputs over; the logits [B, V] of its last column."""
        # mllama wants the flag; DARE serves decoders only
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=False
        )
        if self.config.return_dict_in_generate:
            self.record.attentions.append(getattr(outputs, "attentions", None))
            self.record.hidden_states.append(getattr(outputs, "hidden_states", None))
        return _last(outputs, self.ids)

    def _choose(self, logits: Tensor) -> None:
        """Sample one token per row, and see who is finished."""
        scores = self.processors(self.ids, logits)
        if self.config.return_dict_in_generate:
            self.record.scores += [scores] if self.config.output_scores else []
            self.record.logits += [logits] if self.config.output_logits else []
        if self.config.do_sample:
            probabilities = torch.nn.functional.softmax(scores, dim=-1)
            tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if any(hasattr(criterion, "eos_token_id") for criterion in self.criteria):
            pad = self.pad.to(tokens.device)
            tokens = tokens * self.unfinished + pad * (1 - self.unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        kept = tuple(self.record.scores) if self.config.output_scores else None
        self.unfinished = self.unfinished & ~self.criteria(self.ids, kept)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())

    def _inject(self, outputs: Any, pieces: Mapping[int, Piece]) -> Tensor:
        """Run injected columns; each row's next logits, from the last of its tokens."""
        past = self.cache.get_seq_length()
        pad = 0 if self.pad is None else int(self.pad)
        block = Block.of(pieces, self.ids, pad)
        kwargs, positions = self.carried.extend(self.kwargs, block, past)
        dropped = {*MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL, "inputs_embeds"}
        ids = torch.cat([self.ids, block.ids], dim=1)
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=block.ids.shape[1],
            is_first_iteration=True,
            **{name: value for name, value in kwargs.items() if name not in dropped},
        )
        inputs = span_inputs(self.model, inputs, kwargs)
        # Text and images by the rules of a prompt: ids, and the vectors put in.
        vision = torch.isin(block.ids, self._vision(block.ids)) | block.places
        if self.host.slides and not bool(block.mask.all()) and self.call.recorder is not None:
            self.call.recorder.builder.note(_SLIDING_NOTE)
        self.call.injecting = True
        try:
            with block.embedded(self.model):
                injected = self.model(**inputs, modality_mask=vision, return_dict=True)
        finally:
            self.call.injecting = False
        self.ids, self.kwargs = ids, kwargs
        self.limits.grow(block.ids.shape[1])
        if self.streamer is not None:
            self.streamer.put(block.ids.cpu())
        if self.config.output_hidden_states:
            pairs = zip(outputs.hidden_states, injected.hidden_states, strict=True)
            injected.hidden_states = tuple(torch.cat(pair, dim=1) for pair in pairs)
        logits = self._after(injected)
        self.carried.settle(self.kwargs, positions)
        return torch.where(block.rows[:, None], logits, _last(outputs, ids))

    def _vision(self, ids: Tensor) -> Tensor:
        return torch.tensor(self.host.vision_ids, dtype=ids.dtype, device=ids.device)


def _last(outputs: Any, ids: Tensor) -> Tensor:
    """Float32[B, V] logits of the last column; a copy, so that the others can be freed."""
    return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)


def _refuse(config: Any, processors: Any, ids: Tensor) -> None:
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise DareInputError(
            f"hop_loop: expected greedy search or sampling; got {mode.value}. Input can only be "
            "injected where each row is one sequence: leave out num_beams, prompt lookup and the "
            "like, or generate without hop_loop"
        )
    if any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in processors):
        raise DareInputError(
            "hop_loop: expected no guidance_scale, whose second run of the model would not get "
            "the injected input; got one. Leave it out"
        )
    if len(ids) > 1 and config._pad_token_tensor is None:
        raise DareInputError(
            "hop_loop: expected a pad_token_id for several rows, since rows that get nothing are "
            "padded; got none. Pass pad_token_id=... to generate"
        )
