"""Which tokens of a forward run one of its layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.routing.kinds import TEXT
from dare_hf.routing.selection import last_columns

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.forward.facts import ForwardContext
    from dare_hf.routing.clusters import Merged


@dataclass
class Plan:
    """Which tokens run; shared by the layers that reuse it.

    Attributes:
        kept: Per row the real [text, vision] span tokens that run.
        width: K, columns the layer sees.
        index: Long[B, K] running columns in position order, fills first; None when all S run.
        live: Bool[B, K], False for pads and for tokens that only fill a ragged row; None if all
            are live.
        keep: Bool[B, S] the running tokens; None when all real ones run.
        scores: Float32[B, S] they were chosen by, None where none were needed.
        ran: Per row the sampled tokens that run; None where all do.
        chosen: Per row whether anything was chosen in it; () where nothing was in any.
        merged: What takes the places of some of the running tokens where this layer begins.
        cut: Whether transformers hands the layer its last columns only.
        gathered: What was gathered for this plan, by argument name and identity; None once the
            forward is over (kept, it would hold the very tensors a recomputation is found by).
    """

    kept: list[list[int]]
    width: int
    index: Tensor | None = None
    live: Tensor | None = None
    keep: Tensor | None = None
    scores: Tensor | None = None
    ran: list[int] | None = None
    chosen: tuple[bool, ...] = ()
    merged: Merged | None = None
    cut: bool = False
    gathered: dict[Any, tuple[Any, Any]] | None = field(default_factory=dict)
    _queries: tuple[Tensor, Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether the layer runs on HF's own tensors: nothing pruned, only pads may be dead."""
        return self.keep is None

    def inputs(self, hidden: Tensor, layer: int) -> Tensor:
        """What `layer` reads: [B, S, D] with the merged vectors where they are to be."""
        if self.merged is None or self.merged.layer != layer:
            return hidden
        places = (self.merged.rows.to(hidden.device), self.merged.columns.to(hidden.device))
        return hidden.index_put(places, self.merged.vectors.to(hidden))

    def rows(self, context: ForwardContext) -> Tensor:
        """Long[B|1, K]: running columns among the S new ones."""
        if self.index is not None:
            return self.index
        return torch.arange(context.length, device=context.device)[None]

    def running(self, context: ForwardContext) -> list[int]:
        """Real tokens per row that run, sampled ones included."""
        sampled = context.sampled if self.ran is None else self.ran
        return [sum(k) + s for k, s in zip(self.kept, sampled, strict=True)]

    def idle(self, context: ForwardContext) -> bool:
        """Whether no token runs: all that the forward brings are sampled, and skip."""
        return self.ran is not None and not any(self.running(context))

    def take(self, tensor: Tensor, fill: Any = None) -> Tensor:
        """[B, S] brought to [B, K]; dead columns take `fill` where it is given."""
        taken = tensor if self.index is None else tensor.gather(1, self.index)
        if fill is None or self.live is None:
            return taken
        return taken.masked_fill(~self.live, fill)

    def span_live(self, context: ForwardContext) -> Tensor:
        """Bool[B, K]: running tokens that belong to the span."""
        span = self.take(context.span_and_forced()[0])
        return span if self.live is None else span & self.live

    def queries(self, context: ForwardContext, window: int) -> tuple[Tensor, Tensor]:
        """The last `window` running text tokens of the span, any modality where text is fewer.

        Returns:
            Long[B, W] their columns among the K, and Bool[B, W] which of them there are.
        """
        if self._queries is None:
            span = self.span_live(context)
            text = span & (self.take(context.modality) == TEXT)
            enough = text.sum(1, keepdim=True) >= window
            eligible = torch.where(enough, text, span)
            self._queries = last_columns(eligible, window)
        return self._queries

    def tail(self, context: ForwardContext, width: int) -> Plan:
        """The plan of a layer that transformers hands the last `width` columns only.

        They all run: the span's last token is forced, and sampled ones follow it.
        """
        last = torch.arange(context.length - width, context.length, device=context.device)
        index = last.expand(context.batch, -1)
        live = None if context.valid is None else context.valid[:, -width:]
        ends = [[int(any(row)), 0] for row in context.counts]
        real = context.modality >= 0
        return Plan(ends, width, index, live, real, self.scores, cut=True, gathered=None)

    def spread(self, scores: Tensor, previous: Tensor | None, context: ForwardContext) -> Tensor:
        """[B, K] scores written into the full [B, S]; tokens that did not run keep their last."""
        if self.index is None and self.live is None:
            return scores
        shape = (context.batch, context.length)
        base = scores.new_zeros(shape) if previous is None else previous
        if self.live is not None:
            scores = torch.where(self.live, scores, self.take(base))
        return scores if self.index is None else base.scatter(1, self.index, scores)
