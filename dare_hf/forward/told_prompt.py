"""A prompt length told to a bare forward: what comes after it was sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.compat import CACHE
from dare_hf.errors import DareInputError
from dare_hf.forward.inputs import padding_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dare_hf.forward.generation_call import GenerationCall

NAME = "prompt_length"
IGNORED = -100


def told_labels(arguments: Mapping[str, Any], call: GenerationCall | None) -> Tensor | None:
    """Long[B, S]: 0 for tokens that were sampled, -100 for the prompt and pads, as labels tell.

    Args:
        arguments: The forward's keyword arguments by name; `prompt_length` counts the first real
            tokens of every row, an int or Long[] or Long[B].
        call: The generate it is a step of.

    Returns:
        None where no prompt length is given.

    Raises:
        DareInputError: It is no such count, or something else tells the prompt too.

    Source: docs/method.md, section 1.
    """
    told = arguments.get(NAME)
    if told is None:
        return None
    source = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if source is None else source
    if source is None:
        raise DareInputError("expected input_ids or inputs_embeds; got neither")
    _check_alone(arguments, call)
    batch, length = source.shape[:2]
    real = padding_of(arguments, batch, length, 0, source.device)
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=source.device)
    counts, numbers = _counts(told, batch), real.sum(1).tolist()
    wrong = [i for i, (n, most) in enumerate(zip(counts, numbers, strict=True)) if not n <= most]
    if min(counts, default=1) < 1 or wrong:
        row = wrong[0] if wrong else counts.index(min(counts))
        raise DareInputError(
            f"{NAME}: expected a count of real tokens, from 1 to {numbers[row]} in row {row}; got "
            f"{counts[row]}. Count the prompt's tokens without padding"
        )
    after = real.cumsum(1) > torch.tensor(counts, device=source.device)[:, None]
    return torch.where(after & real, 0, IGNORED)


def prompt_before(arguments: Mapping[str, Any], columns: int) -> Tensor:
    """Long[B]: real tokens of each row before the last `columns` columns of a forward."""
    source = arguments.get("input_ids")
    source = arguments["inputs_embeds"] if source is None else source
    batch, length = source.shape[:2]
    real = padding_of(arguments, batch, length, 0, source.device)
    if real is None:
        return torch.full((batch,), length - columns)
    return real[:, : length - columns].sum(1)


def _check_alone(arguments: Mapping[str, Any], call: GenerationCall | None) -> None:
    for name in ("labels", "hop_ids"):
        if arguments.get(name) is not None:
            raise DareInputError(
                f"{NAME}: expected no {name} beside it, which tell the prompt as well; got both. "
                "Leave one out"
            )
    cache = arguments.get(CACHE)
    if call is not None or (cache is not None and cache.get_seq_length()):
        raise DareInputError(
            f"{NAME}: expected a forward over whole written sequences; got one inside generate or "
            f"behind {CACHE}, which knows its prompt. Leave {NAME} out"
        )


def _counts(told: Any, batch: int) -> list[int]:
    """The count of each row, on the host."""
    value = told
    if isinstance(told, torch.Tensor) and told.ndim <= 1 and not told.is_floating_point():
        value = told.tolist() if told.dtype != torch.bool else told
    rows = [value] * batch if isinstance(value, int) else value
    whole = isinstance(rows, list) and all(type(row) is int for row in rows)
    if not whole or len(rows) != batch:
        raise DareInputError(
            f"{NAME}: expected an int, or an integer tensor [batch] = [{batch}]; got "
            f"{list(told.shape) if isinstance(told, torch.Tensor) else repr(told)[:80]}"
            f"{f' of {told.dtype}' if isinstance(told, torch.Tensor) else ''}. Pass how many real "
            "tokens of each row are its prompt"
        )
    return rows
