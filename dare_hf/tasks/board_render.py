"""Draws a board: 192 x 192 pixels, names of columns and rows inside the fields at its edge.

As on a chess board on a screen: the letter of a column stands in its lowest field, the digit of a
row in its leftmost, both in grey and clear of the shapes.
"""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from dare_hf.tasks.board import COLUMNS, FORMS, GRID, ROWS, Board, BoardItem

FIELD = 32
IMAGE_SIZE = GRID * FIELD
RGB = ((220, 30, 30), (30, 150, 60), (40, 80, 230), (240, 210, 30), (150, 50, 200), (250, 130, 20))
_GROUND = ((250, 250, 250), (228, 228, 228))
_LABEL = (90, 90, 90)
_RADIUS = 10
_LABEL_SIZE = 9
_STAR_INNER = 0.45
_ARM = 0.35


def board_to_image(pieces: Board) -> Image.Image:
    """The picture of a board, RGB."""
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _GROUND[0])
    draw = ImageDraw.Draw(picture)
    for cell in range(GRID * GRID):
        row, column = divmod(cell, GRID)
        left, top = column * FIELD, row * FIELD
        box = (left, top, left + FIELD - 1, top + FIELD - 1)
        draw.rectangle(box, fill=_GROUND[(row + column) % 2])
    font = ImageFont.load_default(_LABEL_SIZE)
    for k in range(GRID):
        draw.text((1, k * FIELD), ROWS[k], _LABEL, font)
        draw.text(((k + 1) * FIELD - 7, IMAGE_SIZE - 10), COLUMNS[k], _LABEL, font)
    for piece in pieces:
        centre = (piece.column * FIELD + FIELD / 2, piece.row * FIELD + FIELD / 2)
        draw.polygon(_outline(FORMS[piece.form], *centre), fill=RGB[piece.colour])
    return picture


def item_to_image(item: BoardItem) -> Image.Image:
    """The picture that a question is about."""
    return board_to_image(item.pieces)


def _outline(form: str, x: float, y: float) -> list[tuple[float, float]]:
    """Corners of a form around a centre, in pixels."""
    if form == "circle":
        return _ring(x, y, [1.0] * 32)
    if form == "triangle":
        return _ring(x, y + 2, [1.2] * 3)
    if form == "star":
        return _ring(x, y, [1.25, 1.25 * _STAR_INNER] * 5)
    if form == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        return [(x + 0.9 * _RADIUS * a, y + 0.9 * _RADIUS * b) for a, b in corners]
    arm = _ARM
    half = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    cross = [*half, *((-a, -b) for a, b in half)]
    return [(x + 1.1 * _RADIUS * a, y + 1.1 * _RADIUS * b) for a, b in cross]


def _ring(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Points at even angles from the top, each at its share of the radius."""
    turn = 2 * math.pi / len(radii)
    return [
        (x + _RADIUS * r * math.sin(k * turn), y - _RADIUS * r * math.cos(k * turn))
        for k, r in enumerate(radii)
    ]
