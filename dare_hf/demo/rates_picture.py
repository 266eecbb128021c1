"""The demo's second picture: what each layer held of text and vision when each hop began."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dare_hf.evaluation.costs import Retention

PICTURE = "retention_by_hop.png"
_SHADES = "viridis"


def draw_rates(retention: Retention, title: str) -> Figure:
    """A panel for each modality: layers down, hops across, the mean share held in each cell.

    Args:
        retention: `[hop][layer][modality]`, at least one hop.
        title: A line above the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hops, layers = len(retention), len(retention[0])
    figure = Figure(figsize=(2.4 + 1.1 * hops, 1.6 + 0.28 * layers), layout="constrained")
    FigureCanvasAgg(figure)
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
