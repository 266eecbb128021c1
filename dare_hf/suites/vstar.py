"""V*Bench (Wu, Xie 2023): small things in large pictures.

Hub ids: craigwu/vstar_bench (JSON lines and pictures), lmms-lab/vstar-bench (parquet).

- generation: lmms-eval's prompt and its cascade of patterns for the letter, which takes any first
  word that begins with A to D for one ("Blue" is B), as theirs does.
- likelihood: the original's and VoCoT's way, the question without its options; VoCoT takes the mean
  over tokens, and so does the score; the sum stands beside it.

Files in the original's form name the right option first: those are shuffled, always alike.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import TYPE_CHECKING, Any

from dare_hf.suites.base import (
    Item,
    Scoring,
    Suite,
    Verdict,
    asked,
    by_reduction,
    letters,
    shares_by,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.suites.records import Record

_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
_LETTER = tuple(
    re.compile(pattern)
    for pattern in (
        r"^([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:^|\s)([A-D])(?:\s|$)",
    )
)


class Vstar(Suite):
    """See the module."""

    name = "vstar"
    files = ("test_questions.jsonl", "meta.json", "**/test*.parquet")
    reduction = "mean"

    def ask(self, record: Record, scoring: Scoring) -> list[Item]:
        """One question of a record of either form."""
        question, options, right = (
            _shuffled(record) if record.values.get("options") else _split(record)
        )
        picture = record.picture("image", ("", "images"))
        facts = {"category": str(record.values.get("category", "unknown"))}
        if scoring is Scoring.likelihood:
            return [Item(asked(record, question, picture, options[right], options), facts)]
        lines = [f"{a}. {b}" for a, b in zip(letters(len(options)), options, strict=True)]
        prompt = "\n".join([question, *lines]) + _SUFFIX
        return [Item(asked(record, prompt, picture, letters(len(options))[right]), facts)]

    def read(self, said: str, item: Item) -> Verdict:
        """The letter, by the first pattern that finds one."""
        letter = _letter(said)
        return {
            "score": float(letter == item.row.answer),
            "parsed": letter is not None,
            "read": letter,
        }

    def totals(
        self, scoring: Scoring, items: Sequence[Item], found: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Accuracy by category; by sum and mean of log-probabilities."""
        categories = [item.facts["category"] for item in items]
        totals = {"categories": shares_by(categories, [one["score"] for one in found])}
        return totals | (by_reduction(items, found) if scoring is Scoring.likelihood else {})


def _split(record: Record) -> tuple[str, tuple[str, ...], int]:
    """Question, options and which is right, of "question (A) one (B) two" and a letter."""
    text = record.text("text").removesuffix(_SUFFIX.strip())
    question, *parts = re.split(r"\(([A-D])\)", text)
    marks, options = parts[::2], tuple(part.strip() for part in parts[1::2])
    if len(marks) < 2 or marks != letters(len(marks)) or not all(options):
        raise record.refused(f"text: expected options (A), (B), ... in order; got {text!r:.120}")
    label = record.text("label").strip().upper()
    if label not in marks:
        raise record.refused(f"label: expected one of {', '.join(marks)}; got {label!r:.40}")
    return question.strip(), options, marks.index(label)


def _shuffled(record: Record) -> tuple[str, tuple[str, ...], int]:
    """Question, options and which is right, of a list that names the right one first."""
    question, options = record.text("question"), record.options("options")
    seed = hashlib.sha256("\n".join((question, *options)).encode()).hexdigest()
    order = random.Random(seed).sample(range(len(options)), len(options))
    return question, tuple(options[place] for place in order), order.index(0)


def _letter(said: str) -> str | None:
    text = said.strip().upper()
    for pattern in _LETTER:
        if found := pattern.search(text):
            return found[1]
    alone = re.findall("[A-D]", text)
    return alone[0] if len(alone) == 1 else None
