"""Boxes as models write them: what is read, and what of a picture or a grid lies in one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.generation import BoxRefocus, crop_pixels
from dare_hf.generation.boxes import cells, parse_box, written_box

TAGS = ("<coor>", "</coor>")

READ = {
    "0.250,0.500,0.750,1.000": (0.25, 0.5, 0.75, 1.0),
    " 0 . 2 5 0 , 0 . 5 , .75 , 1. ": (0.25, 0.5, 0.75, 1.0),
    "[0.1, 0.2, 0.3, 0.4]": (0.1, 0.2, 0.3, 0.4),
    "(250,500),(750,1000)": (250.0, 500.0, 750.0, 1000.0),
    "-0.1,0,1.2,+1": (-0.1, 0.0, 1.2, 1.0),
    "0.9,0.8,0.1,0.2": (0.9, 0.8, 0.1, 0.2),
}
NOT_READ = [
    "",
    "0.1,0.2,0.3",
    "0.1,0.2,0.3,0.4,0.5",
    "0.1 0.2 0.3 0.4",
    "nan,0.2,0.3,0.4",
    "inf,0.2,0.3,0.4",
    "1e3,0.2,0.3,0.4",
    "0.1.2,0.2,0.3,0.4",
    "0.1,,0.3,0.4",
    "x,0.2,0.3,0.4",
    "0.1,0.2,<coor>0.3,0.4",
    "9" * 400 + ",0,1,1",
]


@pytest.mark.parametrize("written", READ)
def test_four_numbers_are_a_box(written):
    assert parse_box(written) == READ[written]


@pytest.mark.parametrize("written", NOT_READ)
def test_anything_else_is_none(written):
    assert parse_box(written) is None


@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_what_is_written_with_three_decimals_is_read_back(numbers):
    box = parse_box(",".join(f"{number:.3f}" for number in numbers))
    assert box == tuple(float(f"{number:.3f}") for number in numbers)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("the <coor> 1,2,3,4 </coor>", " 1,2,3,4 "),
        ("<coor>a</coor> and <coor>b</coor> so", "b"),
        ("<coor>a <coor>b</coor>", "b"),
        ("<coor>a</coor> <coor>b", "a"),
        ("1,2,3,4</coor>", None),
        ("</coor><coor>1", None),
        ("no box", None),
    ],
)
def test_the_last_box_of_a_hop_counts(text, written):
    assert written_box(text, TAGS) == written


@given(
    st.integers(1, 40),
    st.integers(0, 1000),
    st.integers(0, 1000),
)
def test_every_cell_that_is_touched_belongs_to_the_box(size, one, other):
    """Against whole numbers: cell c of `size` is [c, c + 1] / size, a box [low, high] / 1000."""
    low, high = sorted((one, other))
    touched = [c for c in range(size) if c * 1000 < high * size and (c + 1) * 1000 > low * size]
    found = cells(low / 1000, high / 1000, size)
    found_cells = list(range(size))[found]
    if low < high:
        assert found_cells == touched
    else:
        assert len(found_cells) == 1


def test_a_third_written_with_three_decimals_is_a_third():
    exact = cells(0.333, 0.667, 3)
    written = cells(0.333, 0.667, 3, 0.0005)
    assert (exact, written) == (slice(0, 3), slice(1, 2))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30), st.floats(0, 0.01))
def test_a_slice_always_holds_a_cell(one, other, size, slack):
    low, high = sorted((one, other))
    found = cells(low, high, size, slack)
    assert 0 <= found.start < found.stop <= size


def gradient(width, height):
    """A picture whose pixel (x, y) has the color (x, y, 0)."""
    picture = Image.new("RGB", (width, height))
    picture.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    return picture


@pytest.mark.parametrize(
    ("box", "first", "size"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0, 0), (10, 20)),
        ((0.3, 0.1, 0.6, 0.5), (3, 2), (3, 8)),
        ((0.31, 0.1, 0.59, 0.5), (3, 2), (3, 8)),
        ((0.5, 0.5, 0.5, 0.5), (5, 10), (1, 1)),
        ((1.0, 1.0, 1.0, 1.0), (9, 19), (1, 1)),
        ((-0.5, 0.9, 0.2, 1.5), (0, 18), (2, 2)),
    ],
)
def test_a_crop_is_the_pixels_of_the_box(box, first, size):
    crop = crop_pixels(gradient(10, 20), box)
    assert crop.size == size
    assert crop.getpixel((0, 0))[:2] == first
    last = tuple(begin + length - 1 for begin, length in zip(first, size, strict=True))
    assert crop.getpixel((size[0] - 1, size[1] - 1))[:2] == last


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0, 0.4, 1),
        (0, 0.5, 1, 0.4),
        (1.1, 0, 1.2, 1),
        (0, -0.2, 1, -0.1),
        (math.nan, 0, 1, 1),
        (0, 0, math.inf, 1),
        (0, 0, 1),
    ],
)
def test_what_is_no_box_is_no_crop(box):
    with pytest.raises(DareInputError, match="box: expected"):
        crop_pixels(gradient(10, 20), box)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"source": "grid"}, "source"),
        ({"source": "pixels"}, "images"),
        ({"images": [gradient(2, 2)]}, "images"),
        ({"source": "pixels", "images": ["a.png"]}, "images"),
        ({"source": "pixels", "images": gradient(2, 2)}, "images"),
        ({"source": "pixels", "images": [[gradient(2, 2), None]]}, "images"),
        ({"scale": 0}, "scale"),
        ({"scale": (10, -1)}, "scale"),
        ({"scale": "pixels"}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"tags": "box"}, "tags"),
        ({"tags": ("", "</coor>")}, "tags"),
        ({"max_boxes": -1}, "max_boxes"),
        ({"max_boxes": 1.5}, "max_boxes"),
        ({"image_of": 0}, "image_of"),
        ({"frame": ([1], "x")}, "frame"),
        ({"frame": [4]}, "frame"),
    ],
)
def test_arguments_are_checked_when_it_is_made(arguments, named):
    with pytest.raises(DareConfigError, match=f"^{named}: expected"):
        BoxRefocus(**arguments)
