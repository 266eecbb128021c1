"""The masked oracle over tokens that a run says it kept: is it what the scores ask for?

In half precision two right runs may take another token each where scores all but tie, so sets of
tokens cannot be compared. The oracle therefore runs what was kept, and tells how far the scores of
what it would have kept instead are from those.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dare_hf.testing.oracle import TEXT, VISION, _Chooser, masked_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from dare_hf.testing.oracle import OracleRouting, Scorer


class GivenRun(NamedTuple):
    """What the oracle ran.

    Attributes:
        logits: [B, last, V].
        miscounted: `(layer, row, modality, kept, expected)` where other numbers are kept.
        farthest: The most that a token left out scores above one that was kept for it.
    """

    logits: Tensor
    miscounted: list[tuple[int, int, int, int, int]]
    farthest: float


@dataclass
class _Follower(_Chooser):
    """Keeps what it is given, and compares that with what it would have kept."""

    given: Sequence[Tensor] = field(kw_only=True)
    miscounted: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    farthest: float = 0.0

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        wanted, given = super().__call__(layer, hidden).cpu(), self.given[layer].cpu()
        self.keeps[-1] = given  # what later layers reuse or depend on
        columns = torch.arange(hidden.shape[1]).expand_as(self.modality)
        scores = self.scorer(
            hidden,
            self.modality,
            layer=layer,
            hop=(columns >= self.span).long(),
            positions=columns,
        ).float()
        for row in range(len(given)):
            for kind in (TEXT, VISION):
                own = self.modality[row] == kind
                counts = int((given[row] & own).sum()), int((wanted[row] & own).sum())
                if counts[0] != counts[1]:
                    self.miscounted.append((layer, row, kind, *counts))
                missed = scores[row][own & wanted[row] & ~given[row]]
                taken = scores[row][own & given[row] & ~wanted[row]]
                if len(missed) and len(taken):
                    self.farthest = max(self.farthest, float(missed.max() - taken.min()))
        return given.to(hidden.device)


@torch.no_grad()
def given_forward(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    given: Sequence[Tensor],
    last: int,
    choice: tuple[Scorer, OracleRouting, Tensor, int] | None,
) -> GivenRun:
    """Run the oracle with the tokens that a run kept.

    Args:
        model: An unpatched model whose attention takes a 4D mask (sdpa, eager).
        inputs: Keyword arguments of its forward, without a cache.
        given: Per layer, Bool[B, S]: what the run kept.
        last: Columns at the end whose logits are wanted.
        choice: Scorer, routing, modality [B, S] on the CPU (0 text, 1 vision, -1 pad) and columns
            of the prompt, by which the choice is judged; None where the scores cannot be asked.
    """
    follower = None
    if choice is not None:
        scorer, routing, modality, span = choice
        ids = inputs["input_ids"].cpu()
        follower = _Follower(scorer, routing, modality, ids, span, given=given)
    with masked_layers(model, follower or (lambda layer, hidden: given[layer])):
        some = "logits_to_keep" in inspect.signature(model.forward).parameters
        kept = {"logits_to_keep": last} if some else {}
        logits = model(**inputs, use_cache=False, **kept).logits[:, -last:]
    if follower is None:
        return GivenRun(logits, [], 0.0)
    return GivenRun(logits, follower.miscounted, follower.farthest)
