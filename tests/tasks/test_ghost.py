"""Ghost letters: the answer hangs on the first image and one late image, and on nothing else."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dare_hf.errors import DareInputError
from dare_hf.tasks import ghost, maze, render

EASY = ghost.sample(600, "easy", seed=4)
ITEMS = [*EASY[:80], *ghost.sample(60, "hard"), *ghost.sample(60, "train")]
# Five standard deviations of a count of one in four in 600 trials.
FAR = 5 * (600 * 0.25 * 0.75) ** 0.5


def test_exactly_one_image_shows_the_point_on_a_letters_cell() -> None:
    for item in ITEMS:
        where = [k for k, cell in enumerate(item.points, 1) if cell in item.letters]
        assert where == [item.visit]
        assert item.letters[maze.LETTERS.index(item.answer)] == item.points[item.visit - 1]


def test_the_visit_is_late_but_never_the_last_image() -> None:
    for item in [*EASY, *ghost.sample(200, "hard")]:
        count = len(item.points)
        assert count // 2 + 1 <= item.visit <= count - 1
    assert {(len(i.points), i.visit) for i in EASY} == {(3, 2), (4, 3), (5, 3), (5, 4)}
    for item in ghost.sample(100, "train"):
        assert item.visit < len(item.points)


def test_only_the_first_image_has_letters_and_only_the_others_the_point() -> None:
    for item in ITEMS[::5]:
        first, *others = item.grids()
        kinds = (first[first > 0] - 1) % 10
        assert sorted(kinds // 2)[-4:] == [1, 2, 3, 4]
        assert not (kinds % 2).any()
        for grid in others:
            kinds = (grid[grid > 0] - 1) % 10
            assert not (kinds // 2).any()
            assert (kinds % 2).sum() == 1
        walls = [np.where(grid > 0, (grid - 1) // 10, -1) for grid in item.grids()]
        assert all((grid == walls[0]).all() for grid in walls)


def test_every_image_but_the_visit_could_go_with_every_answer() -> None:
    """Swap the visited letter: nothing else changes, so nothing else can tell the answer."""
    for item in ITEMS[::5]:
        answers = set()
        for letter in item.letters:
            points = list(item.points)
            points[item.visit - 1] = letter
            other = replace(item, points=tuple(points))
            answers.add(other.answer)
            assert other.prompt == item.prompt
            same = [k for k in range(len(points) + 1) if k != item.visit]
            assert (other.grids()[same] == item.grids()[same]).all()
        assert answers == set("ABCD")


def test_what_markov_sees_is_drawn_independently_of_the_answer() -> None:
    """Counts of the answer given the last point's place, number of images, visit and size."""
    counts = Counter(item.answer for item in EASY)
    assert all(abs(counts[letter] - 150) < FAR for letter in "ABCD")
    for see in (
        lambda item: len(item.points),
        lambda item: item.visit,
        lambda item: item.size,
        lambda item: item.points[-1][0] % 2,
        lambda item: item.points[-1][1] % 2,
        lambda item: _nearest_letter(item, item.points[-1]),
        lambda item: _nearest_letter(item, item.points[0]),
    ):
        for value in {see(item) for item in EASY}:
            some = [item.answer for item in EASY if see(item) == value]
            spread = 5 * (len(some) * 0.25 * 0.75) ** 0.5
            for letter in "ABCD":
                assert abs(some.count(letter) - len(some) / 4) < spread, (value, letter)


def _nearest_letter(item: ghost.GhostItem, cell: maze.Cell) -> str:
    far = [abs(r - cell[0]) + abs(c - cell[1]) for r, c in item.letters]
    return maze.LETTERS[far.index(min(far))]


@pytest.mark.parametrize("split", ["train", "easy", "hard"])
def test_an_item_depends_on_seed_split_and_index_only(split: maze.Split) -> None:
    one = ghost.sample(5, split, seed=3)
    assert one[4] == ghost.sample(1, split, seed=3, first=4)[0]
    assert one != ghost.sample(5, split, seed=4)


def test_held_out_mazes_share_no_walls_with_training() -> None:
    assert all(maze.is_held_out(item.walls) for item in EASY[:50])
    assert not any(maze.is_held_out(item.walls) for item in ghost.sample(100, "train", seed=9))


def test_a_picture_shows_exactly_its_state() -> None:
    for item in ITEMS[::20]:
        for grid in item.grids():
            assert (render.image_to_grid(render.grid_to_image(grid)) == grid).all()


def test_items_without_one_visit_have_no_answer() -> None:
    item = EASY[0]
    for points in ((item.letters[0], item.letters[1]), (item.points[-1],)):
        with pytest.raises(DareInputError, match="exactly one"):
            _ = replace(item, points=points).answer


@pytest.mark.parametrize("call", [{"n": 1, "split": "medium"}, {"n": -1}, {"n": 1, "first": -1}])
def test_bad_arguments_are_refused(call: dict) -> None:
    with pytest.raises(DareInputError):
        ghost.sample(**call)
