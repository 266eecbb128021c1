"""The tasks that embedded models are measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dare_hf.assets.board import NAME as BOARD
from dare_hf.errors import DareInputError
from dare_hf.tasks import (
    board,
    board_run,
    frozen_lake,
    ghost,
    ghost_run,
    maze,
    mvot,
    scene,
    vocot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Task:
    """A task: its items, how a model solves them, and what counts.

    Attributes:
        name: Its name on the command line.
        model: The embedded model that learned it.
        sample: (n, split, seed) -> items.
        solve: (model, processor, items, batch_size, on_batch=, progress=) -> solutions.
        score: Solutions -> totals with `accuracy`, `accuracy_interval`, `unparsed`.
        ends: Processor -> the ids of which one has to end hops here; the first does where nothing
            else is said; `no_end` where there are no hops.
        detail: The field of the score that says how good thoughts are; None where none are scored.
        controls: What is shown instead of the items' pictures, by the control's name.
    """

    name: str
    model: str
    sample: Callable[[int, Any, int], list[Any]]
    solve: Callable[..., list[Any]]
    score: Callable[[Sequence[Any]], Any]
    ends: Callable[[Any], tuple[int, ...]]
    detail: str | None
    controls: Mapping[str, Callable[[Sequence[Any]], list[Any]]] = field(default_factory=dict)

    def control(self, name: str, items: Sequence[Any]) -> list[Any]:
        """The pictures of a control; without what is asked about only chance answers right.

        Raises:
            DareInputError: The task has no such control.
        """
        if name not in self.controls:
            known = ", ".join(self.controls) or "there is none"
            raise DareInputError(f"control: expected one of {self.name} ({known}), got {name!r}")
        return self.controls[name](items)


def _end_of_step(processor: Any) -> tuple[int, ...]:
    """The end of the drawn image, or the separator that follows it."""
    return (processor.image_end_token_id, processor.tokenizer.sep_token_id)


def _end_of_box(processor: Any) -> tuple[int, ...]:
    return (vocot.delimiter_id(processor),)


def no_end(processor: Any) -> tuple[int, ...]:
    """Of a task without hops."""
    return ()


_ANOLE, _VOLCANO = "dare-tiny-anole", "dare-tiny-volcano"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("maze", _ANOLE, maze.sample, mvot.solve, mvot.score, _end_of_step, "images_right"),
        Task(
            "frozen_lake",
            _ANOLE,
            frozen_lake.sample,
            mvot.solve,
            mvot.score,
            _end_of_step,
            "images_right",
        ),
        Task(
            "ghost", _ANOLE, ghost.sample, ghost_run.solve, mvot.score, ghost_run.delimiters, None
        ),
        Task(
            "board",
            BOARD,
            board.sample,
            board_run.solve,
            board_run.score,
            no_end,
            None,
            board_run.CONTROLS,
        ),
        Task("scene", _VOLCANO, scene.sample, vocot.solve, vocot.score, _end_of_box, "boxes_right"),
    )
}


def task_of(name: str | None, model: str) -> Task:
    """The task `name` of an embedded model; without a name its first.

    Raises:
        DareInputError: The model did not learn such a task.
    """
    learned = [task for task in TASKS.values() if task.model == model]
    for task in learned:
        if name in (None, task.name):
            return task
    known = ", ".join(task.name for task in learned)
    raise DareInputError(f"task: expected one that {model} learned ({known}), got {name!r}")
