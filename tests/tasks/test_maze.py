"""MAZE items: labels by replay, splits disjoint by walls, pictures that show the state."""

import numpy as np
import pytest

from dare_hf.errors import DareInputError
from dare_hf.tasks import maze, render

ITEMS = [*maze.sample(60, "easy"), *maze.sample(60, "train"), *maze.sample(30, "hard")]


@pytest.mark.parametrize("split", ["train", "easy", "hard"])
def test_an_item_depends_on_seed_split_and_index_only(split: maze.Split) -> None:
    assert maze.sample(5, split, seed=3)[4] == maze.sample(1, split, seed=3, first=4)[0]
    assert maze.sample(5, split, seed=3) != maze.sample(5, split, seed=4)


def test_every_sequence_is_legal_and_ends_on_the_answer() -> None:
    for item in ITEMS:
        path = item.path()
        assert len(path) == len(item.actions) + 1
        assert all(0 <= cell < item.size for here in path for cell in here)
        assert path[-1] == item.letters[maze.LETTERS.index(item.answer)]
        assert path[-1] != item.start
        assert len(set(item.letters)) == 4


def test_walls_agree_from_both_sides_and_close_the_maze() -> None:
    for item in ITEMS:
        for row in range(item.size):
            for column in range(item.size):
                for name, (wall, (down, right)) in maze.MOVES.items():
                    there = (row + down, column + right)
                    closed = bool(item.walls[row][column] & wall)
                    if not all(0 <= cell < item.size for cell in there):
                        assert closed, f"open border to the {name} of {(row, column)}"
                    else:
                        back = {"up": "down", "down": "up", "left": "right", "right": "left"}
                        other = item.walls[there[0]][there[1]] & maze.MOVES[back[name]][0]
                        assert closed == bool(other)


def test_held_out_mazes_share_no_walls_with_training() -> None:
    assert all(maze.is_held_out(item.walls) for item in maze.sample(50, "easy", seed=9))
    assert all(maze.is_held_out(item.walls) for item in maze.sample(50, "hard", seed=9))
    assert not any(maze.is_held_out(item.walls) for item in maze.sample(200, "train", seed=9))


def test_answers_are_balanced() -> None:
    counts = np.bincount([maze.LETTERS.index(i.answer) for i in maze.sample(400, "easy")])
    # Four binomial counts of 400 trials: five standard deviations are 43.
    assert abs(counts - 100).max() < 43


def test_an_illegal_action_is_refused() -> None:
    item = ITEMS[0]
    row, column = item.start
    blocked = next(n for n, (wall, _) in maze.MOVES.items() if item.walls[row][column] & wall)
    broken = maze.MazeItem(item.size, item.walls, item.offset, item.letters, item.start, (blocked,))
    with pytest.raises(DareInputError, match="through a wall"):
        broken.path()


@pytest.mark.parametrize("call", [{"n": 1, "split": "medium"}, {"n": -1}, {"n": 1, "first": -1}])
def test_bad_arguments_are_refused(call: dict) -> None:
    with pytest.raises(DareInputError):
        maze.sample(**call)


def test_a_picture_shows_exactly_its_state() -> None:
    for item in ITEMS[::5]:
        for grid in item.grids():
            image = render.grid_to_image(grid)
            assert image.size == (render.IMAGE_SIZE, render.IMAGE_SIZE)
            assert (render.image_to_grid(image) == grid).all()


def test_all_drawn_cells_look_different() -> None:
    table = render.patch_table().reshape(maze.NUM_CELL_TYPES, -1)
    assert len(np.unique(table, axis=0)) == maze.NUM_CELL_TYPES


def test_a_picture_of_another_size_is_refused() -> None:
    image = render.grid_to_image(ITEMS[0].grids()[0]).resize((64, 64))
    with pytest.raises(DareInputError, match="56 x 56"):
        render.image_to_grid(image)


def test_the_prompt_numbers_its_actions() -> None:
    item = ITEMS[0]
    assert item.prompt.endswith("<image>")
    for step, action in enumerate(item.actions):
        assert f" {step + 1}. Go {action}." in item.prompt
