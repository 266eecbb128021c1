"""How many tokens each layer holds of one row, from rates and token counts alone.

A ledger never sees a cache. The report keeps one for each row of a run, and `expected_kv_bytes` one
for a run that has not begun: what is predicted is the same rule, given the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dare_hf.routing.counts import closed_budgets, closed_groups, kept_counts, span_budgets
from dare_hf.routing.kinds import TEXT, VISION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dare_hf.config import DareConfig
    from dare_hf.routing.counts import Counts
    from dare_hf.routing.retention import RetentionTable

    # [groups][text, vision][how many there are, how many of them are forced]
    Available = Sequence[Sequence[Sequence[int]]]


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
        """What the layers keep of a forward's spans, [layers][rows][text, vision].

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
                available = own if self.config.pruned == "drop" else whole
            kept.append(own)
        return kept


@dataclass(frozen=True)
class Held:
    """What one layer holds of one row.

    Attributes:
        groups: [hops][text, vision] at most so many; those of all closed hops in the first entry
            where they compete with each other.
        least: Tokens in all, at least.
        most: Tokens in all, at most; the same number wherever counts decide.
        capped: Whether a cap has taken from what rates had left, here or, under "drop", in a layer
            before: forced ones may be gone as well.
    """

    groups: tuple[tuple[int, int], ...] = ()
    least: int = 0
    most: int = 0
    capped: bool = False

    def plus(self, hop: int, counts: Counts) -> Held:
        """With more tokens of a hop."""
        groups = [*self.groups, *[(0, 0)] * (hop + 1 - len(self.groups))]
        groups[hop] = (groups[hop][TEXT] + counts[TEXT], groups[hop][VISION] + counts[VISION])
        more = sum(counts)
        return replace(self, groups=tuple(groups), least=self.least + more, most=self.most + more)


@dataclass(frozen=True)
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
        whole = closed_groups(tokens, hop, pooled=pooled)
        forced = closed_groups(pinned, hop, pooled=pooled)
        done: list[Held] = []
        before: _Shallower | None = None
        for index, layer in enumerate(self._with_sampled(hop, tokens)):
            step = _Step(
                hop=hop,
                held=closed_groups(layer.groups, hop, pooled=pooled),
                budgets=closed_budgets(rules.table, index, hop, whole),
                forced=forced,
                cap=rules.config.max_kv_tokens,
                before=before,
            )
            held, left = step.taken(layer, None if available is None else available.get(index))
            if rules.config.pruned == "drop":
                before = replace(left, nested=not rules.exempt)
            done.append(held)
        return replace(
            self,
            layers=tuple(done),
            begun=hop,
            seen=sum(map(sum, tokens[:hop])) + sum(t + v for h, t, v in self.spans if h >= hop),
            spans=tuple(span for span in self.spans if span[0] >= hop),
            end=max(end, self.end),
        )

    def _with_sampled(self, hop: int, tokens: Sequence[Counts]) -> tuple[Held, ...]:
        """The layers with the sampled tokens of the hops that close."""
        layers = self.layers
        for own in range(self.begun, min(hop, len(tokens))):
            spans = [span[1:] for span in self.spans if span[0] == own]
            more = [tokens[own][m] - sum(span[m] for span in spans) for m in (TEXT, VISION)]
            if any(more):
                layers = tuple(layer.plus(own, more) for layer in layers)
        return layers


@dataclass(frozen=True)
class _Shallower:
    """What the layers before leave to a layer under "drop", where a hop begins.

    Attributes:
        kept: [groups][text, vision] at most so many are left.
        lost: [groups][text, vision] at most so many of the next layer's are gone.
        cut: At most so many more of them, of whatever group.
        most: In all at most so many are left.
        nested: Whether every layer holds only what the one before it holds.
    """

    kept: list[list[int]]
    lost: list[list[int]]
    cut: int
    most: int
    nested: bool = True


@dataclass(frozen=True)
class _Step:
    """The begin of a hop in one layer of one row; groups as `closed_groups` makes them.

    Attributes:
        hop: The hop.
        held: What the layer holds of each group, at most.
        budgets: What it is to keep of each.
        forced: Tokens of each that no rate removes.
        cap: `max_kv_tokens`.
        before: What is gone from the layers before, where that counts.
    """

    hop: int
    held: list[list[int]]
    budgets: list[list[int]]
    forced: list[list[int]]
    cap: int | None
    before: _Shallower | None

    def taken(self, layer: Held, known: Available | None) -> tuple[Held, _Shallower]:
        """What the layer holds afterwards, and what that leaves to the next one."""
        before, opened = self.before, layer.groups[self.hop :]
        extra = sum(map(sum, opened))
        kept = list(map(kept_counts, self.budgets, self.forced, self._candidates()))
        lost = self._lost(capped=layer.capped)
        most = min(layer.most - extra, sum(map(sum, kept)))
        cut = 0
        if before is not None:
            most = min(most, before.most) if before.nested else most
            cut = before.cut
        least = min(most, max(layer.least - extra - sum(map(sum, lost)) - cut, 0))
        if known is not None and least < most:
            kept = [
                kept_counts(k, [m[1] for m in group], [m[0] for m in group])
                for k, group in zip(self.budgets, known, strict=False)
            ]
            least = most = sum(map(sum, kept))
        over = 0 if self.cap is None else max(most - self.cap, 0)
        most, least = most - over, min(least, most - over)
        closed = [(own[TEXT], own[VISION]) for own in kept]
        closed += [(0, 0)] * (self.hop - len(closed))
        capped = layer.capped or cut + over > 0
        held = Held((*closed, *opened), least + extra, most + extra, capped)
        return held, _Shallower(kept, lost, cut + over, most)

    def _candidates(self) -> list[list[int]]:
        """[groups][text, vision] what is left to choose from, at most."""
        if self.before is None or not self.before.nested:
            return self.held
        pairs = zip(self.held, self.before.kept, strict=True)
        return [[min(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]

    def _lost(self, *, capped: bool) -> list[list[int]]:
        """[groups][text, vision] what goes, of what the layer held, at most.

        A group loses what is beyond its budget, or what is gone from a layer before: in the worst
        case all of that was among the layer's own.
        """
        lost = []
        for group, held in enumerate(self.held):
            row = []
            for m in (TEXT, VISION):
                budget = self.budgets[group][m]
                sure = budget if capped else max(budget, self.forced[group][m])
                beyond = max(held[m] - sure, 0)
                gone = 0 if self.before is None else self.before.lost[group][m]
                nested = self.before is None or self.before.nested
                row.append(max(beyond, gone) if nested else beyond + gone)
            lost.append(row)
        return lost
