"""What the hop tests share: runs whose hops close where the test says, and what caches hold."""

from __future__ import annotations

from typing import Any

import torch
from laws import SPECIAL_IDS, dare, generate
from transformers import LogitsProcessor

DELIMITER = 12
WORDS = tuple(range(10, 18))
"""The few words of runs that need natural repeats: prompt lookup, delimiters that just occur."""

PRUNED: dict[str, Any] = {"vision_retention": 0.5, "text_retention": 0.6, "hop_decay": 0.7}
BY_WORD: dict[str, Any] = {**PRUNED, "hop_delimiters": (DELIMITER,)}
LONG = 18


class CloseAt(LogitsProcessor):
    """Makes each row write the delimiter at given steps, and nowhere else.

    Args:
        prompt: Columns of the prompt.
        steps: Per row the steps, 0 for the first sampled token.
        token: The delimiter; a sequence is written so that it ends at the step.
    """

    def __init__(self, prompt: int, steps, token: int | tuple[int, ...] = DELIMITER):
        self.prompt, self.steps = prompt, steps
        self.tokens = (token,) if isinstance(token, int) else token

    def __call__(self, input_ids, scores):
        step, scores = input_ids.shape[1] - self.prompt, scores.clone()
        scores[:, list(self.tokens)] = -torch.inf
        copies = len(input_ids) // len(self.steps)
        for row in range(len(input_ids)):
            for end in self.steps[row // copies]:
                place = step - (end + 1 - len(self.tokens))
                if 0 <= place < len(self.tokens):
                    scores[row] = -torch.inf
                    scores[row, self.tokens[place]] = 0
        return scores


class Watch(LogitsProcessor):
    """Calls a function after every forward of a generate; changes nothing."""

    def __init__(self, look):
        self.look = look

    def __call__(self, input_ids, scores):
        self.look(input_ids)
        return scores


def closing(model, inputs, steps, *, token=DELIMITER, watch=None, **kwargs: Any):
    """Generate with hops that close at the given steps of each row."""
    options = {"max_new_tokens": LONG, **kwargs}
    processors = [CloseAt(inputs["input_ids"].shape[1], steps, token)]
    processors += [Watch(watch)] if watch is not None else []
    return generate(model, inputs, logits_processor=processors, **options)


def chatter(model, inputs, **kwargs: Any):
    """Generate from a vocabulary of a few words, so that they repeat."""
    size = model.config.get_text_config().vocab_size
    others = [token for token in range(size) if token not in WORDS]
    options = {"max_new_tokens": 28, "suppress_tokens": others, **kwargs}
    return generate(model, inputs, **options)


def words_said(model, inputs, count: int = 2, **fields: Any) -> tuple[int, ...]:
    """The words a pruned run says most: delimiters that will occur."""
    with dare(model, **fields):
        said = new_tokens(inputs, chatter(model, inputs)).flatten()
    return tuple(said.bincount().argsort(descending=True, stable=True)[:count].tolist())


def new_tokens(inputs, out) -> torch.Tensor:
    """Long[B, N] what generate wrote."""
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def injected_columns(cache) -> list[tuple[int, int]]:
    """Columns [start, end) of each injected input: the row that got most has it without a pad."""
    found = dict[int, int]()
    for start, end in {span for row in cache.hop_counters.spans for span in row}:
        found[end] = min(start, found.get(end, start))
    return sorted((start, end) for end, start in found.items())


def held(cache, columns: int) -> list[torch.Tensor]:
    """Per layer, Bool[B, columns]: the logical tokens the cache stores."""
    masks = []
    for layer in cache.layers:
        where = layer.positions()
        mask = torch.zeros(len(where), columns + 1, dtype=torch.bool)
        masks.append(mask.scatter(1, where % (columns + 1), True)[:, :columns])
    return masks


__all__ = [
    "BY_WORD",
    "DELIMITER",
    "LONG",
    "PRUNED",
    "SPECIAL_IDS",
    "WORDS",
    "CloseAt",
    "Watch",
    "chatter",
    "closing",
    "held",
    "injected_columns",
    "new_tokens",
    "words_said",
]
