"""What each auxiliary loss does to rates and to what is kept: trainings that differ in it alone."""

import functools
from typing import NamedTuple

import pytest
import torch
from hop_runs import held
from laws import BATCHES, forward, inputs_of
from router_runs import controller_of, routed, written_batch

from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.testing import tiny_model
from dare_hf.training import auxiliary_loss

LAYERS, CUT = 6, 3
SERVED = [0, 2, 3]
"""Rows of a rate table that serve hops: row 0 serves hops 0 and 1."""


class Trained(NamedTuple):
    """What a training left.

    Attributes:
        start: Float[L, rows, 2] the rates before it.
        rates: Float[L, rows, 2] the rates after it.
        kept: Per layer, Bool[B, S] what the cache holds of a prompt.
    """

    start: torch.Tensor
    rates: torch.Tensor
    kept: list[torch.Tensor]


def rates_of(model):
    return torch.stack([r.rates().detach()[SERVED] for r in controller_of(model).routers])


def loss_of(model, batch, task):
    logits_loss = model(**batch).loss
    return task * logits_loss + auxiliary_loss(model)[0]


@functools.cache
def trained(steps=30, task=0.0, start=None, **fields):
    """Train a tiny model's routers from equal rates, by default on the auxiliary losses alone."""
    torch.manual_seed(0)
    model = tiny_model("llava", layers=LAYERS)
    with routed(model, **{"vision_retention": 0.5, "text_retention": 0.7, **fields}) as wrapped:
        batch, _, span = written_batch(wrapped, "alone", max_new_tokens=14)
        routers = controller_of(wrapped).routers
        if start is not None:
            for router in routers:
                router.rate_logits.data.fill_(torch.tensor(start).logit())
        began = rates_of(wrapped)
        groups = [
            {"params": [r.rate_logits for r in routers], "lr": 0.1},
            {"params": [p for r in routers for p in (r.weight, r.bias)], "lr": 0.02},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        wrapped.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(wrapped, batch, task).backward()
            optimizer.step()
        wrapped.eval()
        cache = forward(wrapped, inputs_of(model, BATCHES["alone"])).past_key_values
        return Trained(began, rates_of(wrapped), held(cache, span))


def vision(rates):
    """Mean vision rates up to the cut and behind it."""
    return rates[: CUT + 1, :, VISION].mean().item(), rates[CUT + 1 :, :, VISION].mean().item()


def test_the_hard_loss_lowers_late_vision_rates_and_changes_what_is_kept():
    """With the task's gradients, at the weight of a task that a backbone knows."""
    without = trained(task=0.1, start=0.5, lambda_hard=0.0)
    with_it = trained(task=0.1, start=0.5, lambda_hard=1.0)
    early, late = vision(with_it.rates)
    _, late_without = vision(without.rates)
    assert late < late_without - 0.05
    assert late < early - 0.1, "soft early, hard late"
    kept = [int(mask.sum()) for mask in with_it.kept[CUT + 1 :]]
    assert sum(kept) < sum(int(mask.sum()) for mask in without.kept[CUT + 1 :])


def test_a_hard_loss_does_not_pay_with_the_mean():
    """At a held mean, what goes behind the cut comes before it."""
    early, late = vision(trained(start=0.5, lambda_hard=1.0, steps=60).rates)
    assert early > 0.52
    assert late < 0.4


def test_the_ratio_loss_moves_every_text_rate_to_the_target():
    with_it, without = trained(start=0.4), trained(start=0.4, lambda_ratio=0.0)
    off = [(one.rates[..., TEXT] - 0.7).abs() for one in (with_it, without)]
    assert off[0].mean() < 0.1
    assert off[0].max() < 0.25
    assert off[1].min() > 0.25


@pytest.mark.parametrize("ratio", ["mean", "per_rate"])
def test_the_soft_loss_moves_vision_rates_to_the_target(ratio):
    fields = {"ratio": ratio, "lambda_hard": 0.0, "vision_retention": 0.3}
    with_it, without = trained(**fields), trained(lambda_soft=0.0, **fields)
    off = [abs(one.rates[..., VISION].mean().item() - 0.3) for one in (with_it, without)]
    assert off[0] < 0.05
    assert off[1] > 0.15
    began, ended = (rates[..., VISION].std().item() for rates in (with_it.start, with_it.rates))
    # a mean leaves the layers their differences, a target for each rate does not
    assert ended < 0.5 * began if ratio == "per_rate" else ended > 0.5 * began


@pytest.mark.parametrize("ratio", ["mean", "per_rate"])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_every_rate_that_serves_a_hop_has_a_gradient(ratio, loss_reduction):
    model = tiny_model("llava", layers=LAYERS)
    with routed(model, ratio=ratio, loss_reduction=loss_reduction) as wrapped:
        batch, _, _ = written_batch(wrapped)
        loss_of(wrapped, batch, 0.0).backward()
        seen = controller_of(wrapped).record.seen.any(0)
        for index, router in enumerate(controller_of(wrapped).routers):
            rows = {router.rate_row(hop) for hop in range(len(seen)) if seen[hop].any()}
            for row in range(len(router.rate_logits)):
                moved = (router.rate_logits.grad[row] != 0).tolist()
                assert moved == [row in rows] * 2, f"layer {index}, row {row}"
            assert router.bias.grad.ne(0).all(), f"layer {index}"
