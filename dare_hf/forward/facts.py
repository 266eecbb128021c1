"""What is known about one forward: which token is what, in which hop and phase, and how many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.engine.plan import Plan
    from dare_hf.hops.in_forward import InnerHops
    from dare_hf.routing.selection import Competitors
    from dare_hf.simulation import Simulation


@dataclass(frozen=True)
class KeyView:
    """The keys one layer attends to, for the layers that read them too.

    Attributes:
        columns: Long[B|1, C] logical position of each key, -1 for holes; the new ones last.
        cached: How many of them were stored before this forward.
        holes: Whether some are -1.
        gathered: Whether HF's logical mask does not fit them.
    """

    columns: Tensor
    cached: int
    holes: bool
    gathered: bool


@dataclass
class ForwardContext:
    """One forward. Tensors are on the model's device; lists are host numbers per row.

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
        plans: Per layer the plan it ran with.
        keys: What other layers read of a layer's keys, by its index.
        competitors: Who takes part in the selections of the span, once a layer has selected.
        full_plan: The plan under which all real tokens run, once a layer has asked for it.
        cached_before: Per layer the real tokens per row its cache held before.
        attention_score: Float[B, S] running score of the attention scorer.
        attention_layer: The layer whose attention gave it last.
        raters: Bool[B, S] the text whose attention scores (`text_raters`); None where there is no
            such choice.
        frozen: Key and value [B, Hkv, C, d] of all tokens of the layer that runs now, where some
            only have theirs stored (pruned="freeze"); () while they are being made, None else.
        running: Long[B|1, K] logical position of each query of the layer that runs now, where its
            last keys are not those of its queries; None else.
        never_skips: Bool[B, S] tokens that skip no layer, once a layer has asked (routed decode).
        rotary: The rotary embedding of the layer that runs now, cosines and sines; None where it is
            given none.
        columns: Long[B|1, C] logical position of each key of the layer that runs now.
        column_scores: Float32[B, C'] stored scores of the cached ones among them.
        inner_hops: The hops that begin inside this forward, None where none does.
        simulation: What a training forward runs its layers by; None on the compact path.
        capture_layer: The layer that runs now and whose attention is to be read, -1 none.
        step: Whether it only brings every row's next token, and nothing is decided in it.
        hides_pads_only: Of a step, whether its mask is known to hide nothing but pads.
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
    plans: dict[int, Plan] = field(default_factory=dict)
    keys: dict[int, KeyView] = field(default_factory=dict)
    cached_before: dict[int, list[int]] = field(default_factory=dict)
    competitors: Competitors | None = None
    full_plan: Plan | None = None
    attention_score: Tensor | None = None
    attention_layer: int = -1
    raters: Tensor | None = None
    frozen: tuple[Tensor, ...] | None = None
    running: Tensor | None = None
    never_skips: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    columns: Tensor | None = None
    column_scores: Tensor | None = None
    inner_hops: InnerHops | None = None
    simulation: Simulation | None = None
    capture_layer: int = -1
    step: bool = False
    hides_pads_only: bool = False
    _local_index: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.modality.device

    def release(self) -> None:
        """Let go of what was gathered: it would hold the tensors a recomputation is found by."""
        self.rotary = None
        for plan in self.plans.values():
            plan.gathered = None
        if self.simulation is not None:
            self.simulation.close()

    def span_and_forced(self) -> tuple[Tensor, Tensor]:
        """Bool[B, S] twice; only for a forward that has a span."""
        assert self.span is not None
        assert self.forced is not None
        return self.span, self.forced

    @property
    def real_counts(self) -> list[int]:
        """Real new tokens per row."""
        return [sum(c) + s for c, s in zip(self.counts, self.sampled, strict=True)]

    def running_columns(self, columns: Tensor, count: int) -> Tensor:
        """Long[B|1, K]: position of each of `count` queries, `columns` those of the keys."""
        return columns[:, columns.shape[1] - count :] if self.running is None else self.running

    def positions(self) -> Tensor:
        """Long[B, S]: 0-based logical column of each new token, pads included."""
        columns = torch.arange(self.past, self.past + self.length, device=self.device)
        return columns.expand(self.batch, -1)

    def local_index(self) -> Tensor:
        """Long[B, S]: index of each new token among the row's real tokens so far."""
        if self._local_index is None:
            real = torch.ones_like(self.modality, dtype=torch.long)
            if self.valid is not None:
                real = self.valid.long()
            before = torch.zeros((self.batch, 1), dtype=torch.long, device=self.device)
            if self.cache is not None and self.past:
                seen = (self.cache.log.modality >= 0).sum(1, keepdim=True)
                before = seen.to(self.device)
            self._local_index = (before + real.cumsum(1) - 1).clamp(min=0)
        return self._local_index
