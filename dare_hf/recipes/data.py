"""Where training rows come from, and how they become batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Subset

from dare_hf.errors import DareInputError
from dare_hf.tasks import board, frozen_lake, ghost, maze, scene, teaching
from dare_hf.tuning.rows import check_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.recipes.recipe import Recipe

_STREAMS: dict[str, Any] = {
    "maze": maze,
    "frozen_lake": frozen_lake,
    "ghost": ghost,
    "scene": scene,
    "board": board,
}


class TaskStream(Dataset):
    """The training splits of tasks, item by item in turn.

    Args:
        names: Tasks.
        count: Items in all.
        seed: Stream seed.
        first: Index of the first item.
    """

    def __init__(self, names: Sequence[str], count: int, seed: int, first: int = 0) -> None:
        self.names, self.count, self.seed, self.first = tuple(names), count, seed, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, name = divmod(index, len(self.names))
        stream = _STREAMS[self.names[name]]
        return {"item": stream.sample_one("train", self.seed, self.first + turn)}


class TaskCollator:
    """Items of tasks -> a teacher-forced batch; see `teaching.batch`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these rows."""
        return teaching.batch(self.model, self.processor, [row["item"] for row in rows])


class JsonLines(Dataset):
    """A file of {"images": [...], "prompt": ..., "response": ...}, one per line.

    Raises:
        DareInputError: A line is no such object, or the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path).parent
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise DareInputError(
                f"data: expected a JSON lines file; got {path}: {error}"
            ) from error
        self.rows = [
            _row(line, number, path) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if not self.rows:
            raise DareInputError(f"data: expected at least one line; got none in {path}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        row = self.rows[index]
        pictures = [Image.open(self.folder / name).convert("RGB") for name in row["images"]]
        return {"images": pictures, "prompt": row["prompt"], "response": row["response"]}


def _row(line: bytes, number: int, path: Any) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        images, prompt, response = row["images"], row["prompt"], row["response"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DareInputError(
            'data: expected {"images": [...], "prompt": ..., "response": ...} in line '
            f"{number} of {path}; got {line[:80]!r} ({type(error).__name__}: {str(error)[:80]})"
        ) from error
    paths = images if isinstance(images, list) else [None]
    if not all(isinstance(text, str) for text in (prompt, response, *paths)):
        raise DareInputError(
            f"data: expected a list of paths and two strings in line {number} of {path}; got "
            f"{line[:80]!r}"
        )
    for name in images:
        check_picture(Path(path).parent / name, f"line {number} of {path}")
    return {"images": images, "prompt": prompt, "response": response}


class ResponseCollator:
    """Prompts and responses -> a teacher-forced batch: the response is learned, images are not.

    Pictures in the response are injected spans: their tokens are given, not learned.

    Args:
        processor: The model's processor.
        vision_ids: Ids of vision tokens.
    """

    def __init__(self, processor: Any, vision_ids: Sequence[int]) -> None:
        self.processor, self.vision_ids = processor, tuple(vision_ids)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of these rows."""
        return teaching.respond(self.processor, rows, self.vision_ids)


def datasets_of(recipe: Recipe, processes: int = 1) -> tuple[Dataset, Dataset | None]:
    """The rows a recipe trains on, and those it holds out.

    Args:
        recipe: The run.
        processes: How many share its steps, each with batches of its own.

    Raises:
        DareInputError: The file cannot be used, or nothing would be left to train on.
    """
    if recipe.data is not None:
        rows = JsonLines(recipe.data)
        left = len(rows) - recipe.validate
        if left < 1:
            raise DareInputError(
                f"validate: expected fewer rows than the {len(rows)} of {recipe.data}; got "
                f"{recipe.validate}. Hold out fewer, or add lines"
            )
        held = Subset(rows, range(left, len(rows))) if recipe.validate else None
        return Subset(rows, range(left)), held
    count = recipe.steps * recipe.batch_size * recipe.accumulate * processes
    behind = recipe.first + -(-count // len(recipe.task))
    held = TaskStream(recipe.task, recipe.validate, recipe.seed, behind)
    stream = TaskStream(recipe.task, count, recipe.seed, recipe.first)
    return stream, held if recipe.validate else None
