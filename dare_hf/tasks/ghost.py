"""Ghost letters: an early detail of the first image that nothing needs until a late hop.

The first image shows a maze with the letters A to D and no red point. Images that follow, put in
by the environment one per hop, show the same maze without letters and with the red point, which
jumps. In exactly one of them, a late one but not the last, it stands where the first image had a
letter: which? Where the point stands in all other images is independent of the answer, so whoever
sees only the first and the latest image, or only the words, can but guess (25 %).
"""

from dataclasses import dataclass

import numpy as np

from dare_hf.errors import DareInputError
from dare_hf.tasks.maze import (
    FIELD,
    LETTERS,
    OUTSIDE,
    Cell,
    Split,
    cell_type,
    is_held_out,
    random_walls,
)
from dare_hf.tasks.streams import item_indices

_SPLITS: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {
    # name: (stream number, sizes, image counts), both ranges inclusive
    "train": (20, (3, 6), (3, 5)),
    "easy": (21, (3, 6), (3, 5)),
    "hard": (22, (7, 7), (6, 8)),
}

PROMPT = (
    "Task: Ghost Letters. The first image shows the letters A, B, C and D. In one of the next "
    "images the red point stands on the cell of a letter. Determine the letter. Images: {looks} "
    "<image>"
)


@dataclass(frozen=True)
class GhostItem:
    """One maze, its letters and the cells the red point jumps to.

    Attributes:
        size: Cells per side, 3 to 7.
        walls: size x size wall bits, as in `maze.MazeItem`.
        offset: Row and column of the maze's top left cell in the FIELD x FIELD picture.
        letters: The cells of A, B, C and D, in this order, relative to the maze.
        points: The red point's cell in each image after the first.
    """

    size: int
    walls: tuple[tuple[int, ...], ...]
    offset: Cell
    letters: tuple[Cell, Cell, Cell, Cell]
    points: tuple[Cell, ...]

    @property
    def visit(self) -> int:
        """Number of the image, from 1, whose point stands on a letter's cell.

        Raises:
            DareInputError: That holds for none or for several of them.
        """
        visits = [k for k, cell in enumerate(self.points, 1) if cell in self.letters]
        if len(visits) != 1:
            raise DareInputError(
                f"expected the point on a letter's cell in exactly one image, got {len(visits)}"
            )
        return visits[0]

    @property
    def answer(self) -> str:
        """The letter of the visited cell, by look-up in the first image."""
        return LETTERS[self.letters.index(self.points[self.visit - 1])]

    @property
    def prompt(self) -> str:
        """The question, the numbered looks, and one `<image>` placeholder."""
        return PROMPT.format(looks=" ".join(self.step_text(k) for k in range(len(self.points))))

    def step_text(self, step: int) -> str:
        """What asks for the image of 0-based step `step`: `2. Look.`."""
        return f"{step + 1}. Look."

    def grid(self, step: int) -> np.ndarray:
        """Cell types of image `step`: 0 is the first, with letters and without the point.

        Returns:
            int64 [FIELD, FIELD], see `maze.cell_type`.
        """
        cells = np.full((FIELD, FIELD), OUTSIDE, dtype=np.int64)
        for row in range(self.size):
            for column in range(self.size):
                here = (row, column)
                letter = self.letters.index(here) + 1 if not step and here in self.letters else 0
                red = step > 0 and here == self.points[step - 1]
                kind = cell_type(self.walls[row][column], letter, red)
                cells[self.offset[0] + row, self.offset[1] + column] = kind
        return cells

    def grids(self) -> np.ndarray:
        """All images, int64 [1 + number of points, FIELD, FIELD]."""
        return np.stack([self.grid(step) for step in range(len(self.points) + 1)])


def sample(n: int, split: Split = "easy", seed: int = 0, first: int = 0) -> list[GhostItem]:
    """The items `first` to `first + n - 1` of a split's stream; item i depends on (seed, split, i).

    Args:
        n: Number of items.
        split: "train" and "easy": sizes 3 to 6, 3 to 5 images after the first, walls disjoint by
            `maze.is_held_out`; "hard": size 7, 6 to 8 images, also on held-out walls only. In
            "easy" and "hard" the visit is late, in "train" anywhere; in none is it the last.
        seed: Stream seed.
        first: Index of the first item.

    Raises:
        DareInputError: The split is not one of the three, or a count is negative.
    """
    return [sample_one(split, seed, index) for index in item_indices(split, _SPLITS, n, first)]


def sample_one(split: Split, seed: int, index: int, length: int | None = None) -> GhostItem:
    """Item `index` of a stream; `length` fixes the number of images after the first.

    The letters' places, the visited letter and the other points are drawn independently.
    """
    stream, sizes, lengths = _SPLITS[split]
    rng = np.random.default_rng([stream, seed, index])
    size = int(rng.integers(sizes[0], sizes[1] + 1))
    drawn = int(rng.integers(lengths[0], lengths[1] + 1))
    length = drawn if length is None else length
    offset = (int(rng.integers(FIELD - size + 1)), int(rng.integers(FIELD - size + 1)))
    while True:
        walls = random_walls(rng, size)
        if is_held_out(walls) == (split != "train"):
            break
    cells = [(r, c) for r in range(size) for c in range(size)]
    order = [cells[int(k)] for k in rng.permutation(len(cells))]
    letters = (order[0], order[1], order[2], order[3])
    empty = sorted(order[4:])
    points = [empty[int(rng.integers(len(empty)))] for _ in range(length)]
    earliest = 1 if split == "train" else length // 2 + 1
    visit = int(rng.integers(min(earliest, max(length - 1, 1)), max(length, 2)))
    points[visit - 1] = letters[int(rng.integers(4))]
    return GhostItem(size, walls, offset, letters, tuple(points))
