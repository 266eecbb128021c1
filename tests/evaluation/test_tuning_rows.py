"""A user's rows: both forms are read, everything else is refused with its line."""

import json

import pytest
from PIL import Image

from dare_hf.errors import DareInputError
from dare_hf.tuning.rows import read_rows


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture, a picture outside it, and a link that leads there."""
    inside = tmp_path / "data"
    (inside / "pictures").mkdir(parents=True)
    for file in (inside / "pictures" / "a.png", tmp_path / "outside.png"):
        Image.new("RGB", (8, 8)).save(file)
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "no.png").write_text("no picture")
    return inside


def _written(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_both_forms_mean_the_same(folder):
    picture = "pictures/a.png"
    parts = [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A cat"},
    ]
    file = _written(
        folder,
        {"prompt": "What?", "image": picture, "answer": "A cat"},
        "",
        {"messages": chat},
        {"messages": chat[:1], "answer": "A cat", "choices": ["A cat", "A dog"]},
    )
    one, two, three = read_rows(file)
    assert (one.line, two.line, three.line) == (1, 3, 4)
    assert one.messages == two.messages == three.messages
    assert one.images == two.images == three.images == ((folder / picture).resolve(),)
    assert one.answer == two.answer == three.answer == "A cat"
    assert three.choices == ("A cat", "A dog")


def test_text_alone_and_systems_are_rows(folder):
    system = {"role": "system", "content": "Be brief."}
    file = _written(
        folder, {"prompt": "2 + 2?"}, {"messages": [system, *[{"role": "user", "content": "?"}]]}
    )
    one, two = read_rows(file)
    assert (one.images, one.answer, one.choices) == ((), None, ())
    assert [message["role"] for message in two.messages] == ["system", "user"]


USER = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("{", "messages"),
        ("[1]", "messages"),
        ({"question": "?"}, "question"),
        ({"prompt": "?", "messages": [USER]}, "keys"),
        ({"prompt": "?", "label": "x"}, "label"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "?", "answer": 3}, "answer"),
        ({"prompt": "?", "answer": ""}, "answer"),
        ({"prompt": "?", "choices": ["a"]}, "choices"),
        ({"prompt": "?", "choices": "ab"}, "choices"),
        ({"prompt": "?", "choices": ["a", "a", "b"]}, "different"),
        ({"prompt": "?", "answer": "c", "choices": ["a", "b"]}, "one of its choices"),
        ({"prompt": "?", "image": "pictures/a.png", "images": []}, "both"),
        ({"prompt": "?", "images": "pictures/a.png"}, "images"),
        ({"prompt": "?", "image": "pictures/b.png"}, "picture"),
        ({"prompt": "?", "image": "no.png"}, "no.png"),
        ({"prompt": "?", "image": "../outside.png"}, "inside"),
        ({"prompt": "?", "image": "pictures/../../outside.png"}, "inside"),
        ({"prompt": "?", "image": "link.png"}, "inside"),
        ({"prompt": "?", "image": "/etc/hostname"}, "inside"),
        ({"prompt": "?", "image": "a\0b"}, "path"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "x"}]}]}, "type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "path"),
        ({"messages": [{"role": "user", "content": ["?"]}]}, "type"),
        ({"messages": [{"role": "assistant", "content": "yes"}]}, "user"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "assistant"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}], "answer": "b"}, "one answer"),
        ({"messages": [USER], "image": "pictures/a.png"}, "inside the messages"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(folder, row, match):
    file = _written(folder, {"prompt": "fine", "id": 1}, "", row)
    with pytest.raises(DareInputError, match=rf"line 3.*{match}"):
        read_rows(file)


def test_a_file_without_rows_is_refused(folder):
    with pytest.raises(DareInputError, match="at least one row"):
        read_rows(_written(folder, "", " "))
    with pytest.raises(DareInputError, match="JSON lines file"):
        read_rows(folder / "none.jsonl")
