"""One forward as its layers pass: what a layer leaves to the next ones, to scorers and to hops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.forward.facts import ForwardContext
    from dare_hf.forward.plan import Plan


@dataclass(eq=False)
class Run:
    """The facts of a forward, and what changes while it runs.

    Attributes:
        context: The facts.
        plans: Per layer the plan it ran with.
        attention_score: Float[B, S] running score of the attention scorer.
        attention_layer: The layer whose attention gave it last.
        raters: Bool[B, S] the text whose attention scores (`text_raters`); None where there is no
            such choice.
        frozen: Key and value [B, Hkv, C, d] of all tokens of the layer that runs now, where some
            only have theirs stored (pruned="freeze"); () while they are being made, None else.
        running: Long[B|1, K] logical position of each query of the layer that runs now, where its
            last keys are not those of its queries; None else.
        rotary: The rotary embedding of the layer that runs now, cosines and sines; None where it is
            given none.
        columns: Long[B|1, C] logical position of each key of the layer that runs now.
        column_scores: Float32[B, C'] stored scores of the cached ones among them.
        capture_layer: The layer that runs now and whose attention is to be read, -1 none.
    """

    context: ForwardContext
    plans: dict[int, Plan] = field(default_factory=dict)
    attention_score: Tensor | None = None
    attention_layer: int = -1
    raters: Tensor | None = None
    frozen: tuple[Tensor, ...] | None = None
    running: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    columns: Tensor | None = None
    column_scores: Tensor | None = None
    capture_layer: int = -1

    def running_columns(self, columns: Tensor, count: int) -> Tensor:
        """Long[B|1, K]: position of each of `count` queries, `columns` those of the keys."""
        return columns[:, columns.shape[1] - count :] if self.running is None else self.running

    def release(self) -> None:
        """Let go of what was gathered: it would hold the tensors a recomputation is found by."""
        self.rotary = None
        for plan in self.plans.values():
            plan.gathered = None
