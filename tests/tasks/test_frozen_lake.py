"""FrozenLake items: answers by replay, maps disjoint and solvable, pictures that show the state."""

from collections import Counter

import numpy as np
import pytest

from dare_hf.errors import DareInputError
from dare_hf.tasks import frozen_lake, maze, render

ITEMS = [
    *frozen_lake.sample(120, "easy"),
    *frozen_lake.sample(60, "train"),
    *frozen_lake.sample(40, "hard"),
]


def by_hand(item: frozen_lake.FrozenLakeItem) -> str:
    """The answer, replayed from the rules alone."""
    steps = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    row, column = item.start
    for action in item.actions:
        if (row, column) in item.holes:
            return "B"
        row, column = row + steps[action][0], column + steps[action][1]
        assert 0 <= row < item.size
        assert 0 <= column < item.size
    if (row, column) in item.holes:
        return "B"
    return "A" if (row, column) == item.gift else "C"


def test_the_answer_is_the_replay() -> None:
    assert {item.answer for item in ITEMS} == set("ABC")
    for item in ITEMS:
        assert item.answer == by_hand(item)


def test_a_fall_changes_nothing_afterwards() -> None:
    falls = [i for i in ITEMS if i.answer == "B" and i.path()[-2] == i.path()[-1]]
    assert falls, "no fall before the last action"
    for item in falls:
        path = item.path()
        first = next(k for k, cell in enumerate(path) if cell in item.holes)
        assert len(path) == len(item.actions) + 1
        assert set(path[first:]) == {path[first]}
        states = item.grids()
        assert (states[first:] == states[first]).all()


def test_the_gift_can_be_reached_and_no_class_is_given_away_by_the_start() -> None:
    for item in ITEMS:
        assert item.start not in item.holes
        assert item.start != item.gift
        assert item.gift not in item.holes
        seen, edge = {item.start}, [item.start]
        while edge:
            row, column = edge.pop()
            for there in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                inside = all(0 <= place < item.size for place in there)
                if inside and there not in seen and there not in item.holes:
                    seen.add(there)
                    edge.append(there)
        assert item.gift in seen


@pytest.mark.parametrize("split", ["train", "easy", "hard"])
def test_an_item_depends_on_seed_split_and_index_only(split: maze.Split) -> None:
    one = frozen_lake.sample(5, split, seed=3)
    assert one[4] == frozen_lake.sample(1, split, seed=3, first=4)[0]
    assert one != frozen_lake.sample(5, split, seed=4)


def test_each_answer_is_about_a_third_for_every_number_of_actions() -> None:
    items = frozen_lake.sample(900, "easy", seed=1)
    counts = Counter(item.answer for item in items)
    # Three binomial counts of 900 trials: five standard deviations are 71.
    assert all(abs(counts[answer] - 300) < 71 for answer in "ABC")
    for length in range(1, 7):
        some = [item.answer for item in items if len(item.actions) == length]
        # About 150 trials each: five standard deviations of a share are 0.19.
        assert all(abs(some.count(answer) / len(some) - 1 / 3) < 0.2 for answer in "ABC")


def test_held_out_maps_are_not_trained_on() -> None:
    def held_out(item: frozen_lake.FrozenLakeItem) -> bool:
        return frozen_lake.is_held_out(item.size, item.holes, item.gift)

    assert all(map(held_out, frozen_lake.sample(50, "easy", seed=9)))
    assert all(map(held_out, frozen_lake.sample(50, "hard", seed=9)))
    assert not any(map(held_out, frozen_lake.sample(200, "train", seed=9)))


def test_a_picture_shows_exactly_its_state() -> None:
    for item in ITEMS[::7]:
        for grid in item.grids():
            assert (render.image_to_grid(render.grid_to_image(grid)) == grid).all()


def test_its_tiles_occur_in_no_maze() -> None:
    tiles = {frozen_lake.tile(ground, agent) for ground in range(3) for agent in (False, True)}
    assert len(tiles) == 6
    drawn = {int(kind) for item in ITEMS for kind in np.unique(item.grids())}
    assert drawn == tiles | {maze.OUTSIDE}
    mazes = [*maze.sample(100, "easy"), *maze.sample(50, "hard")]
    assert not tiles & {int(kind) for item in mazes for kind in np.unique(item.grids())}


def test_an_action_off_the_map_is_refused() -> None:
    item = frozen_lake.FrozenLakeItem(3, (), (0, 0), (0, 0), (2, 2), ("down",))
    with pytest.raises(DareInputError, match="stay on the map"):
        item.path()


@pytest.mark.parametrize("call", [{"n": 1, "split": "medium"}, {"n": -1}, {"n": 1, "first": -1}])
def test_bad_arguments_are_refused(call: dict) -> None:
    with pytest.raises(DareInputError):
        frozen_lake.sample(**call)
