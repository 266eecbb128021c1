"""MAZE: follow a legal action sequence through a drawn maze and name the letter it ends on.

Every item is a pure function of (seed, split, index). Training and held-out mazes share no wall
layout: a hash of size and walls decides the side, whatever the seed, so even 3 x 3 mazes are
disjoint.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dare_hf.errors import DareInputError
from dare_hf.tasks.streams import item_indices

Cell = tuple[int, int]
Split = Literal["train", "easy", "hard"]

FIELD = 7
LETTERS = "ABCD"
OUTSIDE = 0
NUM_CELL_TYPES = 1 + 16 * 10
# Wall bits of a cell and the step that crosses that side, as (row, column).
NORTH, EAST, SOUTH, WEST = 1, 2, 4, 8
MOVES: dict[str, tuple[int, Cell]] = {
    "up": (NORTH, (-1, 0)),
    "right": (EAST, (0, 1)),
    "down": (SOUTH, (1, 0)),
    "left": (WEST, (0, -1)),
}
_OPPOSITE = {NORTH: SOUTH, SOUTH: NORTH, EAST: WEST, WEST: EAST}
_HELD_OUT_TENTHS = 1
_OPENING_RATE = 0.15
_SPLITS: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {
    # name: (stream number, sizes, action counts), both ranges inclusive
    "train": (0, (3, 6), (1, 6)),
    "easy": (1, (3, 6), (1, 6)),
    "hard": (2, (7, 7), (6, 8)),
}

PROMPT = (
    "Task: Maze Navigation Simulation. Determine the final destination (A, B, C or D) from the "
    "starting point (red point) following the action sequence. Action sequence: {actions} <image>"
)


@dataclass(frozen=True)
class MazeItem:
    """One maze, its labels and a legal action sequence.

    Attributes:
        size: Cells per side, 3 to 7.
        walls: size x size wall bits (NORTH 1, EAST 2, SOUTH 4, WEST 8).
        offset: Row and column of the maze's top left cell in the FIELD x FIELD picture.
        letters: The cells of A, B, C and D, in this order, relative to the maze.
        start: The red point's first cell, relative to the maze.
        actions: Names from MOVES.
    """

    size: int
    walls: tuple[tuple[int, ...], ...]
    offset: Cell
    letters: tuple[Cell, Cell, Cell, Cell]
    start: Cell
    actions: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The letter under the red point after the last action, by replay."""
        return LETTERS[self.letters.index(self.path()[-1])]

    @property
    def prompt(self) -> str:
        """The question with its numbered actions and one `<image>` placeholder."""
        return PROMPT.format(actions=" ".join(self.step_text(k) for k in range(len(self.actions))))

    def step_text(self, step: int) -> str:
        """Text of 0-based step `step`, the same in prompt and thoughts: `2. Go left.`."""
        return f"{step + 1}. Go {self.actions[step]}."

    def path(self) -> list[Cell]:
        """Cells of the red point: the start, then one per action.

        Raises:
            DareInputError: An action crosses a wall.
        """
        cells = [self.start]
        for step, action in enumerate(self.actions):
            wall, (down, right) = MOVES[action]
            row, column = cells[-1]
            if self.walls[row][column] & wall:
                raise DareInputError(
                    f"expected legal actions, got action {step + 1} ({action}) through a wall of "
                    f"cell {(row, column)}: check the maze's walls and start"
                )
            cells.append((row + down, column + right))
        return cells

    def grid(self, point: Cell) -> np.ndarray:
        """What is drawn in each cell of the field with the red point at `point`.

        Returns:
            int64 [FIELD, FIELD] of cell types, see `cell_type`.
        """
        cells = np.full((FIELD, FIELD), OUTSIDE, dtype=np.int64)
        for row in range(self.size):
            for column in range(self.size):
                here = (row, column)
                letter = self.letters.index(here) + 1 if here in self.letters else 0
                kind = cell_type(self.walls[row][column], letter, here == point)
                cells[self.offset[0] + row, self.offset[1] + column] = kind
        return cells

    def grids(self) -> np.ndarray:
        """The drawn states, int64 [1 + number of actions, FIELD, FIELD]."""
        return np.stack([self.grid(point) for point in self.path()])


def cell_type(walls: int, letter: int, red: bool) -> int:
    """Number of a drawn cell: 0 is outside the maze, else 1 + 10 walls + 2 letter + red.

    Args:
        walls: Wall bits, 0 to 15.
        letter: 0 for none, 1 to 4 for A to D.
        red: Whether the red point is drawn.
    """
    return 1 + 10 * walls + 2 * letter + int(red)


def is_held_out(walls: tuple[tuple[int, ...], ...]) -> bool:
    """Whether this wall layout is reserved for evaluation: one layout in ten, by sha256."""
    text = f"{len(walls)}:" + ",".join(str(bits) for row in walls for bits in row)
    return hashlib.sha256(text.encode()).digest()[0] * 10 < _HELD_OUT_TENTHS * 256


def sample(n: int, split: Split = "easy", seed: int = 0, first: int = 0) -> list[MazeItem]:
    """The items `first` to `first + n - 1` of a split's stream; item i depends on (seed, split, i).

    Args:
        n: Number of items.
        split: "train" and "easy": sizes 3 to 6, 1 to 6 actions, walls disjoint by `is_held_out`;
            "hard": size 7, 6 to 8 actions, also on held-out walls only.
        seed: Stream seed.
        first: Index of the first item.

    Raises:
        DareInputError: The split is not one of the three, or a count is negative.

    Examples:
        >>> from dare_hf.tasks import maze
        >>> len(maze.sample(3, "easy", seed=0))
        3
    """
    return [sample_one(split, seed, index) for index in item_indices(split, _SPLITS, n, first)]


def sample_one(
    split: Split, seed: int, index: int, length: int | None = None, size: int | None = None
) -> MazeItem:
    """Item `index` of a stream; `length` and `size` fix what would otherwise be drawn."""
    stream, sizes, lengths = _SPLITS[split]
    rng = np.random.default_rng([stream, seed, index])
    drawn_size = int(rng.integers(sizes[0], sizes[1] + 1))
    drawn_length = int(rng.integers(lengths[0], lengths[1] + 1))
    size = drawn_size if size is None else size
    length = drawn_length if length is None else length
    while True:
        walls = random_walls(rng, size)
        if is_held_out(walls) == (split != "train"):
            break
    start, actions, end = _random_walk(rng, walls, length)
    letters = _place_letters(rng, size, start, end)
    spare = FIELD - size + 1
    offset = (int(rng.integers(spare)), int(rng.integers(spare)))
    return MazeItem(size, walls, offset, letters, start, actions)


def random_walls(rng: np.random.Generator, size: int) -> tuple[tuple[int, ...], ...]:
    """A random spanning tree of the cells (randomised Kruskal) with some further walls opened."""
    walls = [[15] * size for _ in range(size)]
    sides = [(r, c, EAST) for r in range(size) for c in range(size - 1)]
    sides += [(r, c, SOUTH) for r in range(size - 1) for c in range(size)]
    root = list(range(size * size))

    def find(cell: int) -> int:
        while root[cell] != cell:
            cell = root[cell]
        return cell

    spare = rng.random(len(sides)) < _OPENING_RATE
    for k in rng.permutation(len(sides)):
        row, column, side = sides[k]
        below, right = (row + 1, column) if side == SOUTH else (row, column + 1)
        one, two = find(row * size + column), find(below * size + right)
        if one != two or spare[k]:
            root[one] = two
            walls[row][column] &= ~side
            walls[below][right] &= ~_OPPOSITE[side]
    return tuple(tuple(row) for row in walls)


def _random_walk(
    rng: np.random.Generator, walls: tuple[tuple[int, ...], ...], length: int
) -> tuple[Cell, tuple[str, ...], Cell]:
    """A legal walk that turns back only in dead ends and does not end where it started."""
    size = len(walls)
    while True:
        start = (int(rng.integers(size)), int(rng.integers(size)))
        here, last, actions = start, 0, []
        for _ in range(length):
            row, column = here
            ways = [name for name, (wall, _) in MOVES.items() if not walls[row][column] & wall]
            onward = [name for name in ways if MOVES[name][0] != last] or ways
            name = onward[int(rng.integers(len(onward)))]
            wall, (down, right) = MOVES[name]
            here, last = (row + down, column + right), _OPPOSITE[wall]
            actions.append(name)
        if here != start:
            return start, tuple(actions), here


def _place_letters(
    rng: np.random.Generator, size: int, start: Cell, end: Cell
) -> tuple[Cell, Cell, Cell, Cell]:
    """Four distinct cells other than the start; a uniformly drawn letter gets the end."""
    free = [(r, c) for r in range(size) for c in range(size) if (r, c) not in (start, end)]
    picked = [free[int(k)] for k in rng.permutation(len(free))[:3]]
    picked.insert(int(rng.integers(4)), end)
    a, b, c, d = picked
    return a, b, c, d
