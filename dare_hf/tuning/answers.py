"""What a model answers to a row, and whether that is right."""

from __future__ import annotations

import re
from enum import StrEnum
from math import exp
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError
from dare_hf.evaluation.processes import ALONE, Processes
from dare_hf.tuning.fidelity import filled, forced, greedy, on_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import Row

MAX_NEW_TOKENS = 64


class Metric(StrEnum):
    """How an answer is scored, 0 to 1.

    exact: the text is the answer, case, white space and a full stop at its end aside. choice: the
    text names the right one of the row's choices, by itself or by its letter, and no other. regex:
    the row's answer is a regular expression that is found in the text. likelihood: the right choice
    has the highest likelihood of all; without choices, the likelihood of the answer per token.
    """

    exact = "exact"
    choice = "choice"
    regex = "regex"
    likelihood = "likelihood"


def named_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        DareInputError: There is none.
    """
    if name not in tuple(Metric):
        raise DareInputError(f"metric: expected one of {', '.join(Metric)}; got {name!r}")
    return Metric(name)


def checker(metric: Metric) -> Callable[[Sequence[Row]], None]:
    """What refuses rows that a metric cannot score.

    Raises:
        DareInputError: When called: a row without what the metric needs; the text has its line.
    """

    def check(rows: Sequence[Row]) -> None:
        for row in rows:
            if row.answer is None:
                raise row.refused(f'metric {metric}: expected an "answer"; got none')
            if metric is Metric.choice and not row.choices:
                raise row.refused(f'metric {metric}: expected "choices"; got none')
            if metric is Metric.regex:
                try:
                    re.compile(row.answer)
                except re.error as error:
                    raise row.refused(
                        f"metric regex: expected an answer that is a regular expression; got "
                        f"{row.answer!r:.80} ({error})"
                    ) from error

    return check


def metric_of(rows: Sequence[Row]) -> Metric | None:
    """The metric that suits rows best: likelihood with choices, else exact; None without answers.

    Raises:
        DareInputError: Only some rows have an answer.
    """
    answered = [row.answer is not None for row in rows]
    if not any(answered):
        return None
    if not all(answered):
        missing = next(row for row in rows if row.answer is None)
        raise DareInputError(
            f"data: expected an answer in all rows or in none; got none in line {missing.line}"
        )
    return Metric.likelihood if all(row.choices for row in rows) else Metric.exact


def answer(
    model: Any, prompts: Prompts, row: Row, metric: Metric, max_new_tokens: int
) -> tuple[str, float]:
    """What the model says to a row, and its score.

    Args:
        model: With DARE or without.
        prompts: Builds its inputs.
        row: One that `checker` let pass.
        metric: How it is scored.
        max_new_tokens: Most tokens of an answer that is generated.

    Returns:
        The text, or the choice taken; and a score in [0, 1].
    """
    if metric is Metric.likelihood:
        return _likeliest(model, prompts, row)
    inputs = on_device(model, prompts.encode([row]))
    said = prompts.text(greedy(model, inputs, max_new_tokens, prompts.pad_id)[0].tolist())
    return said, float(right(said, row, metric))


def scores(
    model: Any,
    prompts: Prompts,
    rows: Sequence[Row],
    metric: Metric,
    max_new_tokens: int,
    batch_size: int,
    processes: Processes = ALONE,
) -> list[float]:
    """The score of each row, as `answer` has it; generated in batches, which processes share."""
    if metric is Metric.likelihood:
        return processes.mapped(rows, lambda row: _likeliest(model, prompts, row)[1])
    batches = list(prompts.batches(rows, batch_size))

    def of_batch(indices: list[int]) -> list[float]:
        picked = [rows[index] for index in indices]
        inputs = on_device(model, prompts.encode(picked))
        answers = greedy(model, inputs, max_new_tokens, prompts.pad_id).tolist()
        texts = map(prompts.text, answers)
        return [float(right(text, row, metric)) for text, row in zip(texts, picked, strict=True)]

    made = zip(batches, processes.mapped(batches, of_batch), strict=True)
    found = {k: score for batch, said in made for k, score in zip(batch, said, strict=True)}
    return [found[index] for index in range(len(rows))]


def right(said: str, row: Row, metric: Metric) -> bool:
    """Whether a generated text is the answer of a row."""
    wanted = row.answer or ""
    if metric is Metric.regex:
        return re.search(wanted, said) is not None
    if metric is Metric.exact:
        return _normal(said) == _normal(wanted)
    return read_choice(said, row.choices) == wanted


def read_choice(said: str, choices: Sequence[str]) -> str | None:
    """The choice a text names; None where it names none, or several."""
    for one in choices:
        if _normal(one) == _normal(said):
            return one
    named = [one for one in choices if _named(one, said)]
    if len(named) == 1:
        return named[0]
    letter = re.match(r"\W*([A-Za-z])(?:\W|$)", said)
    place = ord(letter[1].upper()) - ord("A") if letter and not named else len(choices)
    return choices[place] if place < len(choices) else None


def _named(choice: str, said: str) -> bool:
    """Whether whole words of a text are the choice; a single letter has to have its case."""
    flags = 0 if len(choice.strip()) == 1 else re.IGNORECASE
    words = r"\s+".join(map(re.escape, choice.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", said, flags) is not None


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


@torch.no_grad()
def likelihoods(
    model: Any, prompts: Prompts, rows: Sequence[Row]
) -> list[tuple[list[float], list[int]]]:
    """How likely each choice of each row is, or its answer where it has none; one generate call.

    Returns:
        Per row and choice the summed log-probability of its tokens, nats, and how many they are.
    """
    texts = [(row, text) for row in rows for text in row.choices or (row.answer or "",)]
    tokens, live = filled([prompts.ids(text) for _, text in texts], prompts.pad_id)
    inputs = on_device(model, prompts.encode([row for row, _ in texts]))
    predicted = forced(model, inputs, tokens).gather(-1, tokens[..., None])[..., 0]
    sums, lengths = (predicted * live).sum(1).tolist(), live.sum(1).tolist()
    found, first = [], 0
    for row in rows:
        behind = first + max(len(row.choices), 1)
        found.append((sums[first:behind], lengths[first:behind]))
        first = behind
    return found


def _likeliest(model: Any, prompts: Prompts, row: Row) -> tuple[str, float]:
    ((sums, lengths),) = likelihoods(model, prompts, [row])
    if not row.choices:
        return row.answer or "", exp(sums[0] / lengths[0])
    best = row.choices[sums.index(max(sums))]
    return best, float(best == row.answer)
