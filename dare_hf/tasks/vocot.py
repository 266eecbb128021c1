"""SCENE in VoCoT mode: write a box, look at it again, then answer; build inputs, run, read, score.

An answer that does not parse counts as wrong. A box counts as right if it is the cell of the shape
that this step of the question leads to.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.errors import DareInputError
from dare_hf.evaluation.intervals import wilson
from dare_hf.generation import BoxRefocus, HopLoop
from dare_hf.generation.boxes import Box, parse_box
from dare_hf.tasks.mvot import ANSWER, BatchOutput
from dare_hf.tasks.scene import MAX_RELATIONS, SceneItem
from dare_hf.tasks.scene_render import scene_to_image

BOX_END = "</coor>"
_BOX = re.compile(r"<coor>(.*?)</coor>")
_WRITTEN_TO = 0.0005  # three decimals
_BOX_IDS = 9
_ANSWER_IDS = 6


@dataclass(frozen=True)
class Solution:
    """What the model made of one item.

    Attributes:
        item: The scene and its question.
        answer: The parsed letter, or None if the answer does not parse.
        correct: Whether it is the item's answer.
        text: The response without special tokens; boxes stay, the crops between them do not.
        boxes: The boxes in the order they were written; None for one that does not parse.
        box_correct: Per expected look (and per surplus box, False) whether the box is right.
        ids: Ids after the prompt up to and including end of text; crops stand as placeholders.
        prompt_length: Columns before them in the batch, left padding included.
    """

    item: SceneItem
    answer: str | None
    correct: bool
    text: str
    boxes: tuple[Box | None, ...]
    box_correct: tuple[bool, ...]
    ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Score:
    """Totals over solutions; rates are in [0, 1].

    Attributes:
        n: Items.
        accuracy: Share answered right; an answer that does not parse is wrong.
        accuracy_interval: Its 95 % Wilson interval.
        unparsed: Share whose answer does not parse.
        boxes_right: Share of expected (and surplus) boxes that are right.
        boxes: How many those are.
    """

    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    unparsed: float
    boxes_right: float
    boxes: int


def delimiter_id(processor: LlavaProcessor) -> int:
    """The id that ends a hop: the end of a box."""
    return processor.tokenizer.convert_tokens_to_ids(BOX_END)


def unpruned_config(processor: LlavaProcessor) -> DareConfig:
    """Everything is kept; hops are counted, so that a HopLoop can run."""
    return DareConfig(
        vision_retention=1.0,
        text_retention=1.0,
        schedule="constant",
        hop_delimiters=(delimiter_id(processor),),
    )


def build_inputs(processor: LlavaProcessor, items: Sequence[SceneItem]) -> dict[str, Any]:
    """Prompts and pictures -> input_ids, attention_mask (left padded) and pixel_values."""
    pictures = [[scene_to_image(item)] for item in items]
    prompts = [item.prompt for item in items]
    return dict(
        processor(
            text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
        )
    )


def solve(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: Sequence[SceneItem],
    batch_size: int = 32,
    *,
    refocus: bool = True,
    on_batch: Callable[[BatchOutput], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_kwargs: Any,
) -> list[Solution]:
    """Solves items by greedy generation, looking again at the boxes the model writes.

    Args:
        model: dare-tiny-volcano or another LLaVA-type model that learned the task. A plain model
            gets DARE with everything kept (`unpruned_config`) for the time of the call, since a
            hop loop needs it; the outputs are those of the plain model.
        processor: Its processor.
        items: From `scene.sample`.
        batch_size: Rows of a generate call.
        refocus: Whether a written box opens the next hop with the crop of the original picture.
            Without it the model has to answer from the first look.
        on_batch: Called after each generate call; the place to collect `last_report(model)`.
        progress: Called with (items done, items in all) after each batch.
        generate_kwargs: Further arguments of generate.

    Returns:
        One solution per item.
    """
    solutions: list[Solution] = []
    settings = {"do_sample": False, "max_new_tokens": _room(), **generate_kwargs}
    with _routed(model, processor):
        for first in range(0, len(items), batch_size):
            rows = items[first : first + batch_size]
            inputs = {k: v.to(model.device) for k, v in build_inputs(processor, rows).items()}
            if refocus:
                look = BoxRefocus("pixels", images=[scene_to_image(item) for item in rows])
                settings["hop_loop"] = HopLoop(on_hop=look, processor=processor)
            generate: Any = model.generate
            outputs = generate(**inputs, **settings)
            indices = tuple(range(first, first + len(rows)))
            batch = BatchOutput(indices, inputs, outputs, inputs["input_ids"].shape[1])
            if on_batch is not None:
                on_batch(batch)
            ids = getattr(outputs, "sequences", outputs)
            for item, row in zip(rows, ids.tolist(), strict=True):
                solutions.append(_read(processor, item, row, batch.prompt_length))
            if progress is not None:
                progress(len(solutions), len(items))
    return solutions


@contextmanager
def _routed(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Iterator[None]:
    """DARE as it is, or DARE that keeps everything on a plain model."""
    if "_dare" in vars(model):
        yield
        return
    apply_dare(model, unpruned_config(processor))
    try:
        yield
    finally:
        remove_dare(model)


def _room() -> int:
    """Ids a row may sample: one box too many, so that miscounting does not look like a cut-off."""
    return (MAX_RELATIONS + 1) * _BOX_IDS + _ANSWER_IDS


def _read(
    processor: LlavaProcessor, item: SceneItem, row: list[int], prompt_length: int
) -> Solution:
    new = row[prompt_length:]
    end = processor.tokenizer.eos_token_id
    if end in new:
        new = new[: new.index(end) + 1]
    text = processor.decode(new, skip_special_tokens=True)
    found = ANSWER.search(text)
    answer = found.group(1) if found else None
    boxes = tuple(parse_box(written) for written in _BOX.findall(text))
    wanted = [shape.box for shape in item.looks()]
    flags = tuple(
        k < len(boxes) and k < len(wanted) and _same(boxes[k], wanted[k])
        for k in range(max(len(boxes), len(wanted)))
    )
    return Solution(
        item=item,
        answer=answer,
        correct=answer == item.answer,
        text=text,
        boxes=boxes,
        box_correct=flags,
        ids=tuple(new),
        prompt_length=prompt_length,
    )


def _same(box: Box | None, wanted: Box) -> bool:
    if box is None:
        return False
    return all(abs(a - b) <= _WRITTEN_TO for a, b in zip(box, wanted, strict=True))


def score(solutions: Sequence[Solution]) -> Score:
    """Totals over at least one solution.

    Raises:
        DareInputError: There is none.
    """
    n = len(solutions)
    if n == 0:
        raise DareInputError("expected at least one solution, got none")
    accuracy = sum(s.correct for s in solutions) / n
    flags = [flag for s in solutions for flag in s.box_correct]
    return Score(
        n=n,
        accuracy=accuracy,
        accuracy_interval=wilson(accuracy, n),
        unparsed=sum(s.answer is None for s in solutions) / n,
        boxes_right=sum(flags) / len(flags),
        boxes=len(flags),
    )
