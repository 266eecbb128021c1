"""What the demo has to know about an embedded model and its task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dare_hf.demo.cost import PlainCost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from dare_hf import DareConfig
    from dare_hf.demo.cost import Cost
    from dare_hf.evaluation.arm import Arm
    from dare_hf.tasks.mvot import BatchOutput


class Runner(ABC):
    """One embedded model at its task.

    Args:
        model: The model.
        processor: Its processor.
    """

    folder: ClassVar[str]
    """Its folder in the installed package."""
    items: ClassVar[str]
    """What it solves, in the plural."""
    detail: ClassVar[str]
    """What is scored beside answers."""
    plain_note: ClassVar[str] = ""
    """What has to be said about the side without DARE."""
    threads: ClassVar[int | None] = 1
    """Of the CPU, since threads of a small model wait for each other; None: torch's choice."""
    batch_size: ClassVar[int | None] = None
    """Rows of a generate call; None: `default_batch_size`."""
    training_free: ClassVar[DareConfig | None] = None
    """How it is pruned without training; None: by the rates shipped beside it."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def with_arm(self, arm: Arm) -> Self:
        """The same with an arm on a copy of the model."""
        return type(self)(arm.on(self.model), self.processor)

    @staticmethod
    @abstractmethod
    def delimiter(processor: Any) -> int | None:
        """The id that ends a hop, where there are hops."""

    @classmethod
    def delimiters(cls, processor: Any) -> tuple[int, ...]:
        """That id, or none: the `hop_delimiters` of a configuration."""
        end = cls.delimiter(processor)
        return () if end is None else (end,)

    @staticmethod
    @abstractmethod
    def sample(n: int, split: Any, seed: int) -> list[Any]:
        """Items of a split."""

    @abstractmethod
    def solve(self, items: Sequence[Any], **options: Any) -> list[Any]:
        """Solutions; options as `mvot.solve` takes them."""

    @abstractmethod
    def score(self, solutions: Sequence[Any]) -> Any:
        """Totals with `n`, `accuracy` and `accuracy_interval`."""

    @abstractmethod
    def detail_share(self, score: Any) -> float:
        """The share that `detail` names."""

    @abstractmethod
    def picture(self, items: Sequence[Any]) -> Any:
        """The item that is drawn."""

    @abstractmethod
    def thoughts(self, item: Any, solution: Any) -> list[tuple[str, Image]]:
        """Captions and pictures: what the question is about, then each visual thought."""

    @abstractmethod
    def image_columns(self, ids: Sequence[int]) -> list[range]:
        """The columns of each whole image of a sequence, in raster order."""

    def question(self, item: Any) -> str:
        """What is asked, where the picture has to say it."""
        return ""

    def plain_cost(self, observe: Callable[[BatchOutput], int]) -> Cost:
        """Adds up what generate calls without DARE cost."""
        return PlainCost(self.model, observe)

    def sampled_columns(self, batch: BatchOutput) -> int:
        """Columns of a generate call that were sampled."""
        ids = getattr(batch.outputs, "sequences", batch.outputs)
        return ids.shape[1] - batch.prompt_length

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, down and across."""
        side = round(self.image_length**0.5)
        return side, side

    @property
    @abstractmethod
    def image_length(self) -> int:
        """Tokens of an image."""
