"""BOARD items: answers by an independent replay, splits disjoint, pictures that show it."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dare_hf.errors import DareInputError
from dare_hf.tasks import board, board_render

ITEMS = [*board.sample(120, "easy"), *board.sample(120, "train"), *board.sample(60, "hard")]
FIELD = board_render.FIELD


@pytest.mark.parametrize("split", ["train", "easy", "hard"])
def test_an_item_depends_on_seed_split_and_index_only(split: board.Split) -> None:
    assert board.sample(5, split, seed=3)[4] == board.sample(1, split, seed=3, first=4)[0]
    assert board.sample(5, split, seed=3) != board.sample(5, split, seed=4)


def _seen(item: board.BoardItem) -> dict[str, tuple[str, str]]:
    """Field -> colour and form, the colour read off the picture's pixels at the field's centre."""
    pixels = np.asarray(board_render.item_to_image(item))
    names = dict(zip(board_render.RGB, board.COLOURS, strict=True))
    found = {}
    for cell in range(36):
        row, column = divmod(cell, 6)
        middle = pixels[row * FIELD + FIELD // 2, column * FIELD + FIELD // 2]
        if tuple(middle.tolist()) in names:
            form = next(
                board.FORMS[p.form] for p in item.pieces if (p.row, p.column) == (row, column)
            )
            found["ABCDEF"[column] + "123456"[row]] = (names[tuple(middle.tolist())], form)
    return found


def _replayed(item: board.BoardItem) -> str:
    """The answer, from the question's text and the picture alone."""
    seen, asked = _seen(item), item.question
    where = {" ".join(shown): field for field, shown in seen.items()}
    if found := re.fullmatch(r"What colour is the shape at (\w\d)\?", asked):
        return seen[found[1]][0]
    if found := re.fullmatch(r"Where is the (\w+ \w+)\?", asked):
        return where[found[1]]
    if found := re.fullmatch(r"What is at (\w\d)\?", asked):
        return " ".join(seen.get(found[1], ("nothing",)))
    if found := re.fullmatch(r"How many (\w+) shapes are there\?", asked):
        return str(sum(colour == found[1] for colour, _ in seen.values()))
    found = re.fullmatch(r"Is the (\w+ \w+) (left of|above) the (\w+ \w+)\?", asked)
    assert found, asked
    place = 0 if found[2] == "left of" else 1
    return "yes" if where[found[1]][place] < where[found[3]][place] else "no"


def test_the_answer_is_what_the_picture_says() -> None:
    for item in ITEMS:
        assert item.answer == _replayed(item)


def test_steps_name_the_fields_that_the_answer_follows_from() -> None:
    stepped = [item for item in ITEMS if item.kind in ("count", "left", "above")]
    assert len(stepped) == len(ITEMS) // 2
    for item in stepped:
        steps, answer = item.response.split(", so ")
        seen = _seen(item)
        fields = [] if steps == "none" else steps.split(", ")
        if item.kind == "count":
            assert [seen[field][0] for field in fields] == [item.words[0]] * int(answer)
        else:
            assert [" ".join(seen[field]) for field in fields] == list(item.words)


def test_training_and_held_out_boards_share_none() -> None:
    trained = {item.pieces for item in board.sample(400, "train")}
    held_out = {item.pieces for item in board.sample(400, "easy")}
    assert not trained & held_out
    assert not any(board.is_held_out(pieces) for pieces in trained)
    assert all(board.is_held_out(item.pieces) for item in ITEMS if item in board.sample(60, "hard"))


def test_kinds_take_turns_and_no_answer_of_a_kind_rules() -> None:
    items = board.sample(1200, "easy")
    assert set(Counter(item.kind for item in items).values()) == {200}
    for kind in board.KINDS:
        (_, most), *_ = Counter(i.answer for i in items if i.kind == kind).most_common(1)
        assert most <= {"left": 120, "above": 120, "count": 90}.get(kind, 70), kind


def test_questions_of_one_board_are_about_that_board() -> None:
    pieces, items = board.sample_board("train", 0, 7, 12)
    assert len(items) == 12
    assert {item.pieces for item in items} == {pieces}
    assert Counter(item.kind for item in items) == dict.fromkeys(board.KINDS, 2)


def test_the_picture_names_columns_and_rows_and_no_two_boards_look_alike() -> None:
    empty = np.asarray(board_render.board_to_image(()))
    assert empty.shape == (192, 192, 3)
    inked = (empty < 200).all(-1)
    for k in range(6):
        assert inked[k * FIELD : (k + 1) * FIELD, : FIELD // 3].any()
        assert inked[-FIELD // 2 :, k * FIELD : (k + 1) * FIELD].any()
    pictures = {board_render.item_to_image(item).tobytes() for item in board.sample(60, "easy")}
    assert len(pictures) == 60


def test_every_shape_is_drawn_inside_its_field_and_in_its_own_way() -> None:
    empty = np.asarray(board_render.board_to_image(()))
    drawn = set()
    for form in range(len(board.FORMS)):
        picture = board_render.board_to_image((board.Piece(2, 3, 0, form),))
        changed = (np.asarray(picture) != empty).any(-1)
        outside = changed.copy()
        outside[2 * FIELD : 3 * FIELD, 3 * FIELD : 4 * FIELD] = False
        assert changed.sum() > 80
        assert not outside.any()
        drawn.add(changed.tobytes())
    assert len(drawn) == len(board.FORMS)
    assert isinstance(picture, Image.Image)


def test_a_question_about_what_is_not_there_is_refused() -> None:
    pieces = (board.Piece(0, 0, 0, 0),)
    with pytest.raises(DareInputError, match="red circle at A1"):
        _ = board.BoardItem(pieces, "where", ("blue star",)).response
    with pytest.raises(DareInputError, match="C3"):
        _ = board.BoardItem(pieces, "colour", ("C3",)).response


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DareInputError, match="easy"):
        board.sample(1, "middling")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("response", "answer"),
    [("B2, D5, so yes", "yes"), ("none, so 0.", "0"), ("red circle", "red circle"), ("B3.", "B3")],
)
def test_the_answer_is_what_follows_the_steps(response: str, answer: str) -> None:
    assert board.final(response) == answer
