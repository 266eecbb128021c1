"""dare-tiny-anole: mazes, each step a text and a drawn picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.demo.runner import Runner
from dare_hf.tasks import maze, mvot, render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

_PICTURE_STEPS = 4  # enough hops to see the cache thin out, few enough to read


class Anole(Runner):
    """The end of a drawn image ends a hop."""

    folder, items, detail = "dare-tiny-anole", "mazes", "images drawn right"

    @staticmethod
    def delimiter(processor: Any) -> int:
        """End of image."""
        return processor.image_end_token_id

    @staticmethod
    def sample(n: int, split: Any, seed: int) -> list[maze.MazeItem]:
        """Mazes of a split."""
        return maze.sample(n, split, seed)

    def solve(self, items: Sequence[maze.MazeItem], **options: Any) -> list[mvot.Solution]:
        """`mvot.solve`."""
        return mvot.solve(self.model, self.processor, items, **options)

    def score(self, solutions: Sequence[mvot.Solution]) -> mvot.Score:
        """`mvot.score`."""
        return mvot.score(solutions)

    def detail_share(self, score: mvot.Score) -> float:
        """Share of images with every cell right."""
        return score.images_right

    def picture(self, items: Sequence[maze.MazeItem]) -> maze.MazeItem:
        """The first with a readable number of steps."""
        return min(items, key=lambda item: abs(len(item.actions) - _PICTURE_STEPS))

    def thoughts(self, item: maze.MazeItem, solution: mvot.Solution) -> list[tuple[str, Image]]:
        """The maze, then what was drawn after each action."""
        drawn = [("the maze", render.grid_to_image(item.grid(item.start)))]
        for step, image in enumerate(solution.images):
            known = step < len(item.actions)
            drawn.append((item.step_text(step) if known else f"thought {step + 1}", image))
        return drawn

    def image_columns(self, ids: Sequence[int]) -> list[range]:
        """`image_length` tokens after each begin-of-image."""
        return columns_after(ids, self.processor.image_start_token_id, self.image_length)

    @property
    def image_length(self) -> int:
        """Tokens of an image."""
        return self.processor.image_seq_length


def columns_after(ids: Sequence[int], begin_id: int, length: int) -> list[range]:
    """Columns of each whole image: `length` tokens after each `begin_id`."""
    begins = (column + 1 for column, token in enumerate(ids) if token == begin_id)
    return [range(first, first + length) for first in begins if first + length <= len(ids)]
