"""MultihopSpatial (Lee et al. 2026): a choice that takes one to three hops, and its box.

Hub id: etri-vilab/MultihopSpatial. Prompt and reading are lmms-eval's. mcq_acc: the letter is
right; acc50iou: and the box covers the right one with IoU >= 0.5; avg_iou: mean IoU where the
letter is right and a box can be read. An answer that does not parse is wrong; the authors' own
script leaves it out of the count and asks up to three times: its figures are a little higher.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dare_hf.suites.base import Item, Scoring, Suite, Verdict, asked, share, shares_by
from dare_hf.tuning.rows import check_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.suites.records import Record

_PROMPT = """{}

Please respond in the following format:
Answer: (your choice, e.g., "(a) object name")
Bounding Box: {{"bbox_2d": [x1, y1, x2, y2]}}

Important: Use NORMALIZED coordinates (0.0 to 1.0).
Example: {{"bbox_2d": [0.25, 0.1, 0.75, 0.8]}}"""
_TAG = re.compile(r"</?(?:ATT|POS|REL)>")
_CHOICE = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        r"Answer:\s*\(([a-d])\)",
        r"Answer:\s*([a-d])\)",
        r"Answer:\s*([a-d])\s*$",
        r"\(([a-d])\)",
    )
)
_FOUR = r"\[\s*" + r"\s*,\s*".join([r"(\d*\.?\d+)"] * 4) + r"\s*\]"
_BOX = (
    re.compile(r'"bbox_2d"\s*:\s*' + _FOUR),
    re.compile(r"Bounding Box:\s*" + _FOUR, re.IGNORECASE),
    re.compile(_FOUR),
)
_THOUSANDTHS = 1000  # what many models write boxes in, whatever they are asked for


class MultihopSpatial(Suite):
    """See the module."""

    name = "multihopspatial"
    files = ("data/multihop_test*.json", "multihop_test*.json", "**/test*.parquet")
    scorings = (Scoring.generation,)
    max_new_tokens = 512

    def ask(self, record: Record, scoring: Scoring) -> list[Item]:
        """One question of a record."""
        question = " ".join(_TAG.sub("", record.text("question")).split())
        answer = _first(_CHOICE[-1:], record.text("answer"))
        if answer is None:
            raise record.refused(
                f"answer: expected (a) to (d) in it; got {record.values['answer']!r:.80}"
            )
        x, y, width, height = record.numbers("bbox", 4)
        if width <= 0 or height <= 0:
            raise record.refused(
                f"bbox: expected x, y, width, height in pixels; got {record.values['bbox']}"
            )
        key = "image_path" if record.values.get("image_path") else "image"
        picture = record.picture(key, ("data/images", "images", ""))
        facts = {
            "box": [x, y, x + width, y + height],
            "size": list(check_picture(picture, record.place)),
            "hop": record.label("hop"),
            "view": record.label("view"),
        }
        row = asked(record, _PROMPT.format(question), picture, answer[0].lower())
        return [Item(row, facts)]

    def read(self, said: str, item: Item) -> Verdict:
        """The letter and the IoU of the box; None where there is no box to be read."""
        letter, box = _first(_CHOICE, said), _box(said)
        right = letter is not None and letter[0].lower() == item.row.answer
        return {
            "score": float(right),
            "parsed": letter is not None,
            "iou": None if box is None else _iou(box, item.facts["box"], item.facts["size"]),
        }

    def totals(
        self, scoring: Scoring, items: Sequence[Item], found: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Accuracy with the box, mean IoU, both accuracies by hop and by view."""
        both = [bool(one["score"]) and (one["iou"] or 0) >= 0.5 for one in found]
        ious = [one["iou"] for one in found if one["score"] and one["iou"] is not None]
        hits = [one["score"] for one in found]
        by = {
            f"{name}s": {
                measure: shares_by([item.facts[name] for item in items], values)
                for measure, values in (("mcq_acc", hits), ("acc50iou", both))
            }
            for name in ("hop", "view")
        }
        mean = sum(ious) / len(ious) if ious else None
        boxless = sum(one["iou"] is None for one in found) / len(found)
        return {"acc50iou": share(both), "avg_iou": mean, "boxless": boxless, **by}


def _first(patterns: Sequence[re.Pattern[str]], text: str) -> tuple[str, ...] | None:
    """Groups of the first pattern that is found."""
    for pattern in patterns:
        if found := pattern.search(text):
            return found.groups()
    return None


def _box(said: str) -> list[float] | None:
    """x1, y1, x2, y2 in [0, 1] as written; None for none, or one without area."""
    groups = _first(_BOX, said)
    if groups is None:
        return None
    box = [float(number) for number in groups]
    if max(box) > 1:
        box = [number / _THOUSANDTHS for number in box]
    return box if max(box) <= 1 and box[0] < box[2] and box[1] < box[3] else None


def _iou(box: Sequence[float], truth: Sequence[float], size: Sequence[int]) -> float:
    """IoU of a box in shares of the picture and one in pixels, to four places."""
    x1, y1, x2, y2 = (edge * size[place % 2] for place, edge in enumerate(box))
    width = min(x2, truth[2]) - max(x1, truth[0])
    height = min(y2, truth[3]) - max(y1, truth[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = (x2 - x1) * (y2 - y1) + (truth[2] - truth[0]) * (truth[3] - truth[1])
    return round(common / (areas - common), 4)
