"""Draws a scene: one tile per cell, with marks that vanish when the picture is made smaller.

A picture is 256 x 256 pixels. The embedded model's processor first shrinks it to 64 x 64, each
pixel the mean of a 4 x 4 block (PIL's BOX filter). A mark is a hatching of period 4 that inks
exactly half of every block, so all four marks become the same grey there: nothing of them is left.
The crop of a cell is 64 x 64 pixels and is not made smaller, so the second look shows the mark.
"""

from functools import cache

import numpy as np
from PIL import Image

from dare_hf.tasks.scene import COLOURS, FORMS, GRID, MARKS, SceneItem, Shape

TILE = 64
IMAGE_SIZE = GRID * TILE
BLOCK = 4

# Even numbers, so that half ink is a whole number.
_RGB = ((220, 30, 30), (30, 160, 60), (40, 80, 230), (240, 220, 40), (150, 50, 200), (250, 140, 20))
_GROUND_RGB = (240, 240, 240)
_INK_RGB = (0, 0, 0)
# The hatched part of a tile, in whole blocks; it lies inside every form.
_HATCHED = (slice(28, 48), slice(20, 44))


def hatching(mark: int) -> np.ndarray:
    """Where a mark inks a block, bool [BLOCK, BLOCK]: upright, level, slanting bars; checks."""
    down, right = np.indices((BLOCK, BLOCK))
    if mark == 0:
        return right < 2
    if mark == 1:
        return down < 2
    if mark == 2:
        return (down + right) % 4 < 2
    return (down // 2 + right // 2) % 2 == 0


def _inside(form: int) -> np.ndarray:
    """Pixels of a form, bool [TILE, TILE]."""
    down, right = np.indices((TILE, TILE)) + 0.5
    x, y = np.abs(right - TILE / 2), np.abs(down - TILE / 2)
    if FORMS[form] == "circle":
        return x**2 + y**2 <= 30**2
    if FORMS[form] == "square":
        return np.maximum(x, y) <= 26
    if FORMS[form] == "diamond":
        return x + y <= 31
    return (down >= 2) & (down <= 58) & (x <= (down - 2) * 0.54)


@cache
def tiles() -> np.ndarray:
    """The drawing of every shape, uint8 [colour, form, mark, TILE, TILE, 3]."""
    table = np.empty((len(COLOURS), len(FORMS), len(MARKS), TILE, TILE, 3), dtype=np.uint8)
    table[:] = _GROUND_RGB
    repeats = (TILE // BLOCK, TILE // BLOCK)
    for form in range(len(FORMS)):
        inside = _inside(form)
        for mark in range(len(MARKS)):
            inked = np.zeros((TILE, TILE), dtype=bool)
            inked[_HATCHED] = np.tile(hatching(mark), repeats)[_HATCHED]
            for colour, rgb in enumerate(_RGB):
                table[colour, form, mark, inside] = rgb
                table[colour, form, mark, inked] = _INK_RGB
    return table


def scene_to_array(shapes: tuple[Shape, ...]) -> np.ndarray:
    """The picture of a scene, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    picture = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    picture[:] = _GROUND_RGB
    for shape in shapes:
        top, left = shape.row * TILE, shape.column * TILE
        tile = tiles()[shape.colour, shape.form, shape.mark]
        picture[top : top + TILE, left : left + TILE] = tile
    return picture


def scene_to_image(item: SceneItem) -> Image.Image:
    """The picture that the question is about."""
    return Image.fromarray(scene_to_array(item.shapes))
