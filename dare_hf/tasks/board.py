"""BOARD: questions in plain words about coloured shapes on a board of 6 x 6 fields.

Fields are named as in chess: a letter for the column, from the left, and a digit for the row, from
the top. Every item is a pure function of (seed, split, index), and every answer is replayed from
the board and the words of the question. Training and held-out items share no board: a hash of what
lies where decides the side.

Three kinds are answered at once ("colour", "where", "at"), three by steps: the fields first, then
what follows from them ("B2, D5, so yes").
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dare_hf.errors import DareInputError
from dare_hf.tasks.streams import item_indices

if TYPE_CHECKING:
    from collections.abc import Iterator

Split = Literal["train", "easy", "hard"]
Kind = Literal["colour", "where", "at", "count", "left", "above"]

GRID = 6
COLUMNS, ROWS = "ABCDEF", "123456"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
FORMS = ("circle", "square", "triangle", "star", "cross")
KINDS: tuple[Kind, ...] = ("colour", "where", "at", "count", "left", "above")
QUESTIONS: dict[Kind, str] = {
    "colour": "What colour is the shape at {0}?",
    "where": "Where is the {0}?",
    "at": "What is at {0}?",
    "count": "How many {0} shapes are there?",
    "left": "Is the {0} left of the {1}?",
    "above": "Is the {0} above the {1}?",
}
CHAT = "<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\nAnswer:"
"""A prompt as the chat template of SmolLM2 writes it; the response follows after a space."""
NOTHING = "nothing"
_EMPTY_SHARE = 0.25  # of questions "at" about an empty field
_MOST_COUNTED = 4
_HELD_OUT_TENTHS = 1
_SPLITS: dict[str, tuple[int, tuple[int, int]]] = {
    # name: (stream number, pieces (inclusive))
    "train": (0, (5, 12)),
    "easy": (1, (5, 12)),
    "hard": (2, (13, 16)),
}


@dataclass(frozen=True)
class Piece:
    """A shape on the board.

    Attributes:
        row: Its field, from the top.
        column: Its field, from the left.
        colour: Index into COLOURS.
        form: Index into FORMS.
    """

    row: int
    column: int
    colour: int
    form: int

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{COLOURS[self.colour]} {FORMS[self.form]}"

    @property
    def field(self) -> str:
        """`B3`."""
        return field_name(self.row, self.column)


Board = tuple[Piece, ...]


@dataclass(frozen=True)
class BoardItem:
    """A board and a question about it.

    Attributes:
        pieces: In raster order, each with a name of its own.
        kind: Of the question.
        words: What the question names: fields, shapes or a colour.
    """

    pieces: Board
    kind: Kind
    words: tuple[str, ...]

    @property
    def question(self) -> str:
        """What is asked, in words."""
        return QUESTIONS[self.kind].format(*self.words)

    @property
    def prompt(self) -> str:
        """The question in a chat, behind one `<image>` placeholder."""
        return CHAT.format(question=self.question)

    @property
    def response(self) -> str:
        """What a right model says, the steps included.

        Raises:
            DareInputError: The question names what is not on the board.
        """
        if self.kind in ("colour", "at"):
            found = {piece.field: piece for piece in self.pieces}.get(self.words[0])
            if found is None and self.kind == "colour":
                raise self._missing(self.words[0])
            if self.kind == "colour":
                return COLOURS[found.colour]
            return NOTHING if found is None else found.name
        if self.kind == "count":
            counted = [p.field for p in self.pieces if COLOURS[p.colour] == self.words[0]]
            return f"{', '.join(counted) or 'none'}, so {len(counted)}"
        places = [self._named(word) for word in self.words]
        if self.kind == "where":
            return places[0].field
        first, second = places
        across = self.kind == "left"
        holds = first.column < second.column if across else first.row < second.row
        return f"{first.field}, {second.field}, so {'yes' if holds else 'no'}"

    @property
    def answer(self) -> str:
        """The response without its steps."""
        return final(self.response)

    def _named(self, name: str) -> Piece:
        for piece in self.pieces:
            if piece.name == name:
                return piece
        raise self._missing(name)

    def _missing(self, what: str) -> DareInputError:
        held = ", ".join(f"{piece.name} at {piece.field}" for piece in self.pieces)
        return DareInputError(
            f"expected a question about what is on the board ({held}); got {what!r}: check the "
            "item's pieces and words"
        )


def answers(kind: Kind) -> frozenset[str]:
    """Every answer that a question of a kind can have."""
    fields = {field_name(*divmod(cell, GRID)) for cell in range(GRID * GRID)}
    shapes = {f"{colour} {form}" for colour in COLOURS for form in FORMS}
    known = {
        "colour": set(COLOURS),
        "where": fields,
        "at": shapes | {NOTHING},
        "count": set(map(str, range(_MOST_COUNTED + 1))),
    }
    return frozenset(known.get(kind, {"yes", "no"}))


def final(response: str) -> str:
    """A response without its steps: what follows `so`, or all of it."""
    return re.split(r"\bso ", response)[-1].strip().removesuffix(".")


def field_name(row: int, column: int) -> str:
    """`B3` for row 2 and column 1."""
    return COLUMNS[column] + ROWS[row]


def is_held_out(pieces: Board) -> bool:
    """Whether this board is reserved for evaluation: one in ten, by sha256."""
    parts = (f"{p.row}{p.column}{p.colour}{p.form}" for p in pieces)
    return hashlib.sha256(",".join(parts).encode()).digest()[0] * 10 < _HELD_OUT_TENTHS * 256


def sample(n: int, split: Split = "easy", seed: int = 0, first: int = 0) -> list[BoardItem]:
    """The items `first` to `first + n - 1` of a split's stream, each on a board of its own.

    Kinds take turns, so that n items have n / 6 of each.

    Args:
        n: Number of items.
        split: "train" and "easy": 5 to 12 pieces, boards disjoint by `is_held_out`; "hard": 13 to
            16 pieces, held-out boards too.
        seed: Stream seed.
        first: Index of the first item.

    Raises:
        DareInputError: The split is not one of the three, or a count is negative.
    """
    return [sample_one(split, seed, index) for index in item_indices(split, _SPLITS, n, first)]


def sample_one(split: Split, seed: int, index: int) -> BoardItem:
    """Item `index` of a stream."""
    pieces, rng = _draw(split, seed, index)
    return ask(pieces, KINDS[index % len(KINDS)], rng)


def sample_board(
    split: Split, seed: int, index: int, questions: int
) -> tuple[Board, list[BoardItem]]:
    """Board `index` of a stream with several questions on it, kinds in turns.

    Args:
        split: As in `sample`.
        seed: Stream seed.
        index: Which board.
        questions: How many.
    """
    pieces, rng = _draw(split, seed, index)
    kinds = (KINDS[(index + k) % len(KINDS)] for k in range(questions))
    return pieces, [ask(pieces, kind, rng) for kind in kinds]


def ask(pieces: Board, kind: Kind, rng: np.random.Generator) -> BoardItem:
    """A random question of a kind about a board."""
    if kind == "colour":
        words = (_pick(pieces, rng).field,)
    elif kind == "where":
        words = (_pick(pieces, rng).name,)
    elif kind == "at":
        words = (_field(pieces, rng),)
    elif kind == "count":
        words = (COLOURS[int(rng.choice(_countable(pieces)))],)
    else:
        words = _pair(pieces, kind, rng)
    return BoardItem(pieces, kind, words)


def _draw(split: Split, seed: int, index: int) -> tuple[Board, np.random.Generator]:
    stream, (least, most) = _SPLITS[split]
    rng = np.random.default_rng([stream, seed, index])
    while True:
        pieces = _random_pieces(rng, int(rng.integers(least, most + 1)))
        if is_held_out(pieces) == (split != "train") and _countable(pieces):
            return pieces, rng


def _random_pieces(rng: np.random.Generator, count: int) -> Board:
    cells = sorted(rng.permutation(GRID * GRID)[:count].tolist())
    names = rng.permutation(len(COLOURS) * len(FORMS))[:count].tolist()
    return tuple(
        Piece(*divmod(cell, GRID), *divmod(name, len(FORMS)))
        for cell, name in zip(cells, names, strict=True)
    )


def _pick(pieces: Board, rng: np.random.Generator) -> Piece:
    return pieces[int(rng.integers(len(pieces)))]


def _field(pieces: Board, rng: np.random.Generator) -> str:
    if rng.random() >= _EMPTY_SHARE:
        return _pick(pieces, rng).field
    taken = {piece.field for piece in pieces}
    fields = (field_name(*divmod(cell, GRID)) for cell in range(GRID * GRID))
    return str(rng.choice([name for name in fields if name not in taken]))


def _countable(pieces: Board) -> list[int]:
    """Colours of which there are few enough to list."""
    colours = [piece.colour for piece in pieces]
    return [k for k in range(len(COLOURS)) if colours.count(k) <= _MOST_COUNTED]


def _pair(pieces: Board, kind: Kind, rng: np.random.Generator) -> tuple[str, str]:
    """Two shapes, not in one column ("left") or row ("above"); yes and no are equally frequent."""
    apart = [pair for pair in _pairs(pieces) if _steps(*pair, kind)]
    if not apart:  # all in one line: ask about any two of them, and the answer is no
        apart = list(_pairs(pieces))
    first, second = apart[int(rng.integers(len(apart)))]
    return first.name, second.name


def _pairs(pieces: Board) -> Iterator[tuple[Piece, Piece]]:
    return ((a, b) for a in pieces for b in pieces if a != b)


def _steps(first: Piece, second: Piece, kind: Kind) -> int:
    return second.column - first.column if kind == "left" else second.row - first.row
