"""Rates by hop, layer and modality: what pruning costs, and a budget spread over it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from dare_hf.api import dare_disabled
from dare_hf.calibration.budgets import spread_budget
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import held_mean
from dare_hf.simulation.layout import read_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from dare_hf.engine.controller import Controller
    from dare_hf.routers.router import Router

logger = logging.get_logger("transformers.dare_hf")

# Rates tried in one layer while all others keep everything, falling.
TRIED_RATES = {VISION: (0.6, 0.35, 0.15, 0.04), TEXT: (0.8, 0.6, 0.4)}
# Budgets tried at the hops of one row while all others have the target, in targets, falling.
_TRIED_BUDGETS = (1.6, 1.25, 1.0, 0.75, 0.5)
_NAMES = {VISION: "vision", TEXT: "text"}
_ALL = 30.0  # a rate logit that keeps every token

Profile = dict[tuple[int, int, int], float]  # rate of (row, layer, modality)


@dataclass(frozen=True)
class RateCosts:
    """What pruning does to the model's predictions, layer by layer and hop by hop.

    A cost is the KL (nats per token) of the continuation: the mean over the tokens of a hop, then
    over the hops of a sequence, then over sequences.

    Attributes:
        weights: Per row of the rate table, the share of the batches' hops that it serves; they sum
            to 1.
        layers: `["vision" | "text"][layer][rate]`: one layer alone, at all hops, at each of
            TRIED_RATES; of the layers that `first_layers_whole` leaves to prune.
        budgets: `["vision" | "text"]`: mean rates of those layers tried at the hops of one row,
            falling; empty where one row serves all hops, or nothing is pruned.
        hops: `["vision" | "text"][row][budget]`: the hops of one row at each of `budgets`, all
            other hops and the other modality at their targets; empty for a row that serves none.
    """

    weights: list[float]
    layers: dict[str, list[list[float]]]
    budgets: dict[str, list[float]]
    hops: dict[str, list[list[float]]]


class Divergence:
    """How far a routed model's predictions are from the plain one's, as `RateCosts` counts it.

    Args:
        model: The routed model.
        controller: Its controller.
        batches: Complete sequences with labels, as `continued` returns them.
    """

    def __init__(self, model: Any, controller: Controller, batches: list[dict[str, Any]]) -> None:
        self.model, self.batches = model, batches
        with torch.no_grad(), dare_disabled(model):
            self._plain = [_predictions(model, batch) for batch in batches]
        self.hops = [_hops(controller, batch) for batch in batches]
        self._shares = [_shares(*pair) for pair in zip(batches, self.hops, strict=True)]

    @torch.no_grad()
    def measured(self) -> float:
        """KL, nats per token, of the model as it is now."""
        total = 0.0
        for batch, plain, shares in zip(self.batches, self._plain, self._shares, strict=True):
            total += _divergence(self.model, batch, plain, shares)
        return total / sum(len(batch["labels"]) for batch in self.batches)


class RateFit:
    """Measures what rates cost, and writes those of least cost into the routers.

    Layers first, each alone; that gives the layers' rates for any mean rate. Then hops, at the
    target, where what the layers cost together is already in: each row of the rate table gets a
    mean rate of its own, and the layers' rates that belong to it.

    Args:
        divergence: Of the routed model, whose rates are overwritten.
        controller: Its controller.
        routers: Its routers, one per layer.
        targets: Mean rate of each modality over hops and layers.
    """

    def __init__(
        self,
        divergence: Divergence,
        controller: Controller,
        routers: Sequence[Router],
        targets: Mapping[int, float],
    ) -> None:
        self.divergence, self.routers = divergence, routers
        first = controller.settings.first_whole
        free = [layer >= first for layer in range(len(routers))]
        # layers that are whole by rule are not measured: the others hold the targets
        self.targets = {
            kind: held_mean(target, free, [1] * len(free)) for kind, target in targets.items()
        }
        self.weights = _row_weights(routers[0], divergence.batches, divergence.hops)
        self._rows = range(len(self.weights))
        self._layers = range(first, len(routers))

    def run(
        self, tell: Callable[[str, int, int], None]
    ) -> tuple[RateCosts, list[list[tuple[float, float]]]]:
        """Measure, and write; returns the costs and `[row][layer]` rates (vision, text).

        Args:
            tell: Called with ("layers", measured, in all), a layer once for each modality.
        """
        layers = {name: self._layer_costs(kind, tell) for kind, name in _NAMES.items()}
        profile = {
            kind: partial(spread_budget, TRIED_RATES[kind], layers[name])
            for kind, name in _NAMES.items()
        }
        even: Profile = {}
        for kind, target in self.targets.items():
            even |= self._profile(kind, profile[kind](target), self._rows)
        rates, budgets, hops = dict(even), {}, {}
        for kind, name in _NAMES.items():
            budgets[name], hops[name] = self._hop_costs(kind, profile[kind], even)
            for row, budget in self._spread(kind, budgets[name], hops[name]).items():
                rates |= self._profile(kind, profile[kind](budget), [row])
        _set_rates(self.routers, rates)
        table = [
            [
                (rates.get((row, layer, VISION), 1.0), rates.get((row, layer, TEXT), 1.0))
                for layer in range(len(self.routers))
            ]
            for row in self._rows
        ]
        return RateCosts(self.weights, layers, budgets, hops), table

    def _profile(self, kind: int, rates: Sequence[float], rows: Iterable[int]) -> Profile:
        layers = list(zip(self._layers, rates, strict=True))
        return {(row, layer, kind): rate for row in rows for layer, rate in layers}

    def _layer_costs(self, kind: int, tell: Callable[[str, int, int], None]) -> list[list[float]]:
        costs: list[list[float]] = []
        before, count = list(_NAMES).index(kind), len(self._layers)
        for layer in self._layers:
            alone = [
                dict.fromkeys(((row, layer, kind) for row in self._rows), rate)
                for rate in TRIED_RATES[kind]
            ]
            costs.append([self._cost(rates) for rates in alone])
            tell("layers", before * count + len(costs), len(_NAMES) * count)
            logger.info("fit_router: layer %s %s costs %s", layer, _NAMES[kind], costs[-1])
        return costs

    def _hop_costs(
        self, kind: int, profile: Callable[[float], list[float]], even: Profile
    ) -> tuple[list[float], list[list[float]]]:
        """The budgets that were tried, and what each costs at the hops of each row."""
        served = [row for row in self._rows if self.weights[row]]
        target, low = self.targets[kind], TRIED_RATES[kind][-1]
        if len(served) == 1 or target == 1.0:
            return [], []
        tried = {min(max(target * factor, low), 1.0) for factor in _TRIED_BUDGETS}
        budgets = sorted(tried, reverse=True)
        at_target = self._cost(even)
        costs: list[list[float]] = [[] for _ in self._rows]
        for row in served:
            for budget in budgets:
                changed = even | self._profile(kind, profile(budget), self._row_and_unserved(row))
                costs[row].append(at_target if budget == target else self._cost(changed))
            logger.info("fit_router: row %s %s costs %s", row, _NAMES[kind], costs[row])
        return budgets, costs

    def _spread(
        self, kind: int, budgets: list[float], costs: list[list[float]]
    ) -> dict[int, float]:
        """The mean rate of each row."""
        if not budgets:
            return {}
        served = [row for row in self._rows if self.weights[row]]
        top = budgets[0]
        found = spread_budget(
            [budget / top for budget in budgets[1:]],
            [[cost - costs[row][0] for cost in costs[row][1:]] for row in served],
            self.targets[kind] / top,
            [self.weights[row] for row in served],
        )
        return {
            copy: top * budget
            for row, budget in zip(served, found, strict=True)
            for copy in self._row_and_unserved(row)
        }

    def _row_and_unserved(self, row: int) -> list[int]:
        """A row, and those after it that serve no hop of the batches: they copy it."""
        rows = [row]
        for after in self._rows[row + 1 :]:
            if self.weights[after]:
                break
            rows.append(after)
        return rows

    def _cost(self, rates: Profile) -> float:
        """Of these rates, all others keeping everything."""
        _set_rates(self.routers, rates)
        return self.divergence.measured()


def _hops(controller: Controller, batch: Mapping[str, Any]) -> Tensor:
    """Long[B, S] hop of each token, as a training forward reads it."""
    ids, labels, hop_ids = batch.get("input_ids"), batch["labels"], batch.get("hop_ids")
    real = batch["attention_mask"].bool()
    return read_layout(ids, labels, hop_ids, real, controller.rules).hop.long()


def _row_weights(
    router: Router, batches: Sequence[Mapping[str, Any]], hops: Sequence[Tensor]
) -> list[float]:
    """Per row of the rate table the mean over sequences of its share of their hops."""
    totals = torch.zeros(router.rate_logits.shape[0], dtype=torch.float64)
    for batch, hop in zip(batches, hops, strict=True):
        real = batch["attention_mask"].bool().cpu()
        for row, mine in zip(hop, real, strict=True):
            present = row[mine].unique().tolist()
            for number in present:
                totals[router.rate_row(number)] += 1 / len(present)
    return (totals / totals.sum().clamp(min=1)).tolist()


def _predictions(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Float32[n, V] log-probabilities at the supervised positions."""
    supervised = batch["labels"][:, 1:] != -100
    logits = model(**batch).logits[:, :-1]
    return logits[supervised.to(logits.device)].float().log_softmax(-1).clamp(min=-1e4)


def _shares(batch: Mapping[str, Any], hops: Tensor) -> Tensor:
    """Float32[n] of the supervised positions; those of a row's hop, and its hops, count alike.

    A row sums to 1. A mean over all tokens would hear nothing of a short answer beside a drawn
    picture, though the answer is what the picture is for.
    """
    hop = hops[:, 1:]
    supervised = (batch["labels"][:, 1:] != -100).cpu()
    counts = (torch.nn.functional.one_hot(hop) * supervised[..., None]).sum(1)  # [rows, hops]
    present = (counts > 0).sum(1, keepdim=True).clamp(min=1)
    each = 1.0 / (counts.clamp(min=1) * present)
    return each.gather(1, hop)[supervised]


def _divergence(model: Any, batch: Mapping[str, Any], plain: Tensor, shares: Tensor) -> float:
    """KL of the predictions to the plain ones, summed over the batch's rows."""
    pruned = _predictions(model, batch)
    kl = (plain.exp() * (plain - pruned)).sum(-1)
    return float((kl * shares.to(kl)).sum().clamp(min=0))


def _set_rates(routers: Sequence[Router], rates: Profile) -> None:
    """Write rates of (row, layer, modality); all others keep everything."""
    with torch.no_grad():
        for layer, router in enumerate(routers):
            logits = torch.full_like(router.rate_logits, _ALL)
            for row in range(len(logits)):
                for kind in _NAMES:
                    rate = rates.get((row, layer, kind), 1.0)
                    if rate < 1:
                        logits[row, kind] = torch.tensor(rate).logit()
            router.rate_logits.copy_(logits)
