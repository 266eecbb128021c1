"""Winoground (Thrush et al. 2022; hub id facebook/winoground, gated): two pictures, two captions.

The captions have the same words in another order. s(c, i) is how likely caption c is after picture
i and VoCoT's "Please describe the image."

- official: text score: each picture prefers its caption; image score: each caption prefers its
  picture; group score: both. By summed and by mean log-probability.
- VoCoT: 800 choices between two captions, by mean log-probability: the score.

Models that write have no official score s; a comparison by generated text is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.suites.base import (
    Item,
    Scoring,
    Suite,
    Verdict,
    asked,
    by_reduction,
    choice_scores,
    share,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.suites.records import Record

_PROMPT = "Please describe the image."


class Winoground(Suite):
    """See the module."""

    name = "winoground"
    files = ("examples.jsonl", "data/examples.jsonl", "**/test*.parquet")
    scorings = (Scoring.likelihood,)
    reduction = "mean"

    def ask(self, record: Record, scoring: Scoring) -> list[Item]:
        """Two questions, one of each picture."""
        captions = (record.text("caption_0"), record.text("caption_1"))
        items = []
        for number, caption in enumerate(captions):
            picture = record.picture(
                f"image_{number}", ("images", "data/images", ""), ("", ".png", ".jpg")
            )
            items.append(Item(asked(record, _PROMPT, picture, caption, captions), {}))
        return items

    def totals(
        self, scoring: Scoring, items: Sequence[Item], found: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Text, image and group score; choices by sum and mean."""
        official: dict[str, Any] = {}
        for reduction in ("sum", "mean"):
            scores = [choice_scores(one, reduction) for one in found]
            pairs = list(zip(scores[::2], scores[1::2], strict=True))
            text = [i0[0] > i0[1] and i1[1] > i1[0] for i0, i1 in pairs]
            image = [i0[0] > i1[0] and i1[1] > i0[1] for i0, i1 in pairs]
            group = [a and b for a, b in zip(text, image, strict=True)]
            named = {"text": text, "image": image, "group": group}
            official[reduction] = {name: share(hits) for name, hits in named.items()}
        return {"official": official, "vocot": by_reduction(items, found)}
