"""SCENE items: labels by an independent replay, splits disjoint by layout, marks that vanish."""

import re

import numpy as np
import pytest
from PIL import Image

from dare_hf.errors import DareInputError
from dare_hf.tasks import scene, scene_render

ITEMS = [*scene.sample(80, "easy"), *scene.sample(80, "train"), *scene.sample(40, "hard")]
TILE = scene_render.TILE


@pytest.mark.parametrize("split", ["train", "easy", "hard"])
def test_an_item_depends_on_seed_split_and_index_only(split: scene.Split) -> None:
    assert scene.sample(5, split, seed=3)[4] == scene.sample(1, split, seed=3, first=4)[0]
    assert scene.sample(5, split, seed=3) != scene.sample(5, split, seed=4)


def _walk_back(item: scene.SceneItem) -> list[tuple[int, int]]:
    """Cells of the path, read off the question by distances rather than by steps."""
    words = item.prompt.removeprefix("Which mark is on ").removesuffix("? <image>")
    *relations, named = words.split("the shape ") if "the shape" in words else [words]
    if relations:
        relations = [*relations[1:], named.split(" the ")[0]]
        named = named.split(" the ", 1)[1]
    colour, form = named.removeprefix("the ").split()
    drawn = {(s.row, s.column): (scene.COLOURS[s.colour], scene.FORMS[s.form]) for s in item.shapes}
    (here,) = [cell for cell, kind in drawn.items() if kind == (colour, form)]
    cells = [here]
    for relation in reversed(relations):
        row, column = cells[-1]
        distances = {
            "left of": {column - c: (r, c) for r, c in drawn if r == row and c < column},
            "right of": {c - column: (r, c) for r, c in drawn if r == row and c > column},
            "above": {row - r: (r, c) for r, c in drawn if c == column and r < row},
            "below": {r - row: (r, c) for r, c in drawn if c == column and r > row},
        }[relation.strip()]
        cells.append(distances[min(distances)])
    return cells


def _mark_at(picture: np.ndarray, cell: tuple[int, int]) -> str:
    """The mark in a cell of a picture, by its inked pixels."""
    top, left = cell[0] * TILE, cell[1] * TILE
    ink = (picture[top : top + TILE, left : left + TILE] == 0).all(-1)
    rows, columns = np.nonzero(ink)
    part = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if (part == part[:1]).all():
        return "A"
    if (part == part[:, :1]).all():
        return "B"
    return "C" if ink[rows, columns].all() and (part[1:, :-1] == part[:-1, 1:]).all() else "D"


def test_the_label_is_what_the_question_leads_to_in_the_picture() -> None:
    for item in ITEMS:
        cells = _walk_back(item)
        assert cells == [(s.row, s.column) for s in item.path()], item.prompt
        picture = np.asarray(scene_render.scene_to_image(item))
        assert _mark_at(picture, cells[-1]) == item.answer, item.prompt


def test_paths_never_return_and_looks_end_on_the_answer() -> None:
    lengths = {len(item.relations) for item in ITEMS}
    assert lengths == {0, 1, 2}
    for item in ITEMS:
        path = item.path()
        assert len(set(path)) == len(path) == len(item.relations) + 1
        assert item.looks() == (path[1:] if item.relations else path)


def test_splits_have_their_sizes() -> None:
    assert all(4 <= len(i.shapes) <= 5 and len(i.relations) < 2 for i in ITEMS[:80])
    assert all(3 <= len(i.shapes) <= 5 for i in ITEMS[80:160])
    assert all(len(i.shapes) == 6 and i.relations for i in ITEMS[160:])
    for item in ITEMS:
        cells = [(s.row, s.column) for s in item.shapes]
        assert cells == sorted(set(cells))
        assert len({s.colour for s in item.shapes}) == len(item.shapes)


def test_held_out_scenes_share_no_layout_with_training() -> None:
    for split in ("easy", "hard"):
        assert all(scene.is_held_out(i.shapes) for i in scene.sample(50, split, seed=9))
    assert not any(scene.is_held_out(i.shapes) for i in scene.sample(200, "train", seed=9))


def test_marks_do_not_decide_the_side() -> None:
    for item in ITEMS[:20]:
        other = tuple(
            scene.Shape(s.row, s.column, s.colour, s.form, (s.mark + 1) % 4) for s in item.shapes
        )
        assert scene.is_held_out(other) == scene.is_held_out(item.shapes)


def test_answers_are_balanced() -> None:
    counts = np.bincount([scene.MARKS.index(i.answer) for i in scene.sample(400, "easy")])
    # Four binomial counts of 400 trials: five standard deviations are 43.
    assert abs(counts - 100).max() < 43


@pytest.mark.parametrize("call", [{"n": 1, "split": "medium"}, {"n": -1}, {"n": 1, "first": -1}])
def test_bad_arguments_are_refused(call: dict) -> None:
    with pytest.raises(DareInputError):
        scene.sample(**call)


def test_a_relation_to_nowhere_is_refused() -> None:
    shapes = (scene.Shape(0, 0, 0, 0, 0), scene.Shape(2, 2, 1, 1, 1))
    broken = scene.SceneItem(shapes, 0, ("left of",))
    with pytest.raises(DareInputError, match="left of the red circle"):
        broken.path()


def test_a_box_is_written_in_shares_of_the_picture() -> None:
    shape = scene.Shape(2, 1, 0, 0, 0)
    assert shape.box == (0.25, 0.5, 0.5, 0.75)
    text = scene.box_text(shape.box)
    assert text == "<coor> 0.250,0.500,0.500,0.750</coor>"
    assert re.fullmatch(r"<coor> (\d\.\d{3},){3}\d\.\d{3}</coor>", text)


def test_marks_ink_half_of_each_block_and_lie_within_every_form() -> None:
    ink = (scene_render.tiles() == 0).all(-1)
    blocks = ink.reshape(*ink.shape[:3], 16, 4, 16, 4).sum((4, 6))
    assert set(np.unique(blocks)) == {0, 8}
    assert (blocks == blocks[:1, :1, :1]).all()
    marks = ink[0, 0]
    assert all((marks[a] != marks[b]).any() for a in range(4) for b in range(a))
    ground = (scene_render.tiles() == 240).all(-1)
    for form in range(len(scene.FORMS)):
        around = np.zeros((TILE, TILE), dtype=bool)
        around[27:49, 19:45] = True  # the hatched part and one pixel more
        assert not (ground[0, form, 0] & around).any(), scene.FORMS[form]


def test_nothing_of_a_mark_is_left_when_the_picture_is_shrunken() -> None:
    for item in ITEMS[:20]:
        small = []
        for mark in range(len(scene.MARKS)):
            shapes = tuple(
                scene.Shape(s.row, s.column, s.colour, s.form, mark) for s in item.shapes
            )
            picture = Image.fromarray(scene_render.scene_to_array(shapes))
            small.append(np.asarray(picture.resize((64, 64), Image.Resampling.BOX)))
        assert all((other == small[0]).all() for other in small[1:])


def test_all_drawn_shapes_look_different_at_both_sizes() -> None:
    table = scene_render.tiles()
    assert len(np.unique(table.reshape(96, -1), axis=0)) == 96
    small = table[:, :, 0].reshape(24, 16, 4, 16, 4, 3).mean((2, 4))
    assert len(np.unique(small.reshape(24, -1), axis=0)) == 24
