"""How many tokens each layer holds of one row, from rates and token counts alone.

A ledger never sees a cache. The report keeps one for each row of a run, and `expected_kv_bytes` one
for a run that has not begun: what is predicted is the same rule, given the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dare_hf.routing.counts import (
    by_hop,
    closed_budgets,
    closed_groups,
    kept_counts,
    span_budgets,
)
from dare_hf.routing.kinds import TEXT, VISION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from dare_hf.config import DareConfig
    from dare_hf.routing.counts import Counts
    from dare_hf.routing.retention import RetentionTable

    # [groups][text, vision][how many there are, how many of them are forced]
    Available = Sequence[Sequence[Sequence[int]]]

# Tensors here are on the host: of what grows with the hops nothing is a loop.


@dataclass(frozen=True)
class LedgerRules:
    """What decides how many tokens are kept, beside counts.

    Attributes:
        config: The configuration.
        table: Rates by hop, layer and modality.
        exempt: Layers that keep everything of a span, and from how many columns on.
    """

    config: DareConfig
    table: RetentionTable
    exempt: Mapping[int, int]

    def span(
        self,
        hops: Sequence[int],
        counts: Sequence[Counts],
        forced: Sequence[Counts],
        length: int,
    ) -> list[list[list[int]]]:
        """What the layers store of a forward's spans; the arguments and the result as `ran`."""
        ran = self.ran(hops, counts, forced, length)
        return [[list(row) for row in counts] for _ in ran] if self.config.freezes else ran

    def ran(
        self,
        hops: Sequence[int],
        counts: Sequence[Counts],
        forced: Sequence[Counts],
        length: int,
    ) -> list[list[list[int]]]:
        """What the layers run of a forward's spans, [layers][rows][text, vision].

        Args:
            hops: Per row the hop of its span.
            counts: Per row its real tokens.
            forced: Per row how many of them no selection drops.
            length: Logical columns up to the end of this forward.
        """
        equal = self.config.batch_budget == "equal"
        whole = [list(row) for row in counts]
        available, kept = whole, []
        for layer in range(len(self.table.plan_layers)):
            least = self.exempt.get(layer)
            own = whole
            if least is None or length < least:
                budgets = span_budgets(self.table, layer, hops, counts, equal=equal)
                own = list(map(kept_counts, budgets, forced, available))
                # a layer that keeps everything brings nothing back
                available = own if self.config.drops else whole
            kept.append(own)
        return kept


@dataclass(frozen=True, eq=False)
class Held:
    """What one layer holds of one row.

    Attributes:
        groups: Long[hops, 2] text, vision, at most so many; those of all closed hops in the first
            entry where they compete with each other.
        least: Tokens in all, at least.
        most: Tokens in all, at most; the same number wherever counts decide.
        capped: Whether a cap has taken from what rates had left, here or, under "drop", in a layer
            before: forced ones may be gone as well.
    """

    groups: Tensor
    least: int = 0
    most: int = 0
    capped: bool = False

    @staticmethod
    def nothing() -> Held:
        """An empty layer."""
        return Held(by_hop([]))

    def plus(self, hop: int, counts: Counts, *, sure: bool = True) -> Held:
        """With more tokens of a hop, or at most so many."""
        longer = max(hop + 1 - len(self.groups), 0)
        groups = torch.nn.functional.pad(self.groups, (0, 0, 0, longer))
        groups[hop] += by_hop([counts])[0]
        more = sum(counts)
        least = self.least + more if sure else self.least
        return replace(self, groups=groups, least=least, most=self.most + more)


@dataclass(frozen=True, eq=False)
class Ledger:
    """What the layers hold of one row; it is never changed, so that rows may share one.

    Attributes:
        layers: What each layer holds of closed hops and of spans; sampled tokens of hops from
            `begun` on come on top, in every layer.
        begun: The hop whose begin was served last.
        seen: Real tokens that `layers` speaks of, those that are gone counted.
        spans: (hop, text, vision) tokens of spans of hops from `begun` on.
        end: Logical columns these tokens reach to.
    """

    layers: tuple[Held, ...]
    begun: int = 0
    seen: int = 0
    spans: tuple[tuple[int, int, int], ...] = ()
    end: int = 0

    def with_span(self, hop: int, counts: Counts, kept: Sequence[Counts], end: int) -> Ledger:
        """After a span.

        Args:
            hop: Its hop.
            counts: Its real tokens.
            kept: [layers][text, vision] what each layer keeps of them.
            end: Logical columns up to its end.
        """
        return replace(
            self,
            layers=tuple(map(Held.plus, self.layers, [hop] * len(kept), kept)),
            seen=self.seen + sum(counts),
            spans=(*self.spans, (hop, counts[TEXT], counts[VISION])),
            end=end,
        )

    def with_begin(
        self,
        hop: int,
        tokens: Sequence[Counts],
        pinned: Sequence[Counts],
        rules: LedgerRules,
        end: int,
        available: Mapping[int, Available] | None = None,
    ) -> Ledger:
        """After the begin of a hop: every layer is pruned anew.

        Args:
            hop: The hop that begins.
            tokens: [hops][text, vision] all real tokens of the row.
            pinned: [hops][text, vision] tokens that no rate removes.
            rules: What decides.
            end: Logical columns before it.
            available: By layer what there was to choose from, for where counts do not say it.

        Source: docs/method.md, section 5.
        """
        pooled = rules.config.resolved_hop_budget == "pooled"
        whole, forced = (
            closed_groups(by_hop(counts), hop, pooled=pooled) for counts in (tokens, pinned)
        )
        layers = self._with_sampled(hop, tokens, sure=rules.config.decode == "full")
        summary = rules.config.hop_summary
        budgets = closed_budgets(rules.table, range(len(layers)), [hop], whole[None], summary)[:, 0]
        drops, done = rules.config.drops, list[Held]()
        before: _Shallower | None = None
        # Under "drop" a layer waits for the one before it; else they are counted together.
        size = 1 if drops else max(len(layers), 1)
        for start in range(0, len(layers), size):
            part = range(start, min(start + size, len(layers)))
            step = _Step(
                hop=hop,
                pooled=pooled,
                budgets=budgets[part.start : part.stop],
                forced=forced,
                cap=rules.config.max_kv_tokens,
                before=before,
                known=[None if available is None else available.get(i) for i in part],
            )
            held, left = step.taken([layers[i] for i in part])
            before = replace(left, nested=not rules.exempt) if drops else None
            done += held
        return replace(
            self,
            layers=tuple(done),
            begun=hop,
            seen=sum(map(sum, tokens[:hop])) + sum(t + v for h, t, v in self.spans if h >= hop),
            spans=tuple(span for span in self.spans if span[0] >= hop),
            end=max(end, self.end),
        )

    def _with_sampled(self, hop: int, tokens: Sequence[Counts], *, sure: bool) -> tuple[Held, ...]:
        """The layers with the sampled tokens of the hops that close, `sure` that none skipped."""
        layers = self.layers
        for own in range(self.begun, min(hop, len(tokens))):
            spans = [span[1:] for span in self.spans if span[0] == own]
            more = [tokens[own][m] - sum(span[m] for span in spans) for m in (TEXT, VISION)]
            if any(more):
                layers = tuple(layer.plus(own, more, sure=sure) for layer in layers)
        return layers


@dataclass(frozen=True, eq=False)
class _Shallower:
    """What the layers before leave to a layer under "drop", where a hop begins.

    Attributes:
        kept: Long[1, groups, 2] at most so many are left.
        lost: Long[1, groups, 2] at most so many of the next layer's are gone.
        cut: Long[1] at most so many more of them, of whatever group.
        most: Long[1] in all at most so many are left.
        nested: Whether every layer holds only what the one before it holds.
    """

    kept: Tensor
    lost: Tensor
    cut: Tensor
    most: Tensor
    nested: bool = True


@dataclass(frozen=True, eq=False)
class _Step:
    """The begin of a hop in some layers of one row; groups as `closed_groups` makes them.

    Attributes:
        hop: The hop.
        pooled: Whether all closed hops are one group.
        budgets: Long[layers, groups, 2] what is to be kept of each.
        forced: Long[groups, 2] tokens of each that no rate removes.
        cap: `max_kv_tokens`.
        before: What is gone from the layers before, where that counts.
        known: By layer what there is to choose from, for where counts do not say it.
    """

    hop: int
    pooled: bool
    budgets: Tensor
    forced: Tensor
    cap: int | None
    before: _Shallower | None
    known: Sequence[Available | None]

    def taken(self, layers: Sequence[Held]) -> tuple[list[Held], _Shallower]:
        """What the layers hold afterwards, and what that leaves to the next one."""
        before, groups = self.before, _alike([layer.groups for layer in layers])
        opened = groups[:, self.hop :]
        extra = opened.sum((1, 2))
        held = closed_groups(groups, self.hop, pooled=self.pooled)
        capped = torch.tensor([layer.capped for layer in layers])
        lost = self._lost(held, capped)
        left = held
        if before is not None and before.nested:
            left = held.minimum(before.kept)
        kept = _kept(self.budgets, self.forced, left)
        most = torch.tensor([layer.most for layer in layers]) - extra
        most = most.minimum(kept.sum((1, 2)))
        if before is not None and before.nested:
            most = most.minimum(before.most)
        cut = torch.zeros_like(most) if before is None else before.cut
        least = torch.tensor([layer.least for layer in layers]) - extra - lost.sum((1, 2)) - cut
        least = least.clamp(min=0).minimum(most)
        kept, least, most = self._as_known(kept, least, most)
        over = torch.zeros_like(most) if self.cap is None else (most - self.cap).clamp(min=0)
        most, cut = most - over, cut + over
        least, capped = least.minimum(most), capped | (cut > 0)
        filled = torch.nn.functional.pad(kept, (0, 0, 0, self.hop - kept.shape[1]))
        columns = (
            torch.cat([filled, opened], dim=1).unbind(),
            (least + extra).tolist(),
            (most + extra).tolist(),
            capped.tolist(),
        )
        after = [Held(*row) for row in zip(*columns, strict=True)]
        return after, _Shallower(kept, lost, cut, most)

    def _as_known(self, kept: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, where counts leave it open, from what there was to choose from."""
        told = [least[i] < most[i] and known is not None for i, known in enumerate(self.known)]
        for i, known in enumerate(self.known):
            if not told[i]:
                continue
            there = torch.tensor(known)[: kept.shape[1]]
            kept[i] = _kept(self.budgets[i], there[..., 1], there[..., 0])
            least[i] = most[i] = kept[i].sum()
        return kept, least, most

    def _lost(self, held: Tensor, capped: Tensor) -> Tensor:
        """Long[layers, groups, 2] what goes, of what the layers held, at most.

        A group loses what is beyond its budget, or what is gone from a layer before: in the worst
        case all of that was among the layer's own.
        """
        sure = self.budgets.maximum(self.forced)
        beyond = (held - torch.where(capped[:, None, None], self.budgets, sure)).clamp(min=0)
        if self.before is None:
            return beyond
        gone = self.before.lost
        return beyond.maximum(gone) if self.before.nested else beyond + gone


def _alike(groups: Sequence[Tensor]) -> Tensor:
    """Long[layers, hops, 2], hops that a layer has not come to filled up."""
    hops = max(map(len, groups))
    pads = [(0, 0, 0, hops - len(own)) for own in groups]
    pairs = zip(groups, pads, strict=True)
    return torch.stack([torch.nn.functional.pad(own, pad) for own, pad in pairs])


def _kept(budgets: Tensor, forced: Tensor, available: Tensor) -> Tensor:
    """`kept_counts` of many groups."""
    return budgets.maximum(forced).minimum(available)
