"""VSR, Visual Spatial Reasoning (Liu, Emerson, Collier 2023; hub id cambridgeltl/vsr_zeroshot).

A caption says how two things stand; is it true of the picture? The data set names COCO files and
holds no pixels. It prescribes no prompt: both readings get the one of VoCoT's direct setting.

- official: VLMEvalKit's reading: the words of the answer have "yes" or "no", not both; else the
  answer is wrong. Accuracy, precision, recall and F1 of "yes".
- VoCoT: the answer begins with yes or no; one that does not counts as "no".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dare_hf.suites.base import Item, Scoring, Suite, Verdict, asked, share, shares_by

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.suites.records import Record

_PROMPT = (
    'Is there an event "{}" taking place in the image? Please answer yes or no.\n'
    "Answer the question using a single word or phrase."
)
_BETWEEN_WORDS = re.compile(r"[\s;/\[\]\"{}()=+\\_\-><@`,?!.]+")
_WORDS = ("no", "yes")


class Vsr(Suite):
    """See the module."""

    name = "vsr"
    files = ("test.jsonl", "**/test.jsonl", "**/test*.parquet")

    def ask(self, record: Record, scoring: Scoring) -> list[Item]:
        """One question of a caption."""
        label, relation = record.whole("label", 2), record.label("relation")
        link = record.values.get("image_link")
        split = link.split("/")[-2:-1] if isinstance(link, str) else []
        picture = record.picture("image", ["images", "", *split, *(f"images/{s}" for s in split)])
        choices = _WORDS if scoring is Scoring.likelihood else ()
        prompt = _PROMPT.format(record.text("caption").lower())
        row = asked(record, prompt, picture, _WORDS[label], choices)
        return [Item(row, {"relation": relation})]

    def read(self, said: str, item: Item) -> Verdict:
        """Both readings."""
        words = _BETWEEN_WORDS.split(said.lower())
        named = [word for word in _WORDS if word in words]
        official = named[0] if len(named) == 1 else None
        begins = [word for word in _WORDS if said.strip().lower().startswith(word)]
        return {
            "score": float(official == item.row.answer),
            "parsed": official is not None,
            "read": official,
            "vocot": begins[0] if begins else None,
        }

    def totals(
        self, scoring: Scoring, items: Sequence[Item], found: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Precision, recall and F1 of "yes", accuracy by relation, VoCoT's accuracy."""
        truth = [item.row.answer for item in items]
        said = [one["read"] if scoring is Scoring.generation else one["said"] for one in found]
        totals: dict[str, Any] = _of_yes(truth, said)
        if scoring is Scoring.generation:
            begun = [one["vocot"] for one in found]
            vocot = [(a or "no") == b for a, b in zip(begun, truth, strict=True)]
            totals["vocot"] = share(vocot) | {"invalid": begun.count(None) / len(begun)}
        relations = [item.facts["relation"] for item in items]
        return totals | {"relations": shares_by(relations, [one["score"] for one in found])}


def _of_yes(truth: Sequence[str | None], said: Sequence[str | None]) -> dict[str, float | None]:
    """Precision, recall and F1 of "yes"; None where nothing is divided."""
    hits = sum(a == b == "yes" for a, b in zip(truth, said, strict=True))
    precision = hits / said.count("yes") if said.count("yes") else None
    recall = hits / truth.count("yes") if truth.count("yes") else None
    both = said.count("yes") + truth.count("yes")
    return {"precision": precision, "recall": recall, "f1": 2 * hits / both if both else None}
