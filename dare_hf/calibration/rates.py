"""Rates by hop, layer and modality: what each costs alone, and a budget spread over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from dare_hf.apply import dare_disabled
from dare_hf.calibration.budgets import spread_budget
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.simulation.layout import read_layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from dare_hf.controller import Controller
    from dare_hf.routers.router import Router

logger = logging.get_logger("dare_hf")

# Rates tried at one place while all others keep everything, falling.
TRIED_RATES = {VISION: (0.6, 0.35, 0.15, 0.04), TEXT: (0.8, 0.6, 0.4)}
_NAMES = {VISION: "vision", TEXT: "text"}
_ALL = 30.0  # a rate logit that keeps every token


@dataclass(frozen=True)
class RateCosts:
    """What pruning one place alone does to the model's predictions.

    Attributes:
        weights: Per row of the rate table, the share of the batches' hops that it serves; they sum
            to 1. A row of weight 0 was not tried.
        divergence: `["vision" | "text"][row][layer][rate]`: KL (nats per token) of the continuation
            at each of TRIED_RATES, the mean over the tokens of a hop, then over the hops of a
            sequence, then over sequences; an empty list for a row that was not tried.
    """

    weights: list[float]
    divergence: dict[str, list[list[list[float]]]]


def measure_costs(
    model: Any, controller: Controller, routers: Sequence[Router], batches: list[dict[str, Any]]
) -> RateCosts:
    """Prune one modality in one layer at the hops of one row, for each tried rate in turn.

    Args:
        model: The routed model; its rates are overwritten.
        controller: Its controller.
        routers: Its routers, one per layer.
        batches: Complete sequences with labels, as `continued` returns them.
    """
    with torch.no_grad():
        with dare_disabled(model):
            plain = [_predictions(model, batch) for batch in batches]
        shares = [_shares(controller, batch) for batch in batches]
        rows = sum(len(batch["labels"]) for batch in batches)
        _set_rates(routers, {})
        weights = _row_weights(model, controller, routers[0], batches)
        costs: dict[str, list[list[list[float]]]] = {}
        for kind, name in _NAMES.items():
            costs[name] = [[] for _ in weights]
            for row, layer in _places(weights, len(routers)):
                found = []
                for rate in TRIED_RATES[kind]:
                    _set_rates(routers, {(row, layer, kind): rate})
                    given = zip(batches, plain, shares, strict=True)
                    found.append(sum(_divergence(model, *one) for one in given) / rows)
                costs[name][row].append(found)
                logger.info("fit_router: row %s layer %s %s: %s", row, layer, name, found)
    return RateCosts(weights, costs)


def write_rates(
    routers: Sequence[Router], costs: RateCosts, targets: Mapping[int, float]
) -> list[list[tuple[float, float]]]:
    """Give the routers the rates of least summed cost whose mean over hops and layers is a target.

    A row that was not tried gets the rates of the tried row before it.

    Args:
        routers: One per layer.
        costs: What `measure_costs` found.
        targets: Mean rate of each modality.

    Returns:
        `[row][layer]` rates (vision, text).
    """
    layers = len(routers)
    places = _places(costs.weights, layers)
    weights = [costs.weights[row] for row, _ in places]
    rates: dict[tuple[int, int, int], float] = {}
    for kind, name in _NAMES.items():
        flat = [costs.divergence[name][row][layer] for row, layer in places]
        spread = spread_budget(TRIED_RATES[kind], flat, targets[kind], weights)
        rates |= {(*place, kind): rate for place, rate in zip(places, spread, strict=True)}
    source = 0
    for row, weight in enumerate(costs.weights):
        source = row if weight else source
        for layer in range(layers):
            for kind in _NAMES:
                rates[row, layer, kind] = rates[source, layer, kind]
    _set_rates(routers, rates)
    return [
        [(rates[row, layer, VISION], rates[row, layer, TEXT]) for layer in range(layers)]
        for row in range(len(costs.weights))
    ]


def _places(weights: Sequence[float], layers: int) -> list[tuple[int, int]]:
    """(row, layer) of the rows that serve a hop."""
    return [(row, layer) for row, weight in enumerate(weights) if weight for layer in range(layers)]


def _row_weights(
    model: Any, controller: Controller, router: Router, batches: list[dict[str, Any]]
) -> list[float]:
    """Per row of the rate table the mean over sequences of its share of their hops."""
    totals = torch.zeros(router.rate_logits.shape[0], dtype=torch.float64)
    count = 0
    for batch in batches:
        model(**batch)
        record = controller.record
        if record is None:  # every training forward leaves one
            continue
        present = record.seen.any(-1).cpu().double()
        shares = present / present.sum(1, keepdim=True).clamp(min=1)
        for hop, share in enumerate(shares.sum(0).tolist()):
            totals[router.rate_row(hop)] += share
        count += len(present)
    return (totals / max(count, 1)).tolist()


def _predictions(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Float32[n, V] log-probabilities at the supervised positions."""
    supervised = batch["labels"][:, 1:] != -100
    logits = model(**batch).logits[:, :-1]
    return logits[supervised.to(logits.device)].float().log_softmax(-1).clamp(min=-1e4)


def _shares(controller: Controller, batch: Mapping[str, Any]) -> Tensor:
    """Float32[n] of the supervised positions; those of a row's hop, and its hops, count alike.

    A row sums to 1. A mean over all tokens would hear nothing of a short answer beside a drawn
    picture, though the answer is what the picture is for.
    """
    labels = batch["labels"]
    real = batch["attention_mask"].bool()
    hop_ids = batch.get("hop_ids")
    hop = read_layout(batch.get("input_ids"), labels, hop_ids, real, controller.rules).hop[:, 1:]
    supervised = (labels[:, 1:] != -100).cpu()
    group = torch.nn.functional.one_hot(hop.long()) * supervised[..., None]
    counts = group.sum(1)  # [rows, hops]
    hops = (counts > 0).sum(1, keepdim=True).clamp(min=1)
    each = 1.0 / (counts.clamp(min=1) * hops)
    return each.gather(1, hop.long())[supervised]


def _divergence(model: Any, batch: Mapping[str, Any], plain: Tensor, shares: Tensor) -> float:
    """KL of the predictions to the plain ones, summed over the batch's rows."""
    pruned = _predictions(model, batch)
    kl = (plain.exp() * (plain - pruned)).sum(-1)
    return float((kl * shares.to(kl)).sum().clamp(min=0))


def _set_rates(routers: Sequence[Router], rates: Mapping[tuple[int, int, int], float]) -> None:
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
