"""BOARD: build inputs, run, read, score.

A response counts as right if what follows its steps is the item's answer. One that is no answer of
its kind of question does not parse, and counts as wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareInputError
from dare_hf.evaluation.intervals import wilson
from dare_hf.tasks import board
from dare_hf.tasks.board_render import board_to_image, item_to_image
from dare_hf.tasks.mvot import BatchOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

_ROOM = 20  # ids of the longest response are 15


@dataclass(frozen=True)
class Solution:
    """What the model made of one item.

    Attributes:
        item: The board and its question.
        answer: The response without its steps, or None if that is no answer of the kind.
        correct: Whether it is the item's answer.
        text: The response without special tokens.
        ids: Ids after the prompt up to and including the end of the turn.
        prompt_length: Columns before them in the batch, left padding included.
    """

    item: board.BoardItem
    answer: str | None
    correct: bool
    text: str
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
        kinds: Share answered right of each kind of question there is.
    """

    n: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    unparsed: float
    kinds: dict[str, float]


def build_inputs(
    processor: Any, items: Sequence[board.BoardItem], pictures: Sequence[Image] | None = None
) -> dict[str, Any]:
    """Prompts and pictures -> input_ids, attention_mask (left padded) and pixel_values.

    Args:
        processor: Of the model.
        items: Boards and questions.
        pictures: What is shown instead of each item's own board.
    """
    shown = [item_to_image(item) for item in items] if pictures is None else pictures
    return dict(
        processor(
            text=[item.prompt for item in items],
            images=[[picture] for picture in shown],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )


def solve(
    model: Any,
    processor: Any,
    items: Sequence[board.BoardItem],
    batch_size: int = 32,
    *,
    pictures: Sequence[Image] | None = None,
    on_batch: Callable[[BatchOutput], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generate_kwargs: Any,
) -> list[Solution]:
    """Solves items by greedy generation, with DARE if the model has it.

    Args:
        model: A LLaVA-type model that learned the task.
        processor: Its processor.
        items: From `board.sample`.
        batch_size: Rows of a generate call.
        pictures: What is shown instead of each item's own board: the controls' pictures.
        on_batch: Called after each generate call; the place to collect `last_report(model)`.
        progress: Called with (items done, items in all) after each batch.
        generate_kwargs: Further arguments of generate.

    Returns:
        One solution per item.
    """
    solutions: list[Solution] = []
    settings = {"do_sample": False, "max_new_tokens": _ROOM, **generate_kwargs}
    for first in range(0, len(items), batch_size):
        chosen = slice(first, first + batch_size)
        shown = None if pictures is None else pictures[chosen]
        made = build_inputs(processor, items[chosen], shown)
        inputs = {name: tensor.to(model.device) for name, tensor in made.items()}
        outputs = model.generate(**inputs, **settings)
        indices = tuple(range(first, first + len(items[chosen])))
        batch = BatchOutput(indices, inputs, outputs, inputs["input_ids"].shape[1])
        if on_batch is not None:
            on_batch(batch)
        ids = getattr(outputs, "sequences", outputs)
        for item, row in zip(items[chosen], ids.tolist(), strict=True):
            solutions.append(_read(processor, item, row, batch.prompt_length))
        if progress is not None:
            progress(len(solutions), len(items))
    return solutions


CONTROLS: dict[str, Callable[[Sequence[board.BoardItem]], list[Image]]] = {
    "blank": lambda items: [board_to_image(()) for _ in items],
    "shuffled": lambda items: [item_to_image(item) for item in (*items[1:], *items[:1])],
}
"""Pictures to show instead of the items' own: an empty board, and the next item's."""


def _read(processor: Any, item: board.BoardItem, row: list[int], prompt_length: int) -> Solution:
    new = row[prompt_length:]
    end = processor.tokenizer.eos_token_id
    if end in new:
        new = new[: new.index(end) + 1]
    text = processor.decode(new, skip_special_tokens=True).strip()
    said = board.final(text)
    answer = said if said in board.answers(item.kind) else None
    return Solution(item, answer, answer == item.answer, text, tuple(new), prompt_length)


def score(solutions: Sequence[Solution]) -> Score:
    """Totals over at least one solution.

    Raises:
        DareInputError: There is none.
    """
    n = len(solutions)
    if n == 0:
        raise DareInputError("expected at least one solution, got none")
    accuracy = sum(s.correct for s in solutions) / n
    kinds = {}
    for kind in board.KINDS:
        right = [s.correct for s in solutions if s.item.kind == kind]
        if right:
            kinds[kind] = sum(right) / len(right)
    unparsed = sum(s.answer is None for s in solutions) / n
    return Score(n, accuracy, wilson(accuracy, n), unparsed, kinds)
