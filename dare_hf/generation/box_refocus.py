"""BoxRefocus: the region a hop has named is the next visual thought (VoCoT)."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.generation.boxes import (
    WRITTEN,
    Box,
    cells,
    crop_pixels,
    parse_box,
    vocot_cells,
    written_box,
)
from dare_hf.generation.feature_grid import feature_grids
from dare_hf.generation.hop_input import placeholder_id
from dare_hf.generation.hop_types import HopInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dare_hf.generation.hop_types import HopPrompt, HopState

_FRAMES = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("boi_token_index", "eoi_token_index"),
    ("boi_token_id", "eoi_token_id"),
)

_THIN = 50


@dataclass
class RefocusCounts:
    """How many hops got what, over all calls a BoxRefocus has served.

    Attributes:
        used: Hops whose box was cut out and injected; repaired boxes are among them.
        inverted: Boxes with corners in another order, put right (a repair).
        clamped: Boxes partly outside of the picture, cut at its border (a repair).
        no_box: Hops without a pair of tags. Nothing was injected, as for all below.
        malformed: What stood between the tags was not four numbers.
        empty: Boxes without any area, or without any inside of the picture.
        thin: With "pixels", crops more than 50 times as long as wide, which processors refuse or
            enlarge beyond measure.
        no_image: Boxes in rows without a picture, or for which `image_of` chose none.
        over_limit: Boxes beyond `max_boxes` of their row.
    """

    used: int = 0
    inverted: int = 0
    clamped: int = 0
    no_box: int = 0
    malformed: int = 0
    empty: int = 0
    thin: int = 0
    no_image: int = 0
    over_limit: int = 0

    @property
    def boxes(self) -> int:
        """All boxes that were written."""
        unused = self.malformed + self.empty + self.thin + self.no_image + self.over_limit
        return self.used + unused

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))


class BoxRefocus:
    """An `on_hop` that looks again at the box a hop has written.

    A hop that ends in `<coor> x1,y1,x2,y2</coor>` opens the next hop with that region of the
    row's picture. Anything else injects nothing, is counted, and disturbs no other row.

        refocus = BoxRefocus()
        loop = HopLoop(on_hop=refocus, processor=processor)
        out = model.generate(**inputs, hop_loop=loop)        # config: hop_delimiters=["</coor>"]
        print(refocus.counts)

        refocus = BoxRefocus("pixels", images=[[scene] for scene in scenes])    # per batch

    The first form holds nothing of a batch and may serve any number of calls; the pictures of the
    second belong to the rows of one batch.

    Args:
        source: "features" cuts the box out of the image features the model saw in this call,
            which are computed once: every cell of the grid that the box touches. "pixels" cuts it
            out of `images` at full resolution; processor, tower and projector then see that part
            as a picture of its own.
        images: With "pixels": per prompt its picture or a sequence of them, as PIL images
            (num_return_sequences shares them).
        scale: The number that a box writes for the right and the lower border: 1.0 for shares
            (VoCoT, Shikra), 1000 for thousandths, (width, height) for pixels of a picture of that
            size. Boxes refer to the picture as the source has it: for "features" as the
            processor resized, padded or cropped it.
        tags: What opens and what closes a box; brackets between them mean nothing.
        image_of: Which of a row's pictures a box refers to: called with the HopState and their
            number n >= 1, returns 0 to n - 1, or None for no picture. Default: the first. Injected
            pictures are not counted.
        frame: Token ids before and after injected features; default: those that frame images in
            the model's config (Qwen, Gemma), else none. With "pixels" the processor frames them.
        max_boxes: Boxes used per row and call; None for no limit.
        region: With "features": "touched" is every cell the box touches, repaired where it has to
            be; "vocot" is what VoCoT's released code cuts out (`vocot_cells`: transposed, nothing
            repaired), for weights that were trained so, VolCano's.

    Attributes:
        counts: RefocusCounts over all calls.

    Raises:
        DareConfigError: An argument is none of these.

    Source: docs/hop-loop.md; VoCoT (arXiv:2405.16919) writes boxes like this.
    """

    def __init__(
        self,
        source: Literal["features", "pixels"] = "features",
        *,
        images: Sequence[Any] | None = None,
        scale: float | tuple[float, float] = 1.0,
        tags: tuple[str, str] = ("<coor>", "</coor>"),
        image_of: Callable[[HopState, int], int | None] | None = None,
        frame: tuple[Sequence[int], Sequence[int]] | None = None,
        max_boxes: int | None = None,
        region: Literal["touched", "vocot"] = "touched",
    ) -> None:
        if source not in ("features", "pixels"):
            raise DareConfigError(f'source: expected "features" or "pixels"; got {source!r}')
        if (images is not None) != (source == "pixels"):
            raise DareConfigError(
                'images: expected pictures for each row with source="pixels", and none with '
                f'source="features"; got source={source!r} and images={images!r:.60}'
            )
        if image_of is not None and not callable(image_of):
            raise DareConfigError(f"image_of: expected a function or None; got {image_of!r}")
        if region not in ("touched", "vocot") or (region == "vocot" and source == "pixels"):
            raise DareConfigError(
                'region: expected "touched", or with source="features" also "vocot"; got '
                f"{region!r} with source={source!r}"
            )
        self.region = region
        self.source, self.scale, self.tags = source, _scale(scale), _tags(tags)
        self.image_of, self.frame, self.max_boxes = image_of, _framing(frame), _count(max_boxes)
        self.images = None if images is None else _rows(images)
        self.counts = RefocusCounts()

    def begin(self, prompt: HopPrompt) -> Callable[[HopState], HopInput | None]:
        """The callback of one generate; HopLoop asks for it when the call begins.

        Args:
            prompt: What generate starts from.

        Raises:
            DareInputError: No tokenizer, or pictures that are not those of this batch.
            UnsupportedModelError: "features" of a model whose features are no grid.
        """
        if prompt.tokenizer is None:
            raise DareInputError(
                "BoxRefocus: expected a loop that can read the hops; got none. Make it with "
                "HopLoop(on_hop=refocus, processor=processor)"
            )
        token = placeholder_id(prompt.model.config)
        if self.images is None:
            frame = self.frame or _frame(prompt.model.config)
            grids = feature_grids(prompt, -1 if token is None else token)

            def cut(grid: Tensor, box: Box) -> HopInput | None:
                return _features(_region(grid, box, self.region), frame, token)

            return _Run(self, grids, cut)
        prompts = len(prompt.ids) // prompt.samples
        if len(self.images) != prompts:
            raise DareInputError(
                f"BoxRefocus: expected images for each of the {prompts} prompts of this call; got "
                f"{len(self.images)}. Make a BoxRefocus for each batch"
            )
        return _Run(self, self.images, _crop)


class _Run:
    """The callback of one generate.

    Args:
        refocus: Whose settings and counts are used.
        rows: Per prompt its pictures, or their feature grids.
        cut: Makes the input out of one of them and a box; None where that cannot be.
    """

    def __init__(
        self, refocus: BoxRefocus, rows: list[list[Any]], cut: Callable[[Any, Box], HopInput | None]
    ) -> None:
        self.refocus, self.rows, self.cut = refocus, rows, cut
        self.used: Counter[int] = Counter()

    def __call__(self, hop: HopState) -> HopInput | None:
        """The region the hop names, or None."""
        refocus, counts = self.refocus, self.refocus.counts
        written = written_box(hop.text or "", refocus.tags)
        if written is None:
            counts.no_box += 1
            return None
        box = parse_box(written)
        if box is None:
            counts.malformed += 1
            return None
        if refocus.max_boxes is not None and self.used[hop.row] >= refocus.max_boxes:
            counts.over_limit += 1
            return None
        picture = self._picture(hop)
        if picture is None:
            counts.no_image += 1
            return None
        vocot = refocus.region == "vocot"
        found, inverted, clamped = (_as_is if vocot else _within)(box, refocus.scale)
        answer = None if found is None else self.cut(picture, found)
        if answer is None:
            thin = found is not None and refocus.source == "pixels"
            counts.thin += thin
            counts.empty += not thin
            return None
        self.used[hop.row] += 1
        counts.used += 1
        counts.inverted += inverted
        counts.clamped += clamped
        return answer

    def _picture(self, hop: HopState) -> Any:
        pictures = self.rows[hop.prompt]
        if not pictures:
            return None
        choose = self.refocus.image_of
        number = 0 if choose is None else choose(hop, len(pictures))
        if number is None:
            return None
        if not 0 <= number < len(pictures):
            raise DareInputError(
                f"image_of: expected a picture of row {hop.row}, 0 to {len(pictures) - 1}, or "
                f"None; got {number!r}"
            )
        return pictures[number]


def _within(box: Box, scale: tuple[float, float]) -> tuple[Box | None, bool, bool]:
    """The box as shares of the picture, sorted and clamped; whether each was needed."""
    left, top, right, bottom = (n / scale[i % 2] for i, n in enumerate(box))
    inverted = left > right or top > bottom
    columns, rows = sorted((left, right)), sorted((top, bottom))
    (left, right), (top, bottom) = ([min(max(n, 0.0), 1.0) for n in p] for p in (columns, rows))
    if left >= right or top >= bottom:
        return None, inverted, False
    return (left, top, right, bottom), inverted, [left, right, top, bottom] != columns + rows


def _as_is(box: Box, scale: tuple[float, float]) -> tuple[Box | None, bool, bool]:
    """As `_within`, nothing repaired; negative numbers name no cell."""
    left, top, right, bottom = (n / scale[i % 2] for i, n in enumerate(box))
    return (left, top, right, bottom) if min(box) >= 0 else None, False, False


def _region(grid: Tensor, box: Box, kind: str) -> Tensor:
    """The cells [h, w, D] of a grid [height, width, D] that a box stands for.

    Raises:
        DareInputError: "vocot", and the grid is no square.
    """
    left, top, right, bottom = box
    height, width = grid.shape[:2]
    if kind == "touched":
        return grid[cells(top, bottom, height, WRITTEN), cells(left, right, width, WRITTEN)]
    if height != width:
        raise DareInputError(
            'BoxRefocus(region="vocot"): expected a square grid of features; got '
            f'{height} x {width}. Use region="touched"'
        )
    return grid[vocot_cells(box, height)]


def _features(
    region: Tensor, frame: tuple[Sequence[int], Sequence[int]], token: int | None
) -> HopInput | None:
    """A region [h, w, D] in its frame; None where it is empty."""
    if not region.numel():
        return None
    before, after = (list(ids) for ids in frame)
    if not (before or after):
        return HopInput(features=region)
    assert token is not None
    return HopInput(features=region, input_ids=[*before, *[token] * region[..., 0].numel(), *after])


def _crop(image: Any, box: Box) -> HopInput | None:
    crop = crop_pixels(image, box)
    return None if max(crop.size) > _THIN * min(crop.size) else HopInput(images=[crop])


def _frame(config: Any) -> tuple[list[int], list[int]]:
    """The ids that stand before and after an image's own in the model's prompts."""
    for names in _FRAMES:
        start, end = (getattr(config, name, None) for name in names)
        if start is not None and end is not None:
            return [start], [end]
    return [], []


def _rows(images: Any) -> list[list[Any]]:
    if not isinstance(images, (list, tuple)):
        raise DareConfigError(
            "images: expected a list with each row's picture or list of pictures; got "
            f"{type(images).__name__}"
        )
    return [_pictures(row) for row in images]


def _pictures(row: Any) -> list[Any]:
    pictures = list(row) if isinstance(row, (list, tuple)) else [row]
    if not all(hasattr(picture, "crop") for picture in pictures):
        kinds = sorted({type(picture).__name__ for picture in pictures})
        raise DareConfigError(f"images: expected PIL images, or sequences of them; got {kinds}")
    return pictures


def _scale(scale: Any) -> tuple[float, float]:
    both = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    if len(both) != 2 or not all(isinstance(n, (int, float)) and 0 < n < 1e9 for n in both):
        raise DareConfigError(
            "scale: expected the number of the right and lower border, > 0 (1.0, 1000), or "
            f"(width, height); got {scale!r}"
        )
    return float(both[0]), float(both[1])


def _tags(tags: Any) -> tuple[str, str]:
    pair = isinstance(tags, (tuple, list)) and len(tags) == 2
    if not pair or not all(isinstance(tag, str) and tag for tag in tags):
        raise DareConfigError(f"tags: expected (opening, closing), two strings; got {tags!r}")
    return tags[0], tags[1]


def _framing(frame: Any) -> tuple[list[int], list[int]] | None:
    if frame is None:
        return None
    try:
        before, after = ([operator.index(token) for token in part] for part in frame)
    except (TypeError, ValueError) as error:
        raise DareConfigError(
            f"frame: expected token ids (before, after), two lists; got {frame!r}"
        ) from error
    return before, after


def _count(limit: Any) -> int | None:
    whole = isinstance(limit, int) and not isinstance(limit, bool)
    if limit is not None and not (whole and limit >= 0):
        raise DareConfigError(f"max_boxes: expected a count >= 0 or None; got {limit!r}")
    return limit
