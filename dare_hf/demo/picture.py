"""The demo's picture: an item, its thoughts, and what the cache holds of them at each hop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from dare_hf import DareCache
from dare_hf.cache.hop_counters import counters_of
from dare_hf.compat import CACHE
from dare_hf.visualize import held_patches, plot_retention, stored_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from dare_hf.demo.runner import Runner
    from dare_hf.evaluation.arm import Arm

PICTURE = "retention.png"


class HopWatch(BaseStreamer):
    """Notes what the cache of a batch of one holds when each hop begins.

    transformers hands over the prompt, then each sampled token after the forward it came from; a
    hop loop hands over injected columns [1, n] after their forward, which is the first of its hop.

    Args:
        cache: The cache of the run.
    """

    def __init__(self, cache: DareCache) -> None:
        self.cache = cache
        self.hop: int | None = None
        self.prompted = False
        self.states: list[tuple[int, list[np.ndarray]]] = []

    def put(self, value: Tensor) -> None:
        """Receives the prompt, then one token at a time, or a block of injected ones."""
        if not self.prompted:
            self.prompted = True
            return
        # The hop whose begin the cache was last thinned for. The prompt is hop 0, and hop 1 begins
        # with it: nothing was added between them.
        hop = max(counters_of(self.cache).compacted[0], 1)
        if hop != self.hop:
            self.hop = hop
            self.states.append((self.cache.get_seq_length(), stored_columns(self.cache, 0)))

    def end(self) -> None:
        """Nothing is held back."""


def draw(runner: Runner, items: Sequence[Any], arm: Arm) -> Figure:
    """Solves one of the items with DARE and draws what the cache held at each hop.

    Args:
        runner: An embedded model without DARE; it stays so.
        items: The runner chooses one that shows something.
        arm: It prunes, and a hop of it ends with each thought.
    """
    item = runner.picture(items)
    cache, batches = DareCache(), []
    watch = HopWatch(cache)
    solution = runner.with_arm(arm).solve(
        [item], on_batch=batches.append, streamer=watch, **{CACHE: cache}
    )[0]
    ids = [*batches[0].inputs["input_ids"][0].tolist(), *solution.ids]
    columns = runner.image_columns(ids)
    held = [
        held_patches(stored, [span for span in columns if span.stop <= seen], runner.grid)
        for seen, stored in watch.states
    ]
    captions, images = zip(*runner.thoughts(item, solution), strict=True)
    verdict = f"answers {solution.answer}, right is {item.answer}"
    title = (
        f"One of the held-out {runner.items}, solved with DARE: {verdict}{runner.question(item)}"
    )
    return plot_retention(images, held, captions=captions, title=title)
