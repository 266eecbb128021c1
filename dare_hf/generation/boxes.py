"""Boxes that a model writes, and what of a picture or of a grid lies in them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

WRITTEN = 0.0005
"""Half of the last of three decimals: a box written 0.333 begins at a third."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_ROUNDING = 1e-6  # of a cell: 0.3 * 10 is no more than 3


def written_box(text: str, tags: tuple[str, str]) -> str | None:
    """What stands between the last pair of tags; None without one.

    Args:
        text: The text of a hop.
        tags: What opens and what closes a box.
    """
    opening, closing = tags
    end = text.rfind(closing)
    begin = text.rfind(opening, 0, end) if end >= 0 else -1
    return None if begin < 0 else text[begin + len(opening) : end]


def parse_box(written: str) -> Box | None:
    """Read four numbers separated by commas; None where it is anything else.

    White space means nothing, since tokenizers put some between the tokens they decode; round
    and square brackets mean nothing either. Exponents, "nan" and "inf" are no numbers here.

    Args:
        written: For example ``0.250, 0.500, 0.750, 1.000`` or ``(250,500),(750,1000)``.
    """
    parts = re.sub(r"[\s()\[\]]", "", written).split(",")
    if len(parts) != 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    left, top, right, bottom = (float(part) for part in parts)
    box = (left, top, right, bottom)
    return box if all(map(math.isfinite, box)) else None


def cells(low: float, high: float, size: int, slack: float = 0.0) -> slice:
    """Cells of a row of `size` that the interval [low, high] touches, at least one.

    Args:
        low: Begin, as a share of the row in [0, 1].
        high: End, no less than `low`.
        size: Cells in the row.
        slack: A cell touched by no more than this share of the row is left out.
    """
    begin = math.floor((low + slack) * size + _ROUNDING)
    begin = min(max(begin, 0), size - 1)
    end = math.ceil((high - slack) * size - _ROUNDING)
    return slice(begin, min(max(end, begin + 1), size))


def vocot_cells(box: Box, size: int) -> tuple[slice, slice]:
    """Rows and columns of a square grid that VoCoT's released code takes for a box.

    Rows go by x and columns by y, which mirrors the region at the grid's diagonal; a cell that is
    touched by any rounding of the last decimal belongs to it; corners are not sorted. VolCano's
    weights were trained on such regions.

    Args:
        box: Left, top, right, bottom as shares of the picture.
        size: Cells per side of the grid.

    Returns:
        The slices. One that begins at or behind its end holds nothing; VoCoT injects nothing then.

    Source: VoCoT (arXiv:2405.16919), released code, box_align, in float32; in float16 that code
    rounds some borders to the next cell.
    """
    low = [math.floor(share * size + _ROUNDING) for share in box[:2]]
    high = [min(math.ceil(share * size - _ROUNDING), size) for share in box[2:]]
    rows, columns = (slice(*pair) for pair in zip(low, high, strict=True))
    return rows, columns


def crop_pixels(image: Image, box: Box) -> Image:
    """The part of a picture within a box, at the picture's own resolution.

    Every pixel the box touches belongs to it, at least one; what lies outside of the picture is
    left out.

    Args:
        image: A picture.
        box: Left, top, right, bottom as shares of the picture's width and height.

    Returns:
        A new picture.

    Raises:
        DareInputError: The box is none: not four finite numbers with left <= right and
            top <= bottom, or wholly outside of the picture.

    Examples:
        >>> from PIL import Image
        >>> from dare_hf.generation import crop_pixels
        >>> crop_pixels(Image.new("RGB", (100, 50)), (0.5, 0.0, 1.0, 0.5)).size
        (50, 25)
    """
    wanted = "left <= right, top <= bottom, some of it within [0, 1]"
    if len(box) != 4 or not all(math.isfinite(number) for number in box):
        raise DareInputError(f"box: expected four finite numbers, {wanted}; got {box!r}")
    left, top, right, bottom = box
    if not (left <= right and top <= bottom and min(right, bottom) >= 0 and max(left, top) <= 1):
        raise DareInputError(f"box: expected {wanted}; got {box!r}. Sort its corners, or skip it")
    columns, rows = cells(left, right, image.width), cells(top, bottom, image.height)
    return image.crop((columns.start, rows.start, columns.stop, rows.stop))
