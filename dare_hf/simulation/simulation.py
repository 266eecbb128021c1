"""One training forward: per layer, which token runs and which key the queries of each hop see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache import TokenLog
from dare_hf.forward.run import Run
from dare_hf.hops.eviction import HopPruner, StoredTokens, never_thins
from dare_hf.routing import gates
from dare_hf.routing.first import span_keep
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.losses import group_means
from dare_hf.routing.retention import budget
from dare_hf.routing.stale import MOMENTUM, mean_updates
from dare_hf.simulation.competition import Competition, soft_gates
from dare_hf.simulation.skipping import skips_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.config import DareConfig
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.routing.retention import RetentionTable
    from dare_hf.simulation.setup import Setup

Counts = list[list[list[int]]]  # [row][hop][text | vision]
MODALITIES = (TEXT, VISION)


@dataclass
class Route:
    """Which tokens run a layer; shared by the layers that reuse it.

    Attributes:
        run: Bool[B, S]; sampled tokens always do, and pads, whose update nobody sees.
        gate: Float[B, S] its straight-through gate; under "drop" the product over the depth.
        scores: Float32[B, S] with the router's gradient.
        ranked: Float32[B, S] what tokens are ranked by: scores, with noise where there is any.
    """

    run: Tensor
    gate: Tensor
    scores: Tensor
    ranked: Tensor


@dataclass
class SimulationRecord:
    """What the auxiliary losses read of one training forward, by selecting layer.

    The tokens of a hop that brings none of a modality are those of the hops before it: its rate is
    the one by which they are thinned when it begins.

    Attributes:
        layers: Their indices.
        rates: Float[H, 2] rho of text and vision.
        means: Float[B, H, 2] mean score of each hop's tokens.
        excess: Float[B, H] mean of max(0, s - epsilon) over each hop's vision tokens.
        present: Bool[B, H] hops a row has.
        seen: Bool[B, H, 2] whether a row's hop has tokens of the modality.
    """

    present: Tensor
    seen: Tensor
    layers: list[int] = field(default_factory=list)
    rates: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    excess: list[Tensor] = field(default_factory=list)


class Simulation(Run):
    """A training forward: its gates, layer by layer in order.

    Args:
        context: The forward; its span holds the prompt and all injected spans.
        log: Modality and hop of its tokens.
        setup: What it is simulated by.
        noise: Draws the Gumbel selector's noise; None outside training.

    Attributes:
        record: What the auxiliary losses read.
        closed: Whether the forward is over and its tensors are gone.

    Source: docs/method.md, section 7.
    """

    def __init__(
        self,
        context: ForwardContext,
        log: TokenLog,
        setup: Setup,
        noise: torch.Generator | None,
    ) -> None:
        super().__init__(context)
        self.setup, self.noise, self.training = setup, noise, setup.training
        self.config, self.table, self.routers = setup.config, setup.table, setup.routers
        self.closed = False
        span, _ = context.span_and_forced()
        self.spans = _spans(context, span)
        self.columns = context.positions()
        counts = log.counts_by_hop()
        self.hops = max((len(row) for row in counts), default=1)
        self.pruners = _pruners(log, counts, self.hops, self.config, self.table)
        self.masks: dict[Any, tuple[Any, Tensor]] = {}
        self._routes: dict[int, Route] = {}
        self._hop_gates: dict[int, Tensor] = {}
        self._shared: dict[int, Tensor | None] = {}
        self._updates: list[tuple[Tensor, Tensor, Tensor]] = []
        hop = context.token_hop.long()
        groups = (hop * 2 + context.modality).masked_fill(context.modality == PAD, 2 * self.hops)
        onehot = torch.nn.functional.one_hot(groups, 2 * self.hops + 1)[..., :-1]
        own = onehot.view(*hop.shape, self.hops, 2)
        own_or_before = torch.where(own.any(1, keepdim=True), own, own.cumsum(2))
        self._groups = own_or_before.flatten(2).float()
        present = own.any(1).any(-1)
        self.record = SimulationRecord(present, own_or_before.any(1) & present[..., None])

    @property
    def multiplies(self) -> bool:
        """Whether a layer's update is really multiplied by the score."""
        in_training = self.config.score_scaling == "multiply_training"
        return self.config.multiplies or (in_training and self.training)

    @property
    def learns_rates(self) -> bool:
        """Whether the rates are the routers'."""
        return self.routers is not None and self.config.learns_rates

    def learns(self, index: int) -> bool:
        """Whether the router of a layer wants gradients from this forward."""
        if self.routers is None or not torch.is_grad_enabled():
            return False
        return any(
            p.requires_grad for p in self.routers[self.table.plan_layers[index]].parameters()
        )

    def note_update(self, vectors: Tensor, change: Tensor, learns: bool) -> None:
        """Take down what a layer adds to tokens, for its running mean: those that may be pruned.

        Args:
            vectors: Float32[2, D] the layer's mean update.
            change: [B, S, D] its output minus its input.
            learns: Whether its router is being trained.
        """
        if self.training and learns:
            wanted = ~self.context.span_and_forced()[1]
            self._updates.append((vectors, *mean_updates(change, wanted, self.context.modality)))

    @torch.no_grad()
    def learn_updates(self) -> None:
        """Bring the running means a step on; once the forward went well."""
        for vectors, sums, counts in self._updates:
            seen = (counts > 0)[:, None]
            mean = sums / counts.clamp(min=1)[:, None]
            moved = torch.lerp(vectors, mean.to(vectors), MOMENTUM)
            vectors.copy_(torch.where(seen, moved, vectors))

    def release(self) -> None:
        """The forward is over: let go of its tensors, the record's too for who took it has it."""
        super().release()
        self.closed = True
        self.masks, self._routes, self._hop_gates, self.pruners = {}, {}, {}, []
        self._shared, self._updates = {}, []
        self.record = SimulationRecord(self.record.present, self.record.seen)

    def route(self, layer: nn.Module, index: int, hidden: Tensor) -> Route:
        """The route of layer `index`, whose input is `hidden` [B, S, D]."""
        source = self.table.plan_layers[index]
        route = self._routes.get(source) if source != index else None
        self._routes[index] = route = route or self._select(layer, index, hidden)
        return route

    def key_gates(self, index: int, route: Route) -> Tensor | None:
        """Float[B, H, S]: how far queries of each hop see each key; None where they see all."""
        sources = self.setup.anatomy.sources
        source = sources[index]
        if source != index:
            return self._shared[source]
        found = None if self._keeps_all(index) else self._key_gates(index, route)
        if sources.count(index) > 1:
            self._shared[index] = found
        return found

    def _key_gates(self, index: int, route: Route) -> Tensor:
        context, learns = self.context, self.learns(index)
        held = context.modality != PAD
        if not self.config.freezes:
            held = held & route.run
        begun: list[tuple[int, Tensor, Tensor, int]] = []
        competitions: list[Competition] = []
        for hop, pruner in self.pruners:
            where = self.columns.masked_fill(~held, -1)
            closed = pruner.closed(where)
            mine = []
            if learns and hop > 1 and not never_thins(self.config, self.table, index):
                mine = self._hop_competitions(index, hop, pruner, closed)
            keep = pruner.keep(index, StoredTokens(where, route.ranked.detach()))
            begun.append((hop, keep, closed, len(mine)))
            competitions += mine
            held = held & keep
        soft = soft_gates(route.ranked, competitions, self.config, self.setup.tau)
        gate = torch.ones_like(route.gate) if self.config.freezes else route.gate
        by_hop = [gate] * (self.pruners[0][0] if self.pruners else self.hops)
        for hop, keep, closed, count in begun:
            own = keep.to(gate.dtype)
            if count:
                own = gates.straight_through(keep, torch.stack(soft[:count]).sum(0))
                soft = soft[count:]
            own = torch.where(closed, own, 1.0)
            if self.config.drops:  # what a layer lets go of at this hop, deeper ones lack too
                own = self._hop_gates[hop] = own * self._hop_gates.get(hop, 1.0)
            gate = gate * own
            by_hop.append(gate)
        return torch.stack(by_hop, dim=1)

    def _keeps_all(self, index: int) -> bool:
        """Whether no rate, cap or layer before can take a token from this layer."""
        if not never_thins(self.config, self.table, index):
            return False
        source = self.table.plan_layers[index]
        rates = [self.table.rate(h, source, m) for h in range(self.hops) for m in MODALITIES]
        spans = min(rates) >= 1.0 or self.config.freezes
        return spans and self.config.decode == "full"

    # routing of spans

    def _select(self, layer: nn.Module, index: int, hidden: Tensor) -> Route:
        context, device = self.context, self.context.device
        scores = self._scores(layer, index, hidden).to(device)
        ranked = scores
        if self.noise is not None:
            ranked = scores + gates.gumbel_noise(scores.detach(), self.noise)
        span, forced = context.span_and_forced()
        before = self._routes.get(index - 1) if self.config.drops else None
        candidates = span if before is None else span & before.run
        hard = torch.zeros_like(span)
        for hop, own, counts in self.spans:
            rows = self._span_budgets(index, hop, counts)
            hard = hard | self._keep(ranked.detach(), own, candidates & own, rows)
        run = hard | ~span
        skips = skips_of(self, index, scores)
        if skips is not None:
            run = run & ~skips.does
        gate = run.to(scores.dtype)
        if self.learns(index) and self.spans:
            competitions = self._span_competitions(index, candidates, forced)
            soft = torch.stack(soft_gates(ranked, competitions, self.config, self.setup.tau)).sum(0)
            gate = torch.where(span, gates.straight_through(hard, soft), 1.0)
        if skips is not None:
            gate = skips.gates(gate) if self.learns(index) else gate
        if before is not None:
            gate = gate * before.gate
        self._note(index, scores)
        return Route(run, gate, scores, ranked)

    def _scores(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        if self.routers is not None and self.config.scorer == "router":
            modality = self.context.modality.to(hidden.device)
            return self.routers[index](hidden, modality)
        with torch.no_grad():
            return self.setup.scorer.scores(self, layer, index, hidden.detach())

    def _span_budgets(self, index: int, hop: int, counts: list[list[int]]) -> list[list[int]]:
        rates = [self.table.rate(hop, index, m) for m in MODALITIES]
        return [[budget(rates[m], row[m]) for m in MODALITIES] for row in counts]

    def _keep(
        self, ranked: Tensor, span: Tensor, candidates: Tensor, rows: list[list[int]]
    ) -> Tensor:
        """Bool[B, S]: the `candidates` of one span that run, chosen as a plan does."""
        modality = self.context.modality.masked_fill(~span, PAD)
        forced = self.context.span_and_forced()[1]
        shares = self.config.uniform_share, self.config.recent_share
        return span_keep(ranked, modality, candidates, forced, rows, shares)

    def _span_competitions(
        self, index: int, candidates: Tensor, forced: Tensor
    ) -> list[Competition]:
        found = []
        for hop, own, counts in self.spans:
            for m in MODALITIES:
                numbers = self._numbers([row[m] for row in counts])
                mine = candidates & own & (self.context.modality == m)
                found.append(Competition(mine, forced, self._rate(hop, index, m) * numbers))
        return found

    # thinning of closed hops

    def _hop_competitions(
        self, index: int, hop: int, pruner: HopPruner, closed: Tensor
    ) -> list[Competition]:
        context, candidates = self.context, closed
        if pruner.alive is not None:
            candidates = candidates & pruner.alive.to(closed.device)
        pinned = pruner.pinned.to(closed.device)
        pooled = self.config.resolved_hop_budget == "pooled"
        found = []
        for group in [None] if pooled else range(hop):
            inside = candidates if group is None else candidates & (context.token_hop == group)
            for m in MODALITIES:
                numbers = self._numbers(_closed_counts(pruner, hop, group, m))
                mine = inside & (context.modality == m)
                found.append(Competition(mine, pinned, self._rate(hop, index, m) * numbers))
        return found

    def _numbers(self, counts: list[int]) -> Tensor:
        """Float[B] in the routers' precision."""
        weight = next((r.weight for r in self.routers or ()), None)
        wide = weight is not None and weight.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        return torch.tensor(counts, dtype=dtype).to(self.context.device)

    def _rate(self, hop: int, index: int, modality: int) -> Tensor | float:
        """The rate as the losses and soft budgets see it: learned ones with their gradient."""
        if self.routers is None or not self.learns_rates:
            return self.table.rate(hop, index, modality)
        source = self.table.plan_layers[index]  # whose rates the table gives the layers it serves
        router = self.routers[source]
        rate = router.rates()[router.rate_row(hop), modality].to(self.context.device)
        # of a layer that is whole by rule the parameter takes part alone, as DDP asks of each
        return rate if self.table.free_layers[source] else 1.0 + 0.0 * rate

    def _note(self, index: int, scores: Tensor) -> None:
        """Take down what the auxiliary losses need of a layer's scores."""
        if self.routers is None:
            return
        record, shape = self.record, (self.context.batch, self.hops, 2)
        rates = [[self._rate(h, index, m) for m in MODALITIES] for h in range(self.hops)]
        flat = [torch.as_tensor(rate, device=scores.device) for row in rates for rate in row]
        record.layers.append(index)
        record.rates.append(torch.stack(flat).to(scores.dtype).view(self.hops, 2))
        record.means.append(group_means(scores, self._groups).view(shape))
        over = (scores - self.config.epsilon).clamp(min=0)
        record.excess.append(group_means(over, self._groups).view(shape)[..., VISION])


def _spans(context: ForwardContext, span: Tensor) -> list[tuple[int, Tensor, list[list[int]]]]:
    """Each hop that has a span in any row: (hop, Bool[B, S], [row][text | vision] counts)."""
    log = TokenLog()
    log.append(context.modality.masked_fill(~span, PAD), context.token_hop)
    counts = log.counts_by_hop()
    found = []
    for hop in range(max((len(row) for row in counts), default=0)):
        rows = [row[hop] for row in counts]
        if any(map(sum, rows)):
            found.append((hop, span & (context.token_hop == hop), rows))
    return found


def _pruners(
    log: TokenLog, counts: Counts, hops: int, config: DareConfig, table: RetentionTable
) -> list[tuple[int, HopPruner]]:
    """The hops whose begin removes something, in order; hop 1's only under a cap."""
    first = 1 if config.max_kv_tokens is not None else 2
    last = [max((h for h, own in enumerate(row) if any(own)), default=0) for row in counts]
    due = {hop: [hop if end >= hop else 0 for end in last] for hop in range(first, hops)}
    return [(hop, HopPruner(log, config, table, rows)) for hop, rows in due.items()]


def _closed_counts(pruner: HopPruner, hop: int, group: int | None, modality: int) -> list[int]:
    """Per row the real tokens of a modality in one closed hop, or in all before `hop`."""
    rows = []
    for row, due in zip(pruner.counts, pruner.due, strict=True):
        closed = row[:hop] if group is None else row[group : group + 1]
        rows.append(sum(own[modality] for own in closed) if due else 0)
    return rows
