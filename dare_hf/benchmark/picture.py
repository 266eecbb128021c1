"""A picture of a series: time or memory against what its rows differ in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.benchmark.runner import axis
from dare_hf.visualize import figure_and_canvas

if TYPE_CHECKING:
    from pathlib import Path

_HEIGHTS = (("seconds", 1e3, "milliseconds"), ("peak_bytes", 2.0**-20, "peak MiB"))


def draw(result: dict[str, Any], file: Path) -> None:
    """A line for each system, with the spread of its rounds.

    Args:
        result: What `bench` returned.
        file: Where to; its ending says the format.

    Raises:
        DareStateError: matplotlib is not installed.
    """
    kind, canvas = figure_and_canvas()
    figure = kind(figsize=(6.4, 4.0), layout="constrained")
    canvas(figure)
    axes, rows = figure.subplots(), result["rows"]
    across = axis(rows)
    name, unit, label = next(one for one in _HEIGHTS if one[0] in rows[0])
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        places = [row[across] for row in own]
        axes.plot(places, [unit * row[name] for row in own], marker="o", label=system)
        if f"{name}_range" in own[0]:
            low, high = zip(*(row[f"{name}_range"] for row in own), strict=True)
            low, high = ([unit * value for value in end] for end in (low, high))
            axes.fill_between(places, low, high, alpha=0.15)
    axes.set(xlabel=across, ylabel=label, ylim=(0, None))
    axes.set_title(f"{result['bench']}, {result['hardware']}, {result['dtype']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(file)
