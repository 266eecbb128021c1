"""A running generate, as the forwards of its sequence see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class GenerationCall:
    """One running `generate`: what tells sampled tokens of its sequence from the prompt.

    The cache of that sequence, and every copy of it, knows the call (`DareCache.call`); a forward
    with another cache is of another sequence, whatever call it happens in.

    Attributes:
        prompt_length: Logical columns before the first sampled token, carried ones included.
        start: Logical columns the cache held when generate began (a carried chat turn).
        modality_mask: The caller's explicit mask over the prompt, or None.
        prompt: Long[B, P] ids generate was given, or None.
        continues: Whether the caller can go on with the cache afterwards.
        cached: Whether its sequence has a cache; without one its ids tell it from others.
        injecting: Whether the running forward brings injected columns: a span, whatever follows.
        running: Whether generate has not returned yet.
        hides_pads_only: Whether its attention mask hides nothing but pads; None before it is asked.
    """

    prompt_length: int
    start: int
    modality_mask: Tensor | None = None
    prompt: Tensor | None = None
    continues: bool = False
    cached: bool = False
    injecting: bool = False
    running: bool = True
    hides_pads_only: bool | None = None

    def __deepcopy__(self, memo: Any) -> GenerationCall:
        """A copy of a cache is of the same call."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """None where it travels to: no generate runs there."""
        return type(None), ()

    def begins(self, ids: Tensor | None) -> bool:
        """Whether [B', S] ids may be of this call's sequence: they begin with its prompt.

        Beams and several returned sequences repeat rows.
        """
        prompt = self.prompt
        if prompt is None or ids is None:
            return True
        rows, length = prompt.shape
        if ids.shape[1] < length or ids.shape[0] % rows:
            return False
        wanted = prompt.to(ids.device).repeat_interleave(ids.shape[0] // rows, dim=0)
        return torch.equal(ids[:, :length], wanted)
