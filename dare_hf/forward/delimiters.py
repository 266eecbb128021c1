"""Hop delimiters: what they are as token ids, and where one ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache.log import PAD, UNWRITTEN
from dare_hf.errors import DareConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def resolve_delimiters(delimiters: Sequence[Any], processor: Any) -> tuple[tuple[int, ...], ...]:
    """Delimiters as id sequences; strings are encoded by the processor's tokenizer.

    Raises:
        DareConfigError: A string is given but no processor, or it encodes to nothing.
    """
    sequences: list[tuple[int, ...]] = []
    for item in delimiters:
        if isinstance(item, int):
            sequences.append((item,))
        elif isinstance(item, str):
            sequences.append(_encode(item, processor))
        else:
            sequences.append(tuple(int(i) for i in item))
    return tuple(sequences)


def _encode(text: str, processor: Any) -> tuple[int, ...]:
    if processor is None:
        raise DareConfigError(
            "hop_delimiters: expected token ids or id sequences when no processor is given; got "
            f"the string {text!r}. Call apply_dare(model, config, processor=processor)"
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise DareConfigError(
            f"hop_delimiters: expected text with at least one token; got {text!r}"
        )
    return ids


def written_ids(ids: Tensor | None, sampled: Tensor, modality: Tensor) -> Tensor:
    """Long[B, S]: ids of sampled tokens, PAD at pads and UNWRITTEN at all others."""
    others = torch.where(modality == PAD, PAD, UNWRITTEN).long()
    return others if ids is None else torch.where(sampled & (modality != PAD), ids, others)


def delimiter_ends(
    written: Tensor, before: Tensor | None, sequences: Sequence[Sequence[int]], *, padded: bool
) -> Tensor:
    """Bool[B, S]: where a delimiter sequence ends; pads between its ids do not break it.

    Args:
        written: Long[B, S] ids of sampled tokens, as `written_ids` gives them.
        before: Long[B, n] the last ones before them, None when there are none.
        sequences: Delimiters as id sequences.
        padded: Whether there may be pads among `written`.
    """
    joined = written if before is None else torch.cat([before, written], dim=1)
    order = None
    if padded:
        order = (joined != PAD).byte().argsort(dim=1, stable=True)
        joined = joined.gather(1, order)
    found = torch.zeros_like(joined, dtype=torch.bool)
    for sequence in sequences:
        length = len(sequence)
        if joined.shape[1] < length:
            continue
        match = torch.ones_like(joined[:, length - 1 :], dtype=torch.bool)
        for offset, token in enumerate(sequence):
            match &= joined[:, offset : joined.shape[1] - length + 1 + offset] == token
        found[:, length - 1 :] |= match
    if order is not None:
        found = torch.zeros_like(found).scatter(1, order, found)
    return found[:, joined.shape[1] - written.shape[1] :]
