"""Draws which image patches each group of layers still holds at each hop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from dare_hf.cache import DareCache

_DIM = 0.12  # opacity of a patch that no layer of the group holds
_FADED = np.array([170.0, 196.0, 226.0])  # what pruned patches fade to; white is a maze's floor
_LEGEND = "When each hop begins. Clear: all layers of the group hold the patch; pale blue: none."
_GAP = 0.08  # between thumbnails, in thumbnails
_INCH = 0.62  # a thumbnail's side
_TOP = 1.9  # inches of title and images


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive decoder layers that are drawn together.

    Attributes:
        name: What the picture calls them.
        first: First layer, 0-based.
        stop: One past the last layer.
    """

    name: str
    first: int
    stop: int

    @property
    def label(self) -> str:
        """The name with its layers: `early layers 0-3`."""
        last = self.stop - 1
        return f"{self.name} layers {self.first}-{last}" if last > self.first else self.name


def layer_groups(num_layers: int) -> tuple[LayerGroup, ...]:
    """Early, middle and late layers, cut where the schedule "safe" cuts: ceil(L/3), ceil(2L/3)."""
    cuts = (0, -(-num_layers // 3), -(-2 * num_layers // 3), num_layers)
    parts = zip(("early", "middle", "late"), cuts, cuts[1:], strict=False)
    return tuple(LayerGroup(*part) for part in parts if part[1] < part[2])


def stored_columns(cache: DareCache, row: int) -> list[np.ndarray]:
    """Per layer the columns of one row's sequence whose keys and values the cache holds now.

    Args:
        cache: The cache of a run; it is only read.
        row: 0-based row of the batch.

    Returns:
        One int64 [stored tokens] per layer.
    """
    rows = (layer.positions()[row].cpu().numpy() for layer in cache.stored)
    return [columns[columns >= 0] for columns in rows]


def held_patches(
    stored: Sequence[np.ndarray], image_columns: Sequence[range], grid: tuple[int, int] = (7, 7)
) -> np.ndarray:
    """Which patches of which image each layer holds.

    Args:
        stored: As `stored_columns` gives it.
        image_columns: The columns of each image's tokens in the sequence, in raster order.
        grid: Patches down and across; their product is the length of each range.

    Returns:
        bool [layers, images, down, across].
    """
    held = np.zeros((len(stored), len(image_columns), *grid), dtype=bool)
    for layer, columns in enumerate(stored):
        for image, wanted in enumerate(image_columns):
            held[layer, image] = np.isin(np.asarray(wanted), columns).reshape(grid)
    return held


def plot_retention(
    images: Sequence[Image],
    held: Sequence[np.ndarray],
    *,
    groups: Sequence[LayerGroup] | None = None,
    captions: Sequence[str] | None = None,
    hops: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """The images on top; below, per layer group, what is held of each of them at each hop.

    A patch is drawn as bright as the share of the group's layers that hold it.

    Args:
        images: The prompt's image, then each visual thought, all of one size.
        held: Per hop a bool [layers, images so far, down, across], as `held_patches` gives it.
        groups: Default: early, middle and late layers.
        captions: A line above each image.
        hops: A name for each entry of `held`; by default they are the begins of hops 1, 2, ...
        title: A line above the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = layer_groups(len(held[0])) if groups is None else groups
    captions = _captions(len(images)) if captions is None else captions
    hops = [f"hop {hop + 1}" for hop in range(len(held))] if hops is None else hops
    width = max(len(groups) * (len(held) * _INCH + 0.35) + 1.1, 1.15 * len(images) + 0.5, 7.0)
    below = len(images) * _INCH + 1.2
    figure = Figure(figsize=(width, _TOP + below), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[_TOP, below]))
    if title:
        figure.suptitle(title, fontsize=11)
    figure.supxlabel(_LEGEND, fontsize=8)
    for axes, image, caption in zip(
        np.atleast_1d(top.subplots(1, len(images))), images, captions, strict=True
    ):
        axes.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
        axes.set_title(caption, fontsize=8)
        axes.set_axis_off()
    panels = np.atleast_1d(bottom.subplots(1, len(groups), sharey=True))
    for axes, group in zip(panels, groups, strict=True):
        _draw_group(axes, group, images, held)
        axes.set_xticks(np.arange(len(held)) + 0.5, hops, fontsize=7)
    panels[0].set_yticks(np.arange(len(images)) + 0.5, _captions(len(images)), fontsize=8)
    return figure


def _captions(count: int) -> list[str]:
    return ["image", *(f"thought {k}" for k in range(1, count))]


def _draw_group(
    axes: Axes, group: LayerGroup, images: Sequence[Image], held: Sequence[np.ndarray]
) -> None:
    """A triangle of thumbnails: hop across, image down."""
    kept = total = 0
    for hop, state in enumerate(held):
        shares = state[group.first : group.stop].mean(axis=0)
        kept, total = float(shares.sum()), shares.size
        for row, share in enumerate(shares):
            extent = (hop + _GAP / 2, hop + 1 - _GAP / 2, row + 1 - _GAP / 2, row + _GAP / 2)
            axes.imshow(_dimmed(images[row], share), extent=extent, interpolation="nearest")
    axes.set(xlim=(0, len(held)), ylim=(len(images), 0), aspect="equal")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=1)
    axes.spines[:].set_visible(False)
    label = f"{group.label}: {kept / max(total, 1):.0%} held at the end"
    axes.set_title(label if len(held) > 3 else label.replace(": ", "\n"), fontsize=9)


def _dimmed(image: Image, share: np.ndarray) -> Any:
    """The picture with each patch as clear as its share, uint8 [height, width, 3]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    rows = np.arange(pixels.shape[0]) * share.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * share.shape[1] // pixels.shape[1]
    opacity = (_DIM + (1 - _DIM) * share[np.ix_(rows, columns)])[..., None]
    return (opacity * pixels + (1 - opacity) * _FADED).astype(np.uint8)
