"""The picture: what is held is read from the cache as it is, and drawn where it belongs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dare_hf.visualize import (
    LayerGroup,
    _dimmed,
    held_patches,
    layer_groups,
    plot_retention,
    stored_columns,
)


@pytest.mark.parametrize(
    ("layers", "cuts"), [(12, (0, 4, 8, 12)), (7, (0, 3, 5, 7)), (2, (0, 1, 2)), (1, (0, 1))]
)
def test_groups_are_the_stages_of_the_safe_schedule(layers: int, cuts: tuple[int, ...]) -> None:
    groups = layer_groups(layers)
    assert (*(group.first for group in groups), groups[-1].stop) == cuts


def test_held_patches_reads_positions_and_ignores_holes() -> None:
    layers = [
        SimpleNamespace(positions=lambda: torch.tensor([[9, 9, 9], [-1, 4, 6]])),
        SimpleNamespace(positions=lambda: torch.tensor([[9, 9, 9], [3, 5, 8]])),
    ]
    stored = stored_columns(SimpleNamespace(stored=layers), row=1)
    held = held_patches(stored, [range(3, 7), range(7, 11)], grid=(2, 2))
    assert held.tolist() == [
        [[[False, True], [False, True]], [[False, False], [False, False]]],
        [[[True, False], [True, False]], [[False, True], [False, False]]],
    ]


def test_a_held_patch_is_clear_and_a_pruned_one_faded() -> None:
    image = Image.new("RGB", (4, 4), (200, 0, 0))
    pixels = _dimmed(image, np.array([[1.0, 0.0], [0.5, 1.0]]))
    assert (pixels[:2, :2] == (200, 0, 0)).all()
    assert (pixels[2:, 2:] == (200, 0, 0)).all()
    assert pixels[0, 3, 2] > pixels[3, 0, 2] > 0, "blue grows as the share falls"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_figure_is_drawn_without_overlap(count: int, tmp_path: Path) -> None:
    images = [Image.new("RGB", (56, 56), (40 * k, 90, 90)) for k in range(count)]
    held = [np.ones((6, hop + 1, 7, 7), dtype=bool) for hop in range(count)]
    held[-1][4:, :, :3] = False
    figure = plot_retention(images, held, title="A title that is not short")
    figure.savefig(tmp_path / "picture.png", dpi=60)
    assert (tmp_path / "picture.png").stat().st_size > 1000
    renderer = figure.canvas.get_renderer()
    axes = [axes for part in figure.subfigs for axes in part.axes]
    assert len(axes) == count + 3
    assert axes[-1].get_title().replace("\n", ": ") == "late layers 4-5: 57% held at the end"
    boxes = [axis.get_tightbbox(renderer).shrunk(0.98, 0.98) for axis in axes]
    clashes = [(a, b) for a in range(len(boxes)) for b in range(a) if boxes[a].overlaps(boxes[b])]
    assert not clashes, f"axes {clashes} overlap in a figure of {count} images"


def test_groups_and_names_of_ones_own() -> None:
    images = [Image.new("RGB", (8, 8))] * 2
    held = [np.ones((3, 2, 2, 2), dtype=bool)]
    groups = [LayerGroup("layer 2", 2, 3)]
    figure = plot_retention(images, held, groups=groups, hops=["end"], captions=["a", "b"])
    panel = figure.subfigs[1].axes[0]
    assert panel.get_title().startswith("layer 2\n100%")
    assert [label.get_text() for label in panel.get_xticklabels()] == ["end"]
