"""A dozen rendered items of each benchmark, in the files it is published in."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = (20, 10)
WORDS = ("red", "blue", "cat", "dog", "picture")
MATERIALS = ("red", "blue", "cat", "dog")
LABELS = "ABCDABCDABCD"


def drawn(number: int) -> bytes:
    """A box on a field, as PNG; another place and colour for each number."""
    picture = Image.new("RGB", SIZE, (240, 240, 240 - number))
    place = number % 8
    ImageDraw.Draw(picture).rectangle((place, 2, place + 6, 7), fill=(20 * number, 40, 200))
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _put(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(drawn(number))


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def vsr(folder: Path) -> Path:
    """Six true captions, six false ones; votes as text in one row, as in the published files."""
    rows = []
    for k in range(12):
        name = f"{k:012}.png"
        _put(folder / "train2017" / name, k)
        rows.append(
            {
                "image": name,
                "image_link": f"http://images.cocodataset.org/train2017/{name}",
                "caption": f"The {WORDS[k % 5]} is {('left of', 'inside')[k % 2]} the picture.",
                "label": int(k < 6),
                "relation": ("left of", "inside")[k % 2],
                "annotator_id": k,
                "vote_true_validator_id": "[2, 6]" if k == 3 else [2, 6],
                "vote_false_validator_id": [],
                "reference_frame": None,
            }
        )
    _lines(folder / "test.jsonl", rows)
    return folder / "test.jsonl"


def vstar(folder: Path) -> Path:
    """Four options each, two in the last four; the right letters are LABELS, of those A and B."""
    rows = []
    for k in range(12):
        category = ("direct_attributes", "relative_position")[k >= 8]
        name = f"{category}/sa_{k}.png"
        _put(folder / name, k)
        count = 4 if k < 8 else 2
        options = "\n".join(f"({LABELS[n]}) {MATERIALS[n]}" for n in range(count))
        rows.append(
            {
                "image": name,
                "text": f"What is on the picture? {k}\n{options}\nAnswer with the option's letter "
                "from the given choices directly.",
                "category": category,
                "label": LABELS[k % count],
                "question_id": str(k),
            }
        )
    _lines(folder / "test_questions.jsonl", rows)
    return folder / "test_questions.jsonl"


def embspatial(folder: Path) -> Path:
    """Pictures in base64; the right option is k mod 4; relations of six kinds, two of each."""
    kinds = ("above", "left", "close", "far", "on top of", "inside")
    rows = [
        {
            "question_id": f"mp3d_{k}",
            "question": f"What is on the picture? {k}",
            "answer_options": list(MATERIALS),
            "answer": k % 4,
            "relation": kinds[k % 6],
            "data_source": ("ai2thor", "mp3d", "scannet")[k % 3],
            "image": base64.b64encode(drawn(k)).decode(),
        }
        for k in range(12)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "embspatial_bench.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder / "embspatial_bench.json"


def winoground(folder: Path) -> Path:
    """Six pairs: a dozen choices between two captions."""
    rows = []
    for k in range(6):
        for side in (0, 1):
            _put(folder / "data" / "images" / f"ex_{k}_img_{side}.png", 2 * k + side)
        rows.append(
            {
                "id": k,
                "image_0": f"ex_{k}_img_0",
                "image_1": f"ex_{k}_img_1",
                "caption_0": f"a {WORDS[k % 5]} on the table",
                "caption_1": f"a table on the {WORDS[k % 5]}",
                "tag": "Object",
                "secondary_tag": "",
                "num_main_preds": 1,
                "collapsed_tag": "Object",
            }
        )
    _lines(folder / "data" / "examples.jsonl", rows)
    return folder / "data" / "examples.jsonl"


def multihopspatial(folder: Path) -> Path:
    """The right choice is k mod 4; the box covers x 5 to 15, y 0 to 10 of 20 x 10 pixels."""
    rows = []
    for k in range(12):
        _put(folder / "data" / "images" / f"{k}.png", k)
        rows.append(
            {
                "image_path": f"{k}.png",
                "question": f"Which <POS>left</POS>  thing? {k} (a) red (b) blue (c) cat (d) dog",
                "answer": f"({'abcd'[k % 4]}) {MATERIALS[k % 4]}",
                "bbox": [5, 0, 10, 10.0],
                "hop": f"{1 + k % 3}hop",
                "view": ("ego", "exo")[k % 2],
            }
        )
    (folder / "data" / "multihop_test_4500.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "data" / "multihop_test_4500.json"


FILES: dict[str, Callable[[Path], Path]] = {
    "vsr": vsr,
    "vstar": vstar,
    "embspatial": embspatial,
    "winoground": winoground,
    "multihopspatial": multihopspatial,
}
