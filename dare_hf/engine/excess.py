"""Notes of a report on layers that kept more than was named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.utils import logging

from dare_hf.routing.kinds import TEXT, VISION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.engine.settings import Settings
    from dare_hf.routing.counts import Counts

logger = logging.get_logger("transformers.dare_hf")
_WHY = (
    "tokens that are always kept (first and last ones, special ones, image delimiters, the last "
    "recent_tokens of the text) go beyond a layer's budget, or batch_budget is 'equal'"
)


class Excess:
    """Says it where a run's layers kept more than asked for, by over one token a row.

    Args:
        settings: What was asked for.
        note: Told what to say.
    """

    def __init__(self, settings: Settings, note: Callable[[str], None]) -> None:
        self._mean, self._note = settings.table.mean, note
        self._asked: dict[int, str] = {}
        for kind, name in ((VISION, "vision"), (TEXT, "text")):
            asked, what = self._mean(kind), f"{name} rates of the schedule"
            if settings.spreads:
                what = f"{name}_retention"
                asked = getattr(settings.config, what)
            self._asked[kind] = f"{what}: asked for a mean of {asked:.4g} over the layers"

    def prompt(self, totals: Sequence[Counts], ran: Sequence[Sequence[Counts]]) -> None:
        """Look at a prompt of `totals` [rows][kind], of which layers ran [layers][rows][kind]."""
        for kind, what in self._asked.items():
            rows = [row[kind] for row in totals if row[kind]]
            kept = sum(row[kind] for layer in ran for row in layer) / len(ran)
            if kept > self._mean(kind) * sum(rows) + len(rows):
                self._note(f"{what}; {kept / sum(rows):.4g} of the prompt ran, since {_WHY}")
                logger.warning_once(f"{what}; more runs where {_WHY}: see the report's notes")

    def injected(
        self, hops: Sequence[int], totals: Sequence[Counts], ran: Sequence[Sequence[Counts]]
    ) -> None:
        """Look at an injected span, likewise; `hops` are those of its rows."""
        for kind, what in self._asked.items():
            rows = [(hop, own[kind]) for hop, own in zip(hops, totals, strict=True) if own[kind]]
            allowed = sum(self._mean(kind, hop) * count + 1 for hop, count in rows)
            if sum(row[kind] for layer in ran for row in layer) / len(ran) > allowed:
                self._note(f"{what}; more of an injected span ran, since {_WHY}")
