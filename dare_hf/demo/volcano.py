"""dare-tiny-volcano: scenes, looked at again in the boxes that the model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from dare_hf.demo.cost import ReportedCost
from dare_hf.demo.runner import Runner
from dare_hf.generation import crop_pixels
from dare_hf.tasks import scene, scene_render, vocot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.demo.cost import Cost
    from dare_hf.tasks.mvot import BatchOutput


class Volcano(Runner):
    """The end of a box ends a hop, and the crop opens the next."""

    folder, items, detail = "dare-tiny-volcano", "scenes", "boxes right"
    plain_note = "the full side runs the same hop loop, with DARE that keeps everything"

    @staticmethod
    def delimiter(processor: Any) -> int:
        """End of box."""
        return vocot.delimiter_id(processor)

    @staticmethod
    def sample(n: int, split: Any, seed: int) -> list[scene.SceneItem]:
        """Scenes of a split."""
        return scene.sample(n, split, seed)

    def solve(self, items: Sequence[scene.SceneItem], **options: Any) -> list[vocot.Solution]:
        """`vocot.solve`."""
        return vocot.solve(self.model, self.processor, items, **options)

    def score(self, solutions: Sequence[vocot.Solution]) -> vocot.Score:
        """`vocot.score`."""
        return vocot.score(solutions)

    def detail_share(self, score: vocot.Score) -> float:
        """Share of boxes that are the right cell."""
        return score.boxes_right

    def picture(self, items: Sequence[scene.SceneItem]) -> scene.SceneItem:
        """The first with the most looks."""
        return max(items, key=lambda item: len(item.looks()))

    def question(self, item: scene.SceneItem) -> str:
        """The question on a line of its own."""
        return "\n" + item.prompt.removesuffix(" <image>")

    def thoughts(
        self, item: scene.SceneItem, solution: vocot.Solution
    ) -> list[tuple[str, Image.Image]]:
        """The scene, then the crop of each box, enlarged to the scene's size."""
        picture = scene_render.scene_to_image(item)
        crops = [crop_pixels(picture, box) for box in solution.boxes if box is not None]
        looks = [crop.resize(picture.size, Image.Resampling.NEAREST) for crop in crops]
        return [("the scene", picture), *((f"look {k + 1}", look) for k, look in enumerate(looks))]

    def image_columns(self, ids: Sequence[int]) -> list[range]:
        """Every `image_length` placeholders are an image."""
        token = self.processor.image_token_id
        places = [column for column, held in enumerate(ids) if held == token]
        firsts = places[:: self.image_length]
        return [range(first, first + self.image_length) for first in firsts]

    @property
    def image_length(self) -> int:
        """Tokens of an image."""
        return self.model.config.image_seq_length

    def plain_cost(self, observe: Callable[[BatchOutput], int]) -> Cost:
        """As reported by the DARE that keeps everything and runs the loop."""
        return ReportedCost(self.model, observe)

    def sampled_columns(self, batch: BatchOutput) -> int:
        """Those that hold no crop."""
        ids = getattr(batch.outputs, "sequences", batch.outputs)[:, batch.prompt_length :]
        injected = (ids == self.processor.image_token_id).any(0)
        return int((~injected).sum())
