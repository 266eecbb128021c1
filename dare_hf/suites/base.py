"""What a benchmark is: rows made of its records, a reading of answers, figures over all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dare_hf.evaluation.intervals import wilson
from dare_hf.tuning.rows import Row

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    from dare_hf.suites.records import Record
    from dare_hf.tuning.rows import Inline

Verdict = dict[str, Any]


class Scoring(StrEnum):
    """How an answer is got: greedy text that is read, or the likeliest of the choices."""

    generation = "generation"
    likelihood = "likelihood"


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        row: The question; with choices where likelihoods are compared.
        facts: JSON values that its scoring needs beside the answer.
    """

    row: Row
    facts: dict[str, Any]


class Suite(ABC):
    """One benchmark.

    Attributes:
        name: As `--benchmark` takes it.
        files: Its data file below the folder, in order of preference.
        scorings: What it can be scored by, the usual one first.
        reduction: What of the log-probabilities of a choice's tokens decides.
        max_new_tokens: Most tokens of a generated answer.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    scorings: ClassVar[tuple[Scoring, ...]] = tuple(Scoring)
    reduction: ClassVar[Literal["sum", "mean"]] = "sum"
    max_new_tokens: ClassVar[int] = 16

    @abstractmethod
    def ask(self, record: Record, scoring: Scoring) -> list[Item]:
        """The questions of a record.

        Raises:
            DareInputError: The record is not of the benchmark's form; the text has its place.
        """

    def read(self, said: str, item: Item) -> Verdict:
        """What a generated text comes to: "score" 0 or 1, "parsed", and what `totals` needs."""
        raise NotImplementedError(f"{self.name} is scored by likelihood alone")

    @abstractmethod
    def totals(
        self, scoring: Scoring, items: Sequence[Item], found: Sequence[Verdict]
    ) -> dict[str, Any]:
        """Figures beside the mean score, as JSON values."""


def asked(
    record: Record,
    prompt: str,
    picture: Path | Inline,
    answer: str,
    choices: Sequence[str] = (),
) -> Row:
    """A row with one picture before its question.

    Raises:
        DareInputError: Choices are alike.
    """
    if len(set(choices)) != len(choices):
        raise record.refused(f"expected different choices; got {choices!r:.80}")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = ({"role": "user", "content": content},)
    return Row(record.line, messages, (picture,), answer, tuple(choices), record.place)


def taken(found: Verdict, reduction: Literal["sum", "mean"]) -> int:
    """Which choice is likeliest; the first of equals."""
    scores = choice_scores(found, reduction)
    return scores.index(max(scores))


def choice_scores(found: Verdict, reduction: Literal["sum", "mean"]) -> list[float]:
    """Log-probability of each choice, nats, or its mean over the choice's tokens."""
    if reduction == "sum":
        return found["sums"]
    return [total / length for total, length in zip(found["sums"], found["tokens"], strict=True)]


def share(hits: Sequence[float | bool]) -> dict[str, Any]:
    """Share of hits with its 95 % Wilson interval; None where there is nothing to share."""
    if not hits:
        return {"n": 0, "accuracy": None, "interval": None}
    mean = sum(hits) / len(hits)
    return {"n": len(hits), "accuracy": mean, "interval": list(wilson(mean, len(hits)))}


def shares_by(keys: Sequence[Hashable], hits: Sequence[float | bool]) -> dict[str, Any]:
    """`share` of the hits of each key, in alphabetical order."""
    groups: dict[str, list[float | bool]] = {}
    for key, hit in zip(keys, hits, strict=True):
        groups.setdefault(str(key), []).append(hit)
    return {key: share(groups[key]) for key in sorted(groups)}


def by_reduction(items: Sequence[Item], found: Sequence[Verdict]) -> dict[str, Any]:
    """`share` of right choices by summed and by mean log-probability."""
    return {
        reduction: share(
            [
                item.row.choices[taken(one, reduction)] == item.row.answer
                for item, one in zip(items, found, strict=True)
            ]
        )
        for reduction in ("sum", "mean")
    }


def letters(count: int) -> list[str]:
    """A, B, C, ..."""
    return [chr(ord("A") + place) for place in range(count)]
