"""EmbSpatial-Bench (Du et al. 2024): where things stand in indoor scenes, four options.

Hub ids: Phineas476/EmbSpatial-Bench (JSON), FlagEval/EmbSpatial-Bench (parquet).

- generation: lmms-eval's prompt and reading: the first letter of the answer, whatever word it
  begins ("The answer is A" is T, and wrong), as theirs does.
- likelihood: VoCoT's way, the question without its options, summed log-probabilities; its figure
  leaves out "on top of" and "inside", and stands beside that over all.
"""

from __future__ import annotations

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
    share,
    shares_by,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.suites.records import Record

_PREFIX = (
    "Note: You only need to respond with A, B, C, D without providing any additional information.\n"
)
_NOT_IN_VOCOT = ("on top of", "inside")


class EmbSpatial(Suite):
    """See the module."""

    name = "embspatial"
    files = ("embspatial_bench*.json", "**/test*.parquet")

    def ask(self, record: Record, scoring: Scoring) -> list[Item]:
        """One question of a record."""
        question, options = record.text("question"), record.options("answer_options")
        right = record.whole("answer", len(options))
        facts = {"relation": record.label("relation"), "source": record.label("data_source")}
        facts["letters"] = letters(len(options))
        picture = record.picture("image", ("", "images"))
        if scoring is Scoring.likelihood:
            return [Item(asked(record, question, picture, options[right], options), facts)]
        lines = [f"{a}) {b}" for a, b in zip(facts["letters"], options, strict=True)]
        prompt = _PREFIX + "\n".join([question, *lines])
        return [Item(asked(record, prompt, picture, facts["letters"][right]), facts)]

    def read(self, said: str, item: Item) -> Verdict:
        """The first letter."""
        found = re.match(r"[(\s]*([A-Z])", said.strip(), re.IGNORECASE)
        letter = found[1].upper() if found else None
        return {
            "score": float(letter == item.row.answer),
            "parsed": letter in item.facts["letters"],
            "read": letter,
        }

    def totals(
        self, scoring: Scoring, items: Sequence[Item], found: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Accuracy by source and by relation; VoCoT's."""
        hits = [one["score"] for one in found]
        relations = [item.facts["relation"] for item in items]
        totals = {
            "sources": shares_by([item.facts["source"] for item in items], hits),
            "relations": shares_by(relations, hits),
        }
        if scoring is Scoring.generation:
            return totals
        pairs = zip(relations, hits, strict=True)
        vocot = share([hit for relation, hit in pairs if relation not in _NOT_IN_VOCOT])
        return totals | by_reduction(items, found) | {"vocot": vocot}
