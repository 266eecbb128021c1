"""One item solved with DARE: the report, and its pictures with what the cache held of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dare_hf import DareCache, last_report
from dare_hf.compat import CACHE
from dare_hf.visualize import HopWatch, SeenImage, plot_retention, seen_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from dare_hf.demo.runner import Runner
    from dare_hf.evaluation.arm import Arm
    from dare_hf.report import DareReport

PICTURE, RATES_PICTURE = "retention.png", "retention_by_hop.png"


@dataclass(frozen=True)
class Solved:
    """An item as DARE solved it.

    Attributes:
        title: What was solved, and how it ended.
        text: What the model said.
        report: Of the generate call.
        images: The question's picture, then each visual thought.
    """

    title: str
    text: str
    report: DareReport
    images: tuple[SeenImage, ...]


def solve_one(runner: Runner, items: Sequence[Any], arm: Arm) -> Solved:
    """Solve one of the items with DARE and note what the cache held at each hop.

    Args:
        runner: An embedded model without DARE; it stays so.
        items: The runner chooses one that shows something.
        arm: It prunes, and a hop of it ends with each thought.
    """
    item = runner.picture(items)
    cache, batches = DareCache(), []
    watch = HopWatch(cache)
    armed = runner.with_arm(arm)
    options = {"on_batch": batches.append, "streamer": watch, CACHE: cache}
    solution = armed.solve([item], **options)[0]
    ids = [*batches[0].inputs["input_ids"][0].tolist(), *solution.ids]
    # A thought for which no tokens were left is no image of the sequence.
    thoughts = zip(runner.thoughts(item, solution), runner.image_columns(ids), strict=False)
    images = tuple(
        seen_image(image, caption, columns, runner.grid, watch.states)
        for (caption, image), columns in thoughts
    )
    verdict = f"answers {solution.answer}, right is {item.answer}"
    title = (
        f"One of the held-out {runner.items}, solved with DARE: {verdict}{runner.question(item)}"
    )
    return Solved(title, solution.text, last_report(armed.model), images)


def draw(images: Sequence[SeenImage], title: str) -> Figure:
    """What each group of layers held of the pictures at each hop.

    Args:
        images: In the order they came, of equal grids.
        title: A line above the figure.
    """
    hops = sorted({hop for seen in images for hop in seen.held})
    held = [np.stack([s.held[hop] for s in images if hop in s.held], axis=1) for hop in hops]
    return plot_retention(
        [seen.image for seen in images],
        held,
        captions=[seen.caption for seen in images],
        hops=[f"hop {hop}" for hop in hops],
        title=title,
    )
