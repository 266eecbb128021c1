"""The masked oracle across hops: which keys a query may see depends on the query's hop.

One full-size forward over a prompt and what was written after it stands for a step-by-step run with
compaction. What each hop keeps is chosen here by the slow loops of `dare_hf.routing.reference`.

Source: docs/method.md, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dare_hf.routing import reference
from dare_hf.testing.oracle import (
    PAD,
    TEXT,
    VISION,
    OracleRouting,
    Scorer,
    _Chooser,
    masked_layers,
    modality_of,
)


@dataclass(frozen=True)
class HopRules:
    """What the oracle needs to know about hops.

    Attributes:
        rates: ``[hop][layer]`` retention as ``(vision, text)``; the last row serves later hops.
        delimiters: Delimiters as id sequences.
        window: Sampled tokens after which a hop closes in any case; None never.
        pooled: Whether tokens of all closed hops compete for one budget.
        cap: Most tokens a layer keeps of closed hops, forced ones included; None for no cap.
    """

    rates: Sequence[Sequence[tuple[float, float]]]
    delimiters: Sequence[Sequence[int]] = ()
    window: int | None = None
    pooled: bool = True
    cap: int | None = None


class HopRun(NamedTuple):
    """What the oracle ran.

    Attributes:
        logits: [B, S, V].
        held: Per layer, Bool[B, S]: tokens the last column's query could see.
        hop: Long[B, S], the hop of each token, -1 for pads.
    """

    logits: Tensor
    held: list[Tensor]
    hop: Tensor


def token_hops(
    ids: Tensor, real: Tensor, span: int, delimiters: Sequence[Sequence[int]], window: int | None
) -> Tensor:
    """Count hops token by token: 0 before column `span`, then up after each that closes one.

    Args:
        ids: Long[B, S].
        real: Bool[B, S], False for pads.
        span: Columns of the prompt.
        delimiters: Delimiters as id sequences, read among sampled tokens only.
        window: Sampled tokens after which a hop closes in any case; None never.

    Returns:
        Long[B, S], -1 for pads.
    """
    hops = torch.full_like(ids, -1)
    for row in range(len(ids)):
        hop, length = 1, 0
        for column in range(ids.shape[1]):
            if column < span:
                hops[row, column] = 0 if real[row, column] else -1
                continue
            hops[row, column] = hop
            length += 1
            written = ids[row, span : column + 1].tolist()
            closes = any(written[-len(end) :] == list(end) for end in delimiters)
            if closes or length == window:
                hop, length = hop + 1, 0
    return hops


@dataclass
class _HopChooser(_Chooser):
    """Chooses the span's tokens as the oracle of one hop does, and what each later hop may see.

    `visible` grows with the layers: the entry of a layer is there when its mask is made.
    """

    hops: HopRules = field(kw_only=True)
    token_hop: Tensor = field(kw_only=True)
    visible: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    alive: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        keep = super().__call__(layer, hidden)
        plan = self._plan(layer)
        self.scores.append(self.scores[plan] if plan < layer else self._all_scores(layer, hidden))
        sources = self.routing.sources
        source = layer if sources is None else sources[layer]
        self.visible.append(self.visible[source] if source < layer else self._seen(layer, keep))
        return keep

    def _all_scores(self, layer: int, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1]).expand_as(self.modality)
        hop = self.token_hop.clamp(min=0)
        found = self.scorer(hidden, self.modality, layer=layer, hop=hop, positions=positions)
        return found.float()

    def _seen(self, layer: int, keep: Tensor) -> Tensor:
        """Bool[B, S, S]: begin one hop after the other, and hide from it what it does not keep."""
        batch, size = keep.shape
        seen = torch.ones(batch, size, size, dtype=torch.bool)
        held = keep.clone()
        for hop in range(1, int(self.token_hop.max()) + 1):
            closed = (self.token_hop >= 0) & (self.token_hop < hop)
            begun = self.token_hop.max(dim=1, keepdim=True).values >= hop
            stays = self._begin(layer, hop, held & closed)
            held = torch.where(begun & closed, stays, held)
            later = self.token_hop >= hop
            seen &= ~(later[:, :, None] & (closed & ~held)[:, None, :])
        return seen

    def _begin(self, layer: int, hop: int, stored: Tensor) -> Tensor:
        """Bool[B, S]: what stays of the closed hops' `stored` tokens when `hop` begins."""
        candidates, scores = stored, self.scores[layer]
        if self.routing.pruned == "drop":
            candidates = candidates & self.alive.setdefault(hop, torch.ones_like(stored))
        forced = self._pinned(hop)
        budgets = self._hop_budgets(layer, hop)
        keep = reference.compaction_keep(
            scores, self.modality, self.token_hop, candidates, forced, budgets
        )
        if self.hops.cap is not None:
            keep = reference.capped_keep(scores, keep, self._tiers(hop, forced), self.hops.cap)
        if self.routing.pruned == "drop":
            self.alive[hop] = self.alive[hop] & ~(stored & ~keep)
        return keep

    def _tiers(self, hop: int, pinned: Tensor) -> list[Tensor]:
        """Bool[B, S] each: last token, prefix of hop 0, other prefixes, ids always kept."""
        tiers = [torch.zeros_like(pinned) for _ in range(3)]
        for row in range(len(pinned)):
            closed = [c for c, own in enumerate(self.token_hop[row].tolist()) if 0 <= own < hop]
            tiers[0][row, closed[-1:]] = True
            for own in range(hop):
                columns = [c for c in closed if int(self.token_hop[row, c]) == own]
                tiers[1 if own == 0 else 2][row, columns[: self.routing.prefix_tokens]] = True
        return [*tiers, pinned]

    def _pinned(self, hop: int) -> Tensor:
        """Bool[B, S]: the first tokens of each closed hop, and ids that are always kept."""
        pinned = torch.zeros_like(self.modality, dtype=torch.bool)
        for row in range(len(pinned)):
            for own in range(hop):
                columns = (self.token_hop[row] == own).nonzero().flatten().tolist()
                for place, column in enumerate(columns):
                    always = int(self.ids[row, column]) in self.routing.always_keep
                    pinned[row, column] = place < self.routing.prefix_tokens or always
        return pinned

    def _hop_budgets(self, layer: int, hop: int) -> Tensor:
        """Long[B, 1 | hops, 2]: text and vision tokens to keep, of all closed hops or of each."""
        rates = self.hops.rates
        vision, text = rates[min(hop, len(rates) - 1)][layer] if hop > 1 else (1.0, 1.0)
        groups = [range(hop)] if self.hops.pooled else [range(own, own + 1) for own in range(hop)]
        rows = []
        for row in range(len(self.modality)):
            wanted = []
            for group in groups:
                own = torch.tensor([int(h) in group for h in self.token_hop[row]])
                kinds = self.modality[row][own]
                counts = [int((kinds == kind).sum()) for kind in (TEXT, VISION)]
                pairs = zip((text, vision), counts, strict=True)
                wanted.append([reference.budget(rate, count) for rate, count in pairs])
            rows.append(wanted)
        return torch.tensor(rows)


@torch.no_grad()
def hop_forward(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    scorer: Scorer,
    routing: OracleRouting,
    hops: HopRules,
    *,
    span: int,
    modality: Tensor | None = None,
) -> HopRun:
    """Run the oracle over a prompt and the sampled tokens after it, hop by hop.

    Args:
        model: An unpatched model.
        inputs: Keyword arguments of its forward, without a cache, as
            :func:`dare_hf.testing.written_inputs` makes them.
        scorer: The scorer that is asked at every selecting layer.
        routing: Rates and rules of the prompt's selection.
        hops: Rates and rules of the hops.
        span: Columns of the prompt.
        modality: [B, S], 0 text, 1 vision, -1 pad (default: what tiny inputs tell).
    """
    ids = inputs["input_ids"]
    modality = modality_of(model, inputs) if modality is None else modality
    hop = token_hops(ids, modality != PAD, span, hops.delimiters, hops.window)
    chooser = _HopChooser(scorer, routing, modality, ids, span, hops=hops, token_hop=hop)
    with masked_layers(model, chooser, chooser.visible) as keep:
        logits = model(**inputs, use_cache=False).logits
    pairs = zip(keep, chooser.visible, strict=True)
    return HopRun(logits, [kept & seen[:, -1] for kept, seen in pairs], hop)
