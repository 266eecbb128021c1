"""MAZE in mvot mode: build inputs, generate text and images step by step, read the answer, score.

An answer that does not parse counts as wrong. An image counts as right only if every one of its
cells (walls, letter, red point, outside) is what the replayed state has there.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dare_hf.errors import DareInputError
from dare_hf.generation.interleaved import (
    WholeImageLogitsProcessor,
    allow_image_tokens,
    decode_images,
    find_images,
    load_decoder,
)
from dare_hf.generation.vq_decoder import VQPatchDecoder
from dare_hf.tasks import render
from dare_hf.tasks.maze import MazeItem

ANSWER = re.compile(r"The answer is (\w)\.")
# Ids of a step beside its image: number, dot, Go, direction, dot, begin, end, separator.
_STEP_TEXT_IDS = 8
_ANSWER_IDS = 6


@dataclass(frozen=True)
class Solution:
    """What the model made of one item.

    Attributes:
        item: The maze.
        answer: The parsed letter, or None if the answer does not parse.
        correct: Whether it is the item's answer.
        text: The response without special tokens.
        images: The generated pictures in order, one visual thought each.
        image_correct: Per expected step (and per surplus image, False) whether all cells are right.
        ids: Generated ids up to and including end of text.
        prompt_length: Columns before them in the batch, left padding included.
    """

    item: MazeItem
    answer: str | None
    correct: bool
    text: str
    images: tuple[Image.Image, ...]
    image_correct: tuple[bool, ...]
    ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class BatchOutput:
    """One generate call, as given to `on_batch`.

    Attributes:
        indices: Position of each row in `items`.
        inputs: What the processor made.
        outputs: What generate returned (ids, or its output object).
        prompt_length: Columns of the prompt.
    """

    indices: tuple[int, ...]
    inputs: dict[str, Any]
    outputs: Any
    prompt_length: int


@dataclass(frozen=True)
class Score:
    """Totals over solutions; rates are in [0, 1].

    Attributes:
        n: Items.
        accuracy: Share answered right; an answer that does not parse is wrong.
        accuracy_interval: Its 95 % Wilson interval.
        unparsed: Share whose answer does not parse.
        images_right: Share of expected (and surplus) images with every cell right.
        images: How many those are.
    """

    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    unparsed: float
    images_right: float
    images: int


class _RowLimit(StoppingCriteria):
    """Ends each row at its own number of columns."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return (self.limits <= input_ids.shape[1]).to(input_ids.device)


def build_inputs(processor: ChameleonProcessor, items: Sequence[MazeItem]) -> dict[str, Any]:
    """Prompts and first states -> input_ids, attention_mask (left padded) and pixel_values."""
    pictures = [[render.grid_to_image(item.grid(item.start))] for item in items]
    prompts = [item.prompt for item in items]
    return dict(
        processor(
            text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
        )
    )


def solve(
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    items: Sequence[MazeItem],
    batch_size: int = 32,
    *,
    decoder: VQPatchDecoder | None = None,
    on_batch: Callable[[BatchOutput], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_kwargs: Any,
) -> list[Solution]:
    """Solves items by greedy generation through `model.generate`, with or without DARE on it.

    Args:
        model: dare-tiny-anole or another Chameleon-type model that learned the task.
        processor: Its processor.
        items: From `maze.sample`; items of similar length share a batch, results keep this order.
        batch_size: Rows of a generate call.
        decoder: Image decoder; by default the one beside the model's weights.
        on_batch: Called after each generate call; the place to collect `last_report(model)`.
        progress: Called with (items done, items in all) after each batch.
        generate_kwargs: Further arguments of generate.

    Returns:
        One solution per item.
    """
    decoder = load_decoder(model) if decoder is None else decoder
    rule = WholeImageLogitsProcessor.from_model(model, processor)
    order = sorted(range(len(items)), key=lambda k: len(items[k].actions))
    solutions: dict[int, Solution] = {}
    for first in range(0, len(order), batch_size):
        indices = tuple(order[first : first + batch_size])
        rows = [items[k] for k in indices]
        batch = _generate(model, processor, rows, indices, rule, generate_kwargs)
        if on_batch is not None:
            on_batch(batch)
        ids = getattr(batch.outputs, "sequences", batch.outputs)
        for k, row in zip(indices, ids.tolist(), strict=True):
            new = row[batch.prompt_length :]
            solutions[k] = _read(
                model, processor, items[k], new, decoder, prompt_length=batch.prompt_length
            )
        if progress is not None:
            progress(len(solutions), len(items))
    return [solutions[k] for k in range(len(items))]


def _generate(
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    rows: Sequence[MazeItem],
    indices: tuple[int, ...],
    rule: WholeImageLogitsProcessor,
    generate_kwargs: dict[str, Any],
) -> BatchOutput:
    inputs: dict[str, Any] = {
        k: v.to(model.device) for k, v in build_inputs(processor, rows).items()
    }
    length = inputs["input_ids"].shape[1]
    limits = [length + _room(processor, item) for item in rows]
    settings = {"do_sample": False, "max_new_tokens": max(limits) - length, **generate_kwargs}
    generate: Any = model.generate
    with allow_image_tokens(model):
        outputs = generate(
            **inputs,
            **settings,
            logits_processor=LogitsProcessorList([rule]),
            stopping_criteria=StoppingCriteriaList([_RowLimit(limits)]),
        )
    return BatchOutput(indices, inputs, outputs, length)


def _room(processor: ChameleonProcessor, item: MazeItem) -> int:
    """Ids a row may sample: one step too many, so that miscounting does not look like a cut-off."""
    step = processor.image_seq_length + _STEP_TEXT_IDS
    return (len(item.actions) + 1) * step + _ANSWER_IDS


def _read(
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    item: MazeItem,
    new: list[int],
    decoder: VQPatchDecoder,
    prompt_length: int,
) -> Solution:
    new = new[: _room(processor, item)]  # what follows its own limit is padding of the batch
    end = processor.tokenizer.eos_token_id
    if end in new:
        new = new[: new.index(end) + 1]
    text = processor.decode(new, skip_special_tokens=True)
    found = ANSWER.search(text)
    answer = found.group(1) if found else None
    spans = find_images(new, processor.image_start_token_id, processor.image_seq_length)
    pictures = decode_images(model, processor, spans, decoder)
    drawn = [render.image_to_grid(picture) for picture in pictures]
    states = item.grids()[1:]
    count = max(len(states), len(drawn))
    flags = [
        k < len(drawn) and k < len(states) and bool((drawn[k] == states[k]).all())
        for k in range(count)
    ]
    return Solution(
        item=item,
        answer=answer,
        correct=answer == item.answer,
        text=text,
        images=tuple(pictures),
        image_correct=tuple(flags),
        ids=tuple(new),
        prompt_length=prompt_length,
    )


def score(solutions: Sequence[Solution]) -> Score:
    """Totals over at least one solution.

    Raises:
        DareInputError: There is none.
    """
    n = len(solutions)
    if n == 0:
        raise DareInputError("expected at least one solution, got none")
    accuracy = sum(s.correct for s in solutions) / n
    flags = [flag for s in solutions for flag in s.image_correct]
    return Score(
        n=n,
        accuracy=accuracy,
        accuracy_interval=wilson(accuracy, n),
        unparsed=sum(s.answer is None for s in solutions) / n,
        images_right=sum(flags) / len(flags),
        images=len(flags),
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share over n trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
