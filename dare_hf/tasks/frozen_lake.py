"""FrozenLake: follow an action sequence over ice and tell whether the gift is reached safely.

Not slippery. Every item is a pure function of (seed, split, index), its answer comes from replay,
and training and held-out maps share no layout: a hash of size, holes and gift decides the side.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from dare_hf.errors import DareInputError
from dare_hf.tasks.maze import FIELD, MOVES, OUTSIDE, Cell, Split, cell_type
from dare_hf.tasks.streams import item_indices

ICE, HOLE, GIFT = 0, 1, 2
SUCCESS, FELL, SAFE = "A", "B", "C"
ANSWERS = SUCCESS + FELL + SAFE
# Cells walled in on all sides do not occur in mazes; their numbers are FrozenLake's tiles.
_NO_MAZE_WALLS = 15
_HELD_OUT_TENTHS = 1
_HOLE_RATE = 0.3
_TRIES = 20
_SPLITS: dict[str, tuple[int, tuple[int, int], tuple[int, int]]] = {
    # name: (stream number, sizes, action counts), both ranges inclusive
    "train": (10, (3, 6), (1, 6)),
    "easy": (11, (3, 6), (1, 6)),
    "hard": (12, (7, 7), (6, 8)),
}

PROMPT = (
    "Task: FrozenLake. Determine whether the agent can safely reach the gift following the action "
    "sequence without falling into the holes. A. Action Success. B. Action Failed: Fall into the "
    "Hole. C. Action Failed: Agent Safe but Fail to Reach Destination. Action sequence: {actions} "
    "<image>"
)


@dataclass(frozen=True)
class FrozenLakeItem:
    """One map and an action sequence that never leaves it.

    An agent that falls into a hole stays there: the actions after the fall are still taken in the
    thoughts, one picture each, and change nothing.

    Attributes:
        size: Cells per side, 3 to 7.
        holes: The hole cells, sorted, relative to the map.
        gift: The goal's cell.
        offset: Row and column of the map's top left cell in the FIELD x FIELD picture.
        start: The agent's first cell.
        actions: Names from `maze.MOVES`.
    """

    size: int
    holes: tuple[Cell, ...]
    gift: Cell
    offset: Cell
    start: Cell
    actions: tuple[str, ...]

    @property
    def answer(self) -> str:
        """By replay: "A" if the agent ends on the gift, "B" if in a hole, else "C"."""
        last = self.path()[-1]
        if last in self.holes:
            return FELL
        return SUCCESS if last == self.gift else SAFE

    @property
    def prompt(self) -> str:
        """The question with its numbered actions and one `<image>` placeholder."""
        return PROMPT.format(actions=" ".join(self.step_text(k) for k in range(len(self.actions))))

    def step_text(self, step: int) -> str:
        """Text of 0-based step `step`, the same in prompt and thoughts: `2. Go left.`."""
        return f"{step + 1}. Go {self.actions[step]}."

    def path(self) -> list[Cell]:
        """Cells of the agent: the start, then one per action; after a fall all the same.

        Raises:
            DareInputError: An action leaves the map.
        """
        cells = [self.start]
        for step, action in enumerate(self.actions):
            row, column = cells[-1]
            if (row, column) in self.holes:
                cells.append((row, column))
                continue
            _, (down, right) = MOVES[action]
            there = (row + down, column + right)
            if not _inside(there, self.size):
                raise DareInputError(
                    f"expected actions that stay on the map, got action {step + 1} ({action}) "
                    f"from cell {(row, column)} of {self.size} x {self.size}"
                )
            cells.append(there)
        return cells

    def grid(self, agent: Cell) -> np.ndarray:
        """What is drawn in each cell of the field with the agent at `agent`.

        Returns:
            int64 [FIELD, FIELD] of cell types, see `tile`.
        """
        cells = np.full((FIELD, FIELD), OUTSIDE, dtype=np.int64)
        for row in range(self.size):
            for column in range(self.size):
                here = (row, column)
                ground = HOLE if here in self.holes else GIFT if here == self.gift else ICE
                cells[self.offset[0] + row, self.offset[1] + column] = tile(ground, here == agent)
        return cells

    def grids(self) -> np.ndarray:
        """The drawn states, int64 [1 + number of actions, FIELD, FIELD]."""
        return np.stack([self.grid(cell) for cell in self.path()])


def tile(ground: int, agent: bool) -> int:
    """Cell type of a tile: ICE, HOLE or GIFT, with or without the agent."""
    return cell_type(_NO_MAZE_WALLS, ground, agent)


def is_held_out(size: int, holes: tuple[Cell, ...], gift: Cell) -> bool:
    """Whether this map is reserved for evaluation: one map in ten, by sha256."""
    text = f"lake {size}:{sorted(holes)}:{gift}"
    return hashlib.sha256(text.encode()).digest()[0] * 10 < _HELD_OUT_TENTHS * 256


def sample(n: int, split: Split = "easy", seed: int = 0, first: int = 0) -> list[FrozenLakeItem]:
    """The items `first` to `first + n - 1` of a split's stream; item i depends on (seed, split, i).

    Args:
        n: Number of items.
        split: "train" and "easy": sizes 3 to 6, 1 to 6 actions, maps disjoint by `is_held_out`;
            "hard": size 7, 6 to 8 actions, also on held-out maps only.
        seed: Stream seed.
        first: Index of the first item.

    Raises:
        DareInputError: The split is not one of the three, or a count is negative.
    """
    return [sample_one(split, seed, index) for index in item_indices(split, _SPLITS, n, first)]


def sample_one(split: Split, seed: int, index: int, length: int | None = None) -> FrozenLakeItem:
    """Item `index` of a stream; `length` fixes the number of actions.

    The actions are drawn before the answer and the map is laid around them, so that the words of
    the question say next to nothing about the answer.
    """
    stream, sizes, lengths = _SPLITS[split]
    rng = np.random.default_rng([stream, seed, index])
    size = int(rng.integers(sizes[0], sizes[1] + 1))
    drawn = int(rng.integers(lengths[0], lengths[1] + 1))
    length = drawn if length is None else length
    offset = (int(rng.integers(FIELD - size + 1)), int(rng.integers(FIELD - size + 1)))
    answer = ANSWERS[int(rng.integers(3))]
    while True:
        start, actions, cells = _walk(rng, size, length)
        for _ in range(_TRIES):
            holes, gift = _lay_out(rng, size, cells, answer)
            free = is_held_out(size, holes, gift) == (split != "train")
            if free and _reachable(size, holes, start, gift):
                return FrozenLakeItem(size, holes, gift, offset, start, actions)


def _inside(cell: Cell, size: int) -> bool:
    return all(0 <= place < size for place in cell)


def _walk(
    rng: np.random.Generator, size: int, length: int
) -> tuple[Cell, tuple[str, ...], list[Cell]]:
    """Start, actions and cells of a walk that never turns straight back and ends on a new cell."""
    back = {"up": "down", "down": "up", "left": "right", "right": "left"}
    while True:
        cells = [(int(rng.integers(size)), int(rng.integers(size)))]
        actions: list[str] = []
        for _ in range(length):
            row, column = cells[-1]
            ways = {name: (row + move[0], column + move[1]) for name, (_, move) in MOVES.items()}
            names = [name for name, cell in ways.items() if _inside(cell, size)]
            names = [name for name in names if not actions or name != back[actions[-1]]]
            name = names[int(rng.integers(len(names)))]
            actions.append(name)
            cells.append(ways[name])
        if cells[-1] not in cells[:-1]:
            return cells[0], tuple(actions), cells


def _lay_out(
    rng: np.random.Generator, size: int, cells: list[Cell], answer: str
) -> tuple[tuple[Cell, ...], Cell]:
    """Holes and gift under which walking `cells` leads to `answer`."""
    walked = cells
    fall: list[Cell] = []
    if answer == FELL:
        new = [k for k in range(1, len(cells)) if cells[k] not in cells[:k]]
        step = new[int(rng.integers(len(new)))]
        walked, fall = cells[:step], [cells[step]]
    free = [(r, c) for r in range(size) for c in range(size) if (r, c) not in [*walked, *fall]]
    gift = cells[-1]
    if answer != SUCCESS:
        gift = free.pop(int(rng.integers(len(free))))
    holes = [cell for cell in free if rng.random() < _HOLE_RATE]
    return tuple(sorted(holes + fall)), gift


def _reachable(size: int, holes: tuple[Cell, ...], start: Cell, gift: Cell) -> bool:
    seen, edge = {start}, [start]
    while edge:
        row, column = edge.pop()
        for _, (down, right) in MOVES.values():
            there = (row + down, column + right)
            if _inside(there, size) and there not in seen and there not in holes:
                seen.add(there)
                edge.append(there)
    return gift in seen
