"""Draws a maze state: one 8 x 8 patch per cell, so a picture is a table look-up of its cells."""

from functools import cache

import numpy as np
from PIL import Image

from dare_hf.errors import DareInputError
from dare_hf.tasks import frozen_lake
from dare_hf.tasks.maze import EAST, FIELD, NORTH, NUM_CELL_TYPES, SOUTH, WEST

PATCH = 8
IMAGE_SIZE = FIELD * PATCH

_OUTSIDE_RGB = (70, 74, 86)
_FLOOR_RGB = (255, 255, 255)
_WALL_RGB = (0, 0, 0)
_RED_RGB = (230, 20, 20)
_LETTER_RGB = ((30, 80, 220), (0, 140, 60), (150, 40, 190), (240, 140, 0))
_GLYPHS = (
    ("010", "101", "111", "101", "101"),
    ("110", "101", "110", "101", "110"),
    ("011", "100", "100", "100", "011"),
    ("110", "101", "101", "101", "110"),
)
# FrozenLake's tiles: one letter a pixel.
_LAKE_RGB = {
    ".": (176, 224, 246),
    "i": (140, 200, 232),
    "#": (16, 40, 92),
    "g": (222, 160, 20),
    "r": (190, 20, 110),
    "a": (20, 120, 30),
}
_LAKE_TILES = {
    frozen_lake.ICE: "iiiiiii./i......./i....i../i...i.../i......./i......./i......./........",
    frozen_lake.HOLE: "iiiiiii./i.####../i######./i######./i######./i######./i.####../........",
    frozen_lake.GIFT: "iiiiiii./i..r..r./i...rr../i.ggrrgg/i.ggrrgg/i..grrg./i..grrg./........",
}
_AGENT = "..aa..../.aaaa.../..aa..../.aaaa.../a.aa.a../..aa..../.a..a.../.a..a..."


@cache
def patch_table() -> np.ndarray:
    """The drawing of every cell type, uint8 [NUM_CELL_TYPES, PATCH, PATCH, 3]."""
    table = np.empty((NUM_CELL_TYPES, PATCH, PATCH, 3), dtype=np.uint8)
    table[0] = _OUTSIDE_RGB
    for kind in range(1, NUM_CELL_TYPES):
        walls, rest = divmod(kind - 1, 10)
        letter, red = divmod(rest, 2)
        table[kind] = _draw_cell(walls, letter, bool(red))
    for ground, drawing in _LAKE_TILES.items():
        for agent in (False, True):
            table[frozen_lake.tile(ground, agent)] = _draw_tile(drawing, agent)
    table.setflags(write=False)
    return table


def _draw_cell(walls: int, letter: int, red: bool) -> np.ndarray:
    patch = np.empty((PATCH, PATCH, 3), dtype=np.uint8)
    patch[:] = _FLOOR_RGB
    for bit, side in (
        (NORTH, np.s_[0]),
        (SOUTH, np.s_[-1]),
        (WEST, np.s_[:, 0]),
        (EAST, np.s_[:, -1]),
    ):
        if walls & bit:
            patch[side] = _WALL_RGB
    if letter:
        for y, line in enumerate(_GLYPHS[letter - 1]):
            for x, dot in enumerate(line):
                if dot == "1":
                    patch[1 + y, 1 + x] = _LETTER_RGB[letter - 1]
    if red and letter:
        # Beside the glyph, so that both stay legible.
        patch[4:7, 4:7] = _RED_RGB
    elif red:
        patch[2:6, 2:6] = _RED_RGB
    return patch


def _draw_tile(drawing: str, agent: bool) -> np.ndarray:
    """A FrozenLake tile; the agent stands at its left, so that the ground stays visible."""
    dots = [list(line) for line in drawing.split("/")]
    if agent:
        for y, line in enumerate(_AGENT.split("/")):
            for x, dot in enumerate(line):
                dots[y][x] = dot if dot != "." else dots[y][x]
    return np.array([[_LAKE_RGB[dot] for dot in line] for line in dots], dtype=np.uint8)


def grid_to_array(grid: np.ndarray) -> np.ndarray:
    """Cell types [..., FIELD, FIELD] -> pixels, uint8 [..., IMAGE_SIZE, IMAGE_SIZE, 3]."""
    patches = patch_table()[grid]
    patches = np.moveaxis(patches, -3, -4)
    return patches.reshape(*grid.shape[:-2], IMAGE_SIZE, IMAGE_SIZE, 3)


def grid_to_image(grid: np.ndarray) -> Image.Image:
    """Cell types [FIELD, FIELD] -> RGB picture of IMAGE_SIZE x IMAGE_SIZE pixels."""
    return Image.fromarray(grid_to_array(grid))


def image_to_grid(image: Image.Image) -> np.ndarray:
    """What a picture shows: each patch's nearest cell type by squared pixel distance.

    Args:
        image: An RGB picture of IMAGE_SIZE x IMAGE_SIZE pixels, rendered or generated.

    Returns:
        int64 [FIELD, FIELD] of cell types.

    Raises:
        DareInputError: The picture has another size.
    """
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise DareInputError(
            f"image: expected {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {image.size}"
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    patches = (
        pixels.reshape(FIELD, PATCH, FIELD, PATCH, 3).swapaxes(1, 2).reshape(FIELD * FIELD, -1)
    )
    table = patch_table().reshape(NUM_CELL_TYPES, -1).astype(np.float32)
    distance = (table**2).sum(1)[None] - 2 * patches @ table.T
    return distance.argmin(1).reshape(FIELD, FIELD)
