"""Which image patches each group of layers holds at each hop: read from a cache, and drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers.generation.streamers import BaseStreamer

from dare_hf.errors import INSTALL_CLI, DareStateError
from dare_hf.report.groups import LayerGroup, layer_groups
from dare_hf.report.page import SeenImage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor

    from dare_hf.cache import DareCache

__all__ = [
    "HopWatch",
    "LayerGroup",
    "SeenImage",
    "Watched",
    "held_patches",
    "layer_groups",
    "plot_rates",
    "plot_retention",
    "seen_image",
    "stored_columns",
]

_DIM = 0.12  # opacity of a patch that no layer of the group holds
_FADED = np.array([170.0, 196.0, 226.0])  # what pruned patches fade to; white is a maze's floor
_LEGEND = "When each hop begins. Clear: all layers of the group hold the patch; pale blue: none."
_GAP = 0.08  # between thumbnails, in thumbnails
_INCH = 0.62  # a thumbnail's side
_TOP = 1.9  # inches of title and images
_SHADES = "viridis"


class Watched(NamedTuple):
    """What a cache held when a hop began.

    Attributes:
        hop: Number of the hop, 1 for the first after the prompt.
        seen: Columns of the sequence then, pruned ones counted.
        stored: Per layer the columns whose keys and values were held, int64 [stored].
    """

    hop: int
    seen: int
    stored: list[np.ndarray]


class HopWatch(BaseStreamer):
    """Notes what the cache of a batch of one holds when each hop begins.

    Give it to generate as `streamer`, beside the cache. transformers hands over the prompt, then
    each sampled token after the forward it came from; a hop loop hands over injected columns
    [1, n] after their forward, which is the first of its hop.

    Args:
        cache: The cache of the run.

    Attributes:
        states: What was held, a `Watched` for each hop that began.
    """

    def __init__(self, cache: DareCache) -> None:
        self.cache = cache
        self.hop: int | None = None
        self.prompted = False
        self.states: list[Watched] = []

    def put(self, value: Tensor) -> None:
        """Receives the prompt, then one token at a time, or a block of injected ones."""
        if not self.prompted:
            self.prompted = True
            return
        # The hop whose begin the cache was last thinned for. The prompt is hop 0, and hop 1 begins
        # with it: nothing was added between them.
        hop = max(self.cache.hop_counters.compacted[0], 1)
        if hop != self.hop:
            self.hop = hop
            seen = self.cache.get_seq_length()
            self.states.append(Watched(hop, seen, stored_columns(self.cache, 0)))

    def end(self) -> None:
        """Nothing is held back."""


def seen_image(
    image: Image,
    caption: str,
    columns: Sequence[int],
    grid: tuple[int, int],
    states: Sequence[Watched],
) -> SeenImage:
    """A picture with what each layer held of it at each hop, for `DareReport.to_html`.

    Args:
        image: The picture.
        caption: What to call it.
        columns: Its tokens' columns in the sequence, in raster order.
        grid: Patches down and across; their product is the length of `columns`.
        states: As `HopWatch` noted them.
    """
    held = {
        state.hop: held_patches(state.stored, [columns], grid)[:, 0]
        for state in states
        if columns[-1] < state.seen
    }
    return SeenImage(image, caption, held)


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
    stored: Sequence[np.ndarray],
    image_columns: Sequence[Sequence[int]],
    grid: tuple[int, int] = (7, 7),
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

    Raises:
        DareStateError: matplotlib is not installed.
    """
    groups = layer_groups(len(held[0])) if groups is None else groups
    captions = _captions(len(images)) if captions is None else captions
    hops = [f"hop {hop + 1}" for hop in range(len(held))] if hops is None else hops
    width = max(len(groups) * (len(held) * _INCH + 0.35) + 1.1, 1.15 * len(images) + 0.5, 7.0)
    below = len(images) * _INCH + 1.2
    figure = _figure(width, _TOP + below)
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


def plot_rates(
    retention: Sequence[Sequence[Mapping[str, float | None]]], title: str = ""
) -> Figure:
    """A panel for each modality: layers down, hops across, the share held in each cell.

    Args:
        retention: `[hop][layer][modality]` as `DareReport.retention`, at least one hop.
        title: A line above the figure.

    Raises:
        DareStateError: matplotlib is not installed.

    Examples:
        >>> from dare_hf.visualize import plot_rates
        >>> layers = [{"vision": 1.0, "text": 1.0}, {"vision": 0.5, "text": 1.0}]
        >>> figure = plot_rates([layers, layers], "two layers, two hops")
    """
    hops, layers = len(retention), len(retention[0])
    figure = _figure(2.4 + 1.1 * hops, 1.6 + 0.28 * layers)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("vision", "text"), strict=True):
        shares = np.array([[layer[name] for layer in hop] for hop in retention], dtype=float).T
        shown = axes.imshow(shares, vmin=0, vmax=1, cmap=_SHADES, aspect="auto")
        axes.set(title=name, xlabel="hop that begins", xticks=range(hops))
        for (layer, hop), share in np.ndenumerate(shares):
            if not np.isnan(share):
                shade = "white" if share < 0.6 else "black"
                axes.text(hop, layer, f"{share:.0%}", ha="center", va="center", fontsize=6, c=shade)
    panels[0].set(ylabel="layer", yticks=range(layers))
    figure.colorbar(shown, ax=panels, label="share of tokens held")
    return figure


def figure_and_canvas() -> tuple[type[Figure], type]:
    """The figure of matplotlib, and the canvas that draws it without a window.

    Raises:
        DareStateError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DareStateError(
            f"figure: expected matplotlib, which draws it; got none ({error}). {INSTALL_CLI}"
        ) from error
    return Figure, FigureCanvasAgg


def _figure(width: float, height: float) -> Figure:
    """An empty figure in inches."""
    kind, canvas = figure_and_canvas()
    figure = kind(figsize=(width, height), layout="constrained")
    canvas(figure)
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
