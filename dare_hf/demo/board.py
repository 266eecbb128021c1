"""dare-board: questions in words about a board of coloured shapes, on a pretrained text model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf import DareConfig
from dare_hf.assets.board import NAME
from dare_hf.demo.runner import Runner
from dare_hf.tasks import board, board_render, board_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image


class Board(Runner):
    """One look and one answer: no hops."""

    folder, items, detail = NAME, "questions", "answers that parse"
    threads, batch_size = None, 8
    training_free = DareConfig(vision_retention=0.4, text_retention=1.0)

    @staticmethod
    def delimiter(processor: Any) -> None:
        """Nothing ends a hop."""
        return

    @staticmethod
    def sample(n: int, split: Any, seed: int) -> list[board.BoardItem]:
        """Questions, each about a board of its own."""
        return board.sample(n, split, seed)

    def solve(self, items: Sequence[board.BoardItem], **options: Any) -> list[board_run.Solution]:
        """`board_run.solve`."""
        return board_run.solve(self.model, self.processor, items, **options)

    def score(self, solutions: Sequence[board_run.Solution]) -> board_run.Score:
        """`board_run.score`."""
        return board_run.score(solutions)

    def detail_share(self, score: board_run.Score) -> float:
        """Share of answers that are one of their kind."""
        return 1 - score.unparsed

    def picture(self, items: Sequence[board.BoardItem]) -> board.BoardItem:
        """The first with the longest response."""
        return max(items, key=lambda item: len(item.response))

    def question(self, item: board.BoardItem) -> str:
        """The question on a line of its own."""
        return "\n" + item.question

    def thoughts(
        self, item: board.BoardItem, solution: board_run.Solution
    ) -> list[tuple[str, Image]]:
        """The board."""
        return [("the board", board_render.item_to_image(item))]

    def image_columns(self, ids: Sequence[int]) -> list[range]:
        """The run of placeholders."""
        first = list(ids).index(self.processor.image_token_id)
        return [range(first, first + self.image_length)]

    @property
    def image_length(self) -> int:
        """Tokens of an image."""
        return self.model.config.image_seq_length
