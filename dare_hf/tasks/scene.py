"""SCENE: find a shape by its place among others, then look closer to read the mark on it.

A scene has shapes on a grid of cells. A question names one of them ("the red circle") and leads to
another by up to two relations ("the shape above the shape left of the red circle"). The answer is
the mark on the shape it leads to, and marks cannot be read at the size at which the model first
sees the picture (see `scene_render`), so that a second look at the right box is needed.

Every item is a pure function of (seed, split, index). Training and held-out scenes share no layout:
a hash of what lies where, marks aside, decides the side.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dare_hf.errors import DareInputError
from dare_hf.tasks.streams import item_indices

Split = Literal["train", "easy", "hard"]
Box = tuple[float, float, float, float]

GRID = 4
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
FORMS = ("circle", "square", "triangle", "diamond")
MARKS = "ABCD"
# Step to the next cell in that direction, as (row, column).
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}
MAX_RELATIONS = 2
_HELD_OUT_TENTHS = 1
_SPLITS: dict[str, tuple[int, tuple[int, int], tuple[float, float, float]]] = {
    # name: (stream number, shapes (inclusive), shares of questions with 0, 1 and 2 relations)
    "train": (0, (3, 5), (0.2, 0.5, 0.3)),
    "easy": (1, (4, 5), (0.25, 0.75, 0.0)),
    "hard": (2, (6, 6), (0.0, 0.5, 0.5)),
}

PROMPT = "Which mark is on {place}? <image>"


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Attributes:
        row: Its cell, from the top.
        column: Its cell, from the left.
        colour: Index into COLOURS.
        form: Index into FORMS.
        mark: Index into MARKS.
    """

    row: int
    column: int
    colour: int
    form: int
    mark: int

    @property
    def name(self) -> str:
        """`the red circle`."""
        return f"the {COLOURS[self.colour]} {FORMS[self.form]}"

    @property
    def box(self) -> Box:
        """Its cell as x1, y1, x2, y2 in [0, 1] of the picture."""
        left, top = self.column / GRID, self.row / GRID
        return left, top, left + 1 / GRID, top + 1 / GRID


@dataclass(frozen=True)
class SceneItem:
    """One scene and a question about it.

    Attributes:
        shapes: In raster order; each has a colour of its own.
        reference: Index of the shape that the question names.
        relations: Names from RELATIONS, to be followed from the reference on.
    """

    shapes: tuple[Shape, ...]
    reference: int
    relations: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The question and one `<image>` placeholder."""
        place = self.shapes[self.reference].name
        for relation in self.relations:
            place = f"the shape {relation} {place}"
        return PROMPT.format(place=place)

    def path(self) -> list[Shape]:
        """The reference, then the shape each relation leads to.

        Raises:
            DareInputError: A relation leads to no shape.
        """
        shapes = [self.shapes[self.reference]]
        for relation in self.relations:
            found = neighbour(self.shapes, shapes[-1], relation)
            if found is None:
                raise DareInputError(
                    f"expected a shape {relation} {shapes[-1].name}, got none: check the item's "
                    "shapes and relations"
                )
            shapes.append(found)
        return shapes

    def looks(self) -> list[Shape]:
        """The shapes to look at in turn: each one a relation leads to, or the reference itself."""
        return self.path()[1:] or self.path()

    @property
    def answer(self) -> str:
        """The letter of the mark on the last shape of the path."""
        return MARKS[self.path()[-1].mark]


def neighbour(shapes: tuple[Shape, ...], shape: Shape, relation: str) -> Shape | None:
    """The nearest shape in that direction, in the same row or column; None if there is none."""
    down, right = RELATIONS[relation]
    cells = {(other.row, other.column): other for other in shapes}
    row, column = shape.row + down, shape.column + right
    while 0 <= row < GRID and 0 <= column < GRID:
        if (row, column) in cells:
            return cells[row, column]
        row, column = row + down, column + right
    return None


def box_text(box: Box) -> str:
    """`<coor> 0.250,0.500,0.500,0.750</coor>`: a box as VoCoT writes it."""
    return f"<coor> {','.join(f'{value:.3f}' for value in box)}</coor>"


def is_held_out(shapes: tuple[Shape, ...]) -> bool:
    """Whether this layout is reserved for evaluation: one in ten, by sha256, marks not counted."""
    parts = (f"{s.row}{s.column}{s.colour}{s.form}" for s in shapes)
    return hashlib.sha256(",".join(parts).encode()).digest()[0] * 10 < _HELD_OUT_TENTHS * 256


def sample(n: int, split: Split = "easy", seed: int = 0, first: int = 0) -> list[SceneItem]:
    """The items `first` to `first + n - 1` of a split's stream; item i depends on (seed, split, i).

    Args:
        n: Number of items.
        split: "train": 3 to 5 shapes, up to two relations; "easy": 4 or 5 shapes, up to one
            relation, layouts disjoint by `is_held_out`; "hard": 6 shapes, one or two relations,
            held-out layouts too.
        seed: Stream seed.
        first: Index of the first item.

    Raises:
        DareInputError: The split is not one of the three, or a count is negative.

    Examples:
        >>> from dare_hf.tasks import scene
        >>> item = scene.sample(1, "easy", seed=0)[0]
        >>> item.prompt.startswith("Which mark")
        True
    """
    return [sample_one(split, seed, index) for index in item_indices(split, _SPLITS, n, first)]


def sample_one(
    split: Split,
    seed: int,
    index: int,
    shapes: tuple[int, int] | None = None,
    relations: int | None = None,
) -> SceneItem:
    """Item `index` of a stream; `shapes` (least, most) and `relations` replace the split's."""
    stream, counts, shares = _SPLITS[split]
    rng = np.random.default_rng([stream, seed, index])
    drawn = int(rng.choice(MAX_RELATIONS + 1, p=shares))
    length = drawn if relations is None else relations
    least, most = counts if shapes is None else shapes
    while True:
        scene = _random_shapes(rng, int(rng.integers(least, most + 1)))
        if is_held_out(scene) != (split != "train"):
            continue
        questions = _questions(scene, length)
        if questions:
            reference, names = questions[int(rng.integers(len(questions)))]
            return SceneItem(scene, reference, names)


def _random_shapes(rng: np.random.Generator, count: int) -> tuple[Shape, ...]:
    cells = sorted(rng.permutation(GRID * GRID)[:count].tolist())
    colours = rng.permutation(len(COLOURS))[:count].tolist()
    forms = rng.integers(len(FORMS), size=count).tolist()
    marks = rng.integers(len(MARKS), size=count).tolist()
    return tuple(
        Shape(*divmod(cell, GRID), colour, form, mark)
        for cell, colour, form, mark in zip(cells, colours, forms, marks, strict=True)
    )


def _questions(scene: tuple[Shape, ...], length: int) -> list[tuple[int, tuple[str, ...]]]:
    """All (reference, relations) with that many relations that lead somewhere new."""
    found: list[tuple[int, tuple[str, ...], list[Shape]]] = [
        (k, (), [shape]) for k, shape in enumerate(scene)
    ]
    for _ in range(length):
        longer = []
        for reference, names, path in found:
            for name in RELATIONS:
                there = neighbour(scene, path[-1], name)
                if there is not None and there not in path:
                    longer.append((reference, (*names, name), [*path, there]))
        found = longer
    return [(reference, names) for reference, names, _ in found]
