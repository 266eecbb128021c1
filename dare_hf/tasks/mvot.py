"""Mvot mode: build inputs, generate text and images step by step, read the answer, score.

For the tasks whose images the model draws itself: MAZE and FrozenLake. A context says what a step
gets to see:

- "append_all": the question, the first image and all steps so far, in one generate call.
- "markov": the question, the first image and the latest step (its text and image); every step is a
  generate call of its own, so that the sequence stays short.
- "text_only": as append_all, but the question comes without its image.
- "blank": as append_all, but the first image is an empty field.

An answer that does not parse counts as wrong. An image counts as right only if every one of its
cells (walls, letter, red point, outside) is what the replayed state has there.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Literal, get_args

import numpy as np
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
from dare_hf.evaluation.intervals import wilson
from dare_hf.generation.interleaved import (
    WholeImageLogitsProcessor,
    allow_image_tokens,
    decode_images,
    find_images,
    load_decoder,
)
from dare_hf.generation.vq_decoder import ImageDecoder
from dare_hf.tasks import render
from dare_hf.tasks.frozen_lake import FrozenLakeItem
from dare_hf.tasks.ghost import GhostItem
from dare_hf.tasks.maze import FIELD, OUTSIDE, MazeItem

Context = Literal["append_all", "markov", "text_only", "blank"]
DrawnItem = MazeItem | FrozenLakeItem
Item = DrawnItem | GhostItem
ANSWER = re.compile(r"The answer is (\w)\.")
# Ids of a step beside its image: number, dot, Go, direction, dot, begin, end, separator.
_STEP_TEXT_IDS = 8
_ANSWER_IDS = 6


@dataclass(frozen=True)
class Solution:
    """What the model made of one item.

    Attributes:
        item: The maze, map or ghost item.
        answer: The parsed letter, or None if the answer does not parse.
        correct: Whether it is the item's answer.
        text: The response without special tokens.
        images: The generated pictures in order, one visual thought each.
        image_correct: Per expected step (and per surplus image, False) whether all cells are right.
        ids: Ids after the prompt, up to and including end of text.
        prompt_length: Columns before them in the batch, left padding included.
    """

    item: Item
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
        images_right: Share of expected (and surplus) images with every cell right; NaN where the
            task lets the model draw none.
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


def blank_image() -> Image.Image:
    """A field with nothing on it."""
    return render.grid_to_image(np.full((FIELD, FIELD), OUTSIDE, dtype=np.int64))


def build_inputs(
    processor: ChameleonProcessor, items: Sequence[Item], context: Context = "append_all"
) -> dict[str, Any]:
    """Prompts and first images -> input_ids, attention_mask (left padded) and pixel_values.

    In the context "text_only" there are no pixel_values.

    Raises:
        DareInputError: There is no such context.
    """
    check_context(context)
    prompts = [item.prompt for item in items]
    pictures: Any = [[render.grid_to_image(item.grids()[0])] for item in items]
    if context == "blank":
        pictures = [[blank_image()] for _ in items]
    if context == "text_only":
        prompts, pictures = [prompt.replace(" <image>", "") for prompt in prompts], None
    return dict(
        processor(
            text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
        )
    )


def check_context(context: str) -> None:
    """Refuses a context that does not exist.

    Raises:
        DareInputError: It is none of `Context`.
    """
    if context not in get_args(Context):
        raise DareInputError(f"context: expected one of {get_args(Context)}, got {context!r}")


def solve(
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    items: Sequence[DrawnItem],
    batch_size: int = 32,
    *,
    context: Context = "append_all",
    decoder: ImageDecoder | None = None,
    on_batch: Callable[[BatchOutput], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_kwargs: Any,
) -> list[Solution]:
    """Solves items by greedy generation through `model.generate`, with or without DARE on it.

    Args:
        model: dare-tiny-anole or another Chameleon-type model that learned the task.
        processor: Its processor.
        items: From `maze.sample` or `frozen_lake.sample`; items of the same number of actions
            share a batch, results keep this order.
        batch_size: Rows of a generate call.
        context: What a step gets to see, as the head of this module says.
        decoder: Image decoder; by default the one beside the model's weights.
        on_batch: Called after each generate call; the place to collect `last_report(model)`. In
            the context "markov" that is once per step.
        progress: Called with (items done, items in all) after each batch.
        generate_kwargs: Further arguments of generate.

    Returns:
        One solution per item.

    Raises:
        DareInputError: There is no such context.
    """
    check_context(context)
    decoder = load_decoder(model) if decoder is None else decoder
    rule = WholeImageLogitsProcessor.from_model(model, processor)
    order = sorted(range(len(items)), key=lambda k: len(items[k].actions))
    solutions: dict[int, Solution] = {}
    while order:  # rows of one length end together: none is fed pads while others go on
        length = len(items[order[0]].actions)
        indices = tuple(k for k in order[:batch_size] if len(items[k].actions) == length)
        order = order[len(indices) :]
        rows = [items[k] for k in indices]
        inputs = {k: v.to(model.device) for k, v in build_inputs(processor, rows, context).items()}
        call = _Call(model, processor, rows, rule, generate_kwargs, on_batch)
        run = call.steps if context == "markov" else call.whole
        for k, new in zip(indices, run(inputs, indices), strict=True):
            solutions[k] = _read(
                model,
                processor,
                items[k],
                new,
                decoder,
                prompt_length=inputs["input_ids"].shape[1],
            )
        if progress is not None:
            progress(len(solutions), len(items))
    return [solutions[k] for k in range(len(items))]


@dataclass(frozen=True)
class _Call:
    """The generate calls of one batch."""

    model: ChameleonForConditionalGeneration
    processor: ChameleonProcessor
    rows: Sequence[DrawnItem]
    rule: WholeImageLogitsProcessor
    settings: dict[str, Any]
    on_batch: Callable[[BatchOutput], None] | None

    def whole(self, inputs: dict[str, Any], indices: tuple[int, ...]) -> list[list[int]]:
        """All new ids of each row, from one generate call."""
        limits = [_room(self.processor, item) for item in self.rows]
        return self._generate(inputs, indices, limits, [])

    def steps(self, inputs: dict[str, Any], indices: tuple[int, ...]) -> list[list[int]]:
        """All new ids of each row, each step sampled after the prompt and the step before it."""
        separator, end = (
            self.processor.tokenizer.sep_token_id,
            self.processor.tokenizer.eos_token_id,
        )
        pad = self.processor.tokenizer.pad_token_id
        new: list[list[int]] = [[] for _ in self.rows]
        latest: list[list[int]] = [[] for _ in self.rows]
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        room = self.processor.image_seq_length + _STEP_TEXT_IDS
        alive = list(range(len(self.rows)))
        while alive:
            given = [prompts[k] + latest[k] for k in alive]
            width = max(map(len, given))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in given])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in given])
            step_inputs = {
                "input_ids": ids.to(self.model.device),
                "attention_mask": mask.to(self.model.device),
                "pixel_values": inputs["pixel_values"][alive],
            }
            which = tuple(indices[k] for k in alive)
            sampled = self._generate(step_inputs, which, [room] * len(alive), [separator])
            going = []
            for k, step in zip(alive, sampled, strict=True):
                stops = [at for at, token in enumerate(step) if token in (separator, end)]
                latest[k] = step[: stops[0] + 1] if stops else step
                new[k] += latest[k]
                whole = bool(stops) and latest[k][-1] == separator
                if whole and len(new[k]) < _room(self.processor, self.rows[k]):
                    going.append(k)
            alive = going
        return new

    def _generate(
        self,
        inputs: dict[str, Any],
        indices: tuple[int, ...],
        limits: list[int],
        stops: list[int],
    ) -> list[list[int]]:
        length = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([_RowLimit([length + limit for limit in limits])])
        settings = {"do_sample": False, "max_new_tokens": max(limits), **self.settings}
        if stops:
            settings["eos_token_id"] = [self.processor.tokenizer.eos_token_id, *stops]
        generate: Any = self.model.generate
        with allow_image_tokens(self.model):
            outputs = generate(
                **inputs,
                **settings,
                logits_processor=LogitsProcessorList([self.rule]),
                stopping_criteria=criteria,
            )
        if self.on_batch is not None:
            self.on_batch(BatchOutput(indices, inputs, outputs, length))
        ids = getattr(outputs, "sequences", outputs)
        return [row[length:] for row in ids.tolist()]


def _room(processor: ChameleonProcessor, item: DrawnItem) -> int:
    """Ids a row may sample: one step too many, so that miscounting does not look like a cut-off."""
    step = processor.image_seq_length + _STEP_TEXT_IDS
    return (len(item.actions) + 1) * step + _ANSWER_IDS


def _read(
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    item: DrawnItem,
    new: list[int],
    decoder: ImageDecoder,
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
        images_right=sum(flags) / len(flags) if flags else nan,
        images=len(flags),
    )
