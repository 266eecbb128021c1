"""What is known about one forward: which token is what, in which hop and phase, and how many."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """What is known of one forward before its layers run.

    Tensors are on the model's device; lists are host numbers per row.

    Attributes:
        batch: B rows.
        length: S new columns.
        past: P logical columns before them.
        cache: The cache in use, None for a forward without one.
        modality: Int8[B, S], TEXT, VISION or PAD.
        token_hop: Int32[B, S].
        valid: Bool[B, S], None when no new column is padding.
        always: Bool[B, S] tokens kept by their id; None when no id is.
        span: Bool[B, S] real tokens to be routed as a span; None when there are none.
        forced: Bool[B, S] span tokens that are always kept; None when there is no span.
        span_hop: Hop of each row's span.
        counts: Per row [text, vision] real tokens of the span.
        forced_counts: The same of `forced`.
        sampled: Real sampled tokens per row.
        closing: Per row the logical positions at which a hop closes in this forward.
        span_ends: Per row the logical position at which the prompt's hop 0 ends; None while it
            goes on.
        spans: Per row the logical columns [start, end) of its part of a span that came after other
            tokens: an injection or a new chat turn.
        gaps: Per row those after its prompt that hold no token of it.
        written: Long[B, S] ids of sampled tokens (`written_ids`); None where no delimiter has
            several ids.
        head_rows: Rows the language-model head computes.
    """

    batch: int
    length: int
    past: int
    cache: DareCache | None
    modality: Tensor
    token_hop: Tensor
    valid: Tensor | None
    span_hop: list[int]
    counts: list[list[int]]
    forced_counts: list[list[int]]
    sampled: list[int]
    closing: list[list[int]]
    head_rows: int
    span: Tensor | None = None
    forced: Tensor | None = None
    always: Tensor | None = None
    span_ends: list[int] | None = None
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    gaps: list[list[tuple[int, int]]] = field(default_factory=list)
    written: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.modality.device

    def span_and_forced(self) -> tuple[Tensor, Tensor]:
        """Bool[B, S] twice; only for a forward that has a span."""
        assert self.span is not None
        assert self.forced is not None
        return self.span, self.forced

    @property
    def real_counts(self) -> list[int]:
        """Real new tokens per row."""
        return [sum(c) + s for c, s in zip(self.counts, self.sampled, strict=True)]

    def positions(self) -> Tensor:
        """Long[B, S]: 0-based logical column of each new token, pads included."""
        columns = torch.arange(self.past, self.past + self.length, device=self.device)
        return columns.expand(self.batch, -1)

    @cached_property
    def local_index(self) -> Tensor:
        """Long[B, S]: index of each new token among the row's real tokens so far."""
        real = torch.ones_like(self.modality, dtype=torch.long)
        if self.valid is not None:
            real = self.valid.long()
        before = torch.zeros((self.batch, 1), dtype=torch.long, device=self.device)
        if self.cache is not None and self.past:
            seen = self.cache.log.modality[:, : self.past] >= 0
            before = seen.sum(1, keepdim=True).to(self.device)
        return (before + real.cumsum(1) - 1).clamp(min=0)
