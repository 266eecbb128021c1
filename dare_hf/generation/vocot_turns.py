"""VoCoT's two turns: a thought that looks again at its boxes, then the answer it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.generation.box_refocus import BoxRefocus
from dare_hf.generation.hop_input import placeholder_id
from dare_hf.generation.hop_loop import HopLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from dare_hf.generation.hop_types import HopInput, HopPrompt, HopState, OnHop

FINAL_QUESTION = (733, 16289, 28793, 1824, 349, 574, 1480, 4372, 28804, 733, 28748, 16289, 28793)
"""" [INST] What is your final answer? [/INST]" in Mistral's ids, as VoCoT's code has it."""


@dataclass(frozen=True)
class VocotAnswer:
    """What one row thought and answered.

    Attributes:
        thought: Text of the thought, special tokens included, without placeholders.
        answer: Text of the answer, without special tokens.
        ids: Long[n]: prompt, thought, regions as placeholders, and the final question.
        answer_ids: Long[m]: what was sampled after them.
    """

    thought: str
    answer: str
    ids: Tensor
    answer_ids: Tensor


class _Heard:
    """An on_hop that keeps the features it passes on."""

    def __init__(self, inner: OnHop) -> None:
        self.inner, self.features = inner, []

    def begin(self, prompt: HopPrompt) -> Callable[[HopState], HopInput | None]:
        answer = self.inner.begin(prompt)

        def ask(hop: HopState) -> HopInput | None:
            given = answer(hop)
            if given is not None and given.features is not None:
                self.features.append(given.features.flatten(0, -2))
            return given

        return ask


def think_then_answer(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Tensor],
    *,
    final: Literal["kept", "anew"] = "kept",
    refocus: BoxRefocus | None = None,
    question: str | Sequence[int] = FINAL_QUESTION,
    thought_tokens: int = 2048,
    answer_tokens: int = 128,
    **kwargs: Any,
) -> VocotAnswer:
    """Let one row think with boxes, then ask it for its answer, greedily.

    Args:
        model: A model with DARE whose hops end in "</coor>".
        processor: Its processor.
        inputs: The processor's output for one prompt and its picture.
        final: "kept" asks on the cache of the thought, so that what was pruned stays pruned and
            nothing is computed twice; "anew" prefills prompt, thought, regions and question as one
            prompt again, which is what VoCoT's own evaluation does.
        refocus: What looks again; default: `BoxRefocus(region="vocot")`. With "anew" it has to
            inject features.
        question: The final question, as text or as ids.
        thought_tokens: Most sampled tokens of the thought.
        answer_tokens: Most tokens of the answer.
        kwargs: Further arguments of both generate calls.

    Raises:
        DareConfigError: `final` is neither.
        DareInputError: Several rows: VoCoT's turns are of one, and rows end their thoughts apart.
    """
    _check(final, inputs)
    heard = _Heard(refocus or BoxRefocus(region="vocot"))
    kwargs = {"do_sample": False} | kwargs
    out = model.generate(
        **inputs,
        hop_loop=HopLoop(heard, processor=processor),
        max_new_tokens=thought_tokens,
        return_dict_in_generate=True,
        **kwargs,
    )
    tokenizer = processor.tokenizer
    if isinstance(question, str):
        question = tokenizer.encode(question, add_special_tokens=False)
    asked = torch.tensor([list(question)], device=out.sequences.device)
    ids = torch.cat([out.sequences, asked], dim=1)
    cache = cache_of(out)
    if final == "kept":
        seen = cache.log.modality.to(ids.device) >= 0  # the last sampled token is not in it yet
        more: dict[str, Any] = {CACHE: cache}
    else:
        seen = inputs["attention_mask"]
        more = {"mm_encoder_outputs": {"image": _all_features(model, inputs, heard.features)}}
    mask = torch.ones_like(ids)
    mask[:, : seen.shape[1]] = seen
    answer = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=answer_tokens, **more, **kwargs
    )
    answer = getattr(answer, "sequences", answer)[0, ids.shape[1] :]
    hole = placeholder_id(model.config)
    thought = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    said = tokenizer.decode([token for token in thought if token != hole])
    text = tokenizer.decode(answer.tolist(), skip_special_tokens=True)
    return VocotAnswer(said, text, ids[0], answer)


def _check(final: str, inputs: Mapping[str, Tensor]) -> None:
    if final not in ("kept", "anew"):
        raise DareConfigError(f'final: expected "kept" or "anew"; got {final!r}')
    rows = len(inputs["input_ids"])
    if rows != 1:
        raise DareInputError(f"think_then_answer: expected one row; got {rows}. Call it row by row")


def _all_features(model: Any, inputs: Mapping[str, Tensor], regions: list[Tensor]) -> Any:
    """The picture's features and the regions', in the order of their placeholders."""
    with torch.no_grad():
        encoded = model.base_model.get_image_features(inputs["pixel_values"], return_dict=True)
    features: Any = [*encoded.pooler_output, *regions]
    return BaseModelOutputWithPooling(pooler_output=features)
