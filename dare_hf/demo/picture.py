"""The demo's picture: a maze, its visual thoughts, and what the cache holds of them at each hop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from dare_hf import DareCache, DareConfig, apply_dare, remove_dare
from dare_hf.demo.embedded import demo_config
from dare_hf.tasks import maze, mvot, render
from dare_hf.visualize import held_patches, plot_retention, stored_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor
    from transformers import ChameleonForConditionalGeneration

PICTURE = "retention.png"
_PICTURE_STEPS = 4  # enough hops to see the cache thin out, few enough to read


class _HopWatch(BaseStreamer):
    """Notes what the cache of a batch of one holds in the first forward of each hop.

    transformers hands over each sampled token after the forward it came from.
    """

    def __init__(self, cache: DareCache, end_id: int) -> None:
        self.cache, self.end_id = cache, end_id
        self.sampled: list[int] | None = None
        self.states: list[tuple[int, list[np.ndarray]]] = []

    def put(self, value: Tensor) -> None:
        """Receives the prompt, then one token at a time."""
        if self.sampled is None:
            self.sampled = []
            return
        self.sampled.append(int(value))
        # The newest token is not processed yet, the one before it opened the hop.
        begins = len(self.sampled) == 1 or self.sampled[-3:-2] == [self.end_id]
        if begins:
            self.states.append((self.cache.get_seq_length(), stored_columns(self.cache, 0)))

    def end(self) -> None:
        """Nothing is held back."""


def draw(
    model: ChameleonForConditionalGeneration,
    processor: Any,
    items: Sequence[maze.MazeItem],
    config: DareConfig | None = None,
) -> Figure:
    """Solves one of the items with DARE and draws what the cache held at each hop.

    Args:
        model: A model without DARE; it is left so.
        processor: Its processor.
        items: The first with a readable number of steps is taken.
        config: Default: `demo_config`.
    """
    item = min(items, key=lambda item: abs(len(item.actions) - _PICTURE_STEPS))
    cache, batches = DareCache(), []
    watch = _HopWatch(cache, processor.image_end_token_id)
    apply_dare(model, demo_config(processor) if config is None else config)
    try:
        solution = mvot.solve(
            model,
            processor,
            [item],
            on_batch=batches.append,
            past_key_values=cache,
            streamer=watch,
        )[0]
    finally:
        remove_dare(model)
    ids = [*batches[0].inputs["input_ids"][0].tolist(), *solution.ids]
    columns = _image_columns(ids, processor.image_start_token_id, processor.image_seq_length)
    held = [
        held_patches(stored, [span for span in columns if span.stop <= seen], _grid(processor))
        for seen, stored in watch.states
    ]
    images = [render.grid_to_image(item.grid(item.start)), *solution.images]
    captions = ["the maze", *(f"thought {k}" for k in range(1, len(images)))]
    for step in range(min(len(item.actions), len(solution.images))):
        captions[step + 1] = item.step_text(step)
    verdict = f"answers {solution.answer}, right is {item.answer}"
    title = f"A held-out maze, solved with DARE: {verdict}"
    return plot_retention(images, held, captions=captions, title=title)


def _grid(processor: Any) -> tuple[int, int]:
    side = round(processor.image_seq_length**0.5)
    return side, side


def _image_columns(ids: Sequence[int], begin_id: int, length: int) -> list[range]:
    """Columns of each whole image: `length` tokens after each begin-of-image."""
    begins = (column + 1 for column, token in enumerate(ids) if token == begin_id)
    return [range(first, first + length) for first in begins if first + length <= len(ids)]
