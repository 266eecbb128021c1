"""The parts of calibration against independent computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from laws import inputs_of, shared_model

from dare_hf.architectures.locate import locate
from dare_hf.calibration.budgets import convex_costs, measure_cut_layer, spread_budget
from dare_hf.calibration.observe import Tokens, watching
from dare_hf.calibration.ridge import STRENGTHS, CrossFitted, Moments
from dare_hf.errors import DareInputError
from dare_hf.forward.modality import resolve_span, vision_token_ids
from dare_hf.scoring.observe import AttentionCall


def test_ridge_from_sums_equals_ridge_from_samples():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5), torch.randn(200)
    moments = Moments.empty(5, torch.device("cpu"))
    for part in range(0, 200, 50):
        moments.add(x[part : part + 50], y[part : part + 50])
    strength = 0.3
    weights = moments.solve(strength)

    ones = torch.cat([x, torch.ones(200, 1)], 1).double()
    scale = x.double().square().mean()
    penalty = torch.diag(torch.tensor([strength * scale] * 5 + [0.0]).double()) * 200
    direct = torch.linalg.lstsq(ones.T @ ones + penalty, ones.T @ y.double()).solution
    assert torch.allclose(weights, direct, atol=1e-6)
    assert moments.error(weights) == pytest.approx(float((ones @ weights - y).square().mean()))
    assert moments.variance() == pytest.approx(float(y.double().var(correction=0)), rel=1e-4)


def test_cross_fit_chooses_more_ridge_where_there_is_only_noise():
    torch.manual_seed(1)
    fits = {}
    for signal in (0.0, 3.0):
        fit = CrossFitted.empty(10, torch.device("cpu"))
        for _ in range(4):
            x = torch.randn(12, 10)
            fit.add(x, signal * x[:, 0] + torch.randn(12) * 0.1 + (1 - bool(signal)))
        fits[signal] = fit.solve()
    weights, _, explained = fits[3.0]
    assert explained > 0.8
    assert weights.abs().argmax() == 0
    assert fits[0.0][2] <= 0.05
    assert fits[0.0][0].norm() < 0.1 * weights.norm()
    assert min(STRENGTHS) > 0


def _brute_force(rates, costs, target):
    """Least cost over all mixtures of two tried rates per layer, on a fine grid."""
    choices = [(1.0, 0.0)]
    grids = []
    for row in costs:
        points = [*choices, *zip(rates, row, strict=True)]
        mixed = []
        for (r1, c1), (r2, c2) in itertools.product(points, repeat=2):
            mixed += [(r1 * w + r2 * (1 - w), c1 * w + c2 * (1 - w)) for w in (0, 0.25, 0.5, 0.75)]
        grids.append(sorted(set(mixed)))
    best = float("inf")
    for combination in itertools.product(*grids):
        mean = sum(rate for rate, _ in combination) / len(combination)
        if mean <= target + 1e-9:
            best = min(best, sum(cost for _, cost in combination))
    return best


@pytest.mark.parametrize("target", [0.9, 0.6, 0.35])
def test_spread_budget_is_as_cheap_as_any_mixture(target):
    rates = [0.5, 0.2]
    costs = [[0.0, 0.1], [1.0, 5.0]]
    found = spread_budget(rates, costs, target)
    assert sum(found) / 2 == pytest.approx(target)

    def cost(layer, rate):
        hull = convex_costs(rates, costs[layer])
        for (r1, c1), (r2, c2) in itertools.pairwise(hull):
            if r2 <= rate <= r1 + 1e-12:
                return c1 + (c2 - c1) * (r1 - rate) / (r1 - r2)
        raise AssertionError(rate)

    mine = sum(cost(layer, rate) for layer, rate in enumerate(found))
    assert mine <= _brute_force(rates, costs, target) + 1e-9


def test_a_place_that_counts_less_is_given_up_later_at_the_same_cost():
    assert spread_budget([0.2], [[1.0], [1.0]], 0.6, [3.0, 1.0]) == pytest.approx([7 / 15, 1.0])
    rates = spread_budget([0.5, 0.2], [[0.0, 0.1], [1.0, 5.0], [0.3, 0.4]], 0.55, [0.5, 0.3, 0.2])
    mean = sum(rate * weight for rate, weight in zip(rates, [0.5, 0.3, 0.2], strict=True))
    assert mean == pytest.approx(0.55)


def test_costs_that_fall_are_noise():
    assert convex_costs([0.5, 0.2], [0.4, 0.1]) == [(1.0, 0.0), (0.2, 0.4)]


def test_a_target_below_the_tried_rates_is_refused():
    with pytest.raises(DareInputError, match="lowest rate"):
        spread_budget([0.5, 0.2], [[0.1, 0.2]], 0.1)


def test_cut_layer_is_where_vision_attention_halves_behind_its_peak():
    assert measure_cut_layer([0.1, 0.6, 0.5, 0.29, 0.4]) == 3
    assert measure_cut_layer([0.5, 0.5, 0.4]) is None
    assert measure_cut_layer([0.5, 0.5, 0.1]) is None, "nothing would be behind the last layer"


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "chameleon"])
@pytest.mark.parametrize("images", [(1,), (0, 1, 2)])
def test_importance_equals_the_eager_attention_matrix(name, images):
    """Importance by windows equals the one read off the full attention probabilities."""
    model = shared_model(name, "eager")
    inputs = inputs_of(model, images)
    ids = inputs["input_ids"]
    real = inputs["attention_mask"].bool()
    names = ("mm_token_type_ids", "token_type_ids")
    vision = resolve_span(inputs, vision_token_ids(model.config), names, ids.shape[1]) & real
    modality = torch.where(vision, 1, 0).masked_fill(~real, -1)
    later = torch.zeros_like(real)
    later[:, -7:] = True
    anatomy = locate(model)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
        before = {k: dict(vars(m)) for k, m in model.named_modules()}
        values = {}
        with watching(anatomy, Tokens(modality, later, 0.0)) as seen:
            for k, layer in enumerate(anatomy.layers):
                watcher = vars(layer.self_attn)["_dare"]
                inner = watcher.after_attention

                def spy(tensors, call, inner=inner, k=k):
                    assert isinstance(call, AttentionCall)
                    values[k] = tensors[2]
                    inner(tensors, call)

                watcher.after_attention = spy
            again = model(**inputs, use_cache=False)
    assert torch.equal(plain.logits, again.logits)
    for key, module in model.named_modules():
        assert vars(module).keys() == before[key].keys(), key
    before_all = torch.arange(ids.shape[1]) < ids.shape[1] - 7
    for k, one in enumerate(seen):
        assert torch.equal(one.hidden, plain.hidden_states[k])
        weights = plain.attentions[k].float()
        known = one.known
        assert torch.equal(known & ~before_all, torch.zeros_like(known))
        if not (sliding := name == "gemma3"):  # whose far keys nobody sees
            assert torch.equal(known, real & before_all)
        assert sliding or known.any(1).all()
        groups = weights.shape[1] // values[k].shape[1]
        norm = values[k].float().norm(dim=-1).repeat_interleave(groups, dim=1)
        expected = _mean_one(weights * norm[:, :, None], later, known)
        found = one.importance.masked_fill(~known, 0)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        mass = _mean_one(weights, later & (modality == 0), known)
        share = float((mass * vision).sum() / mass.sum())
        assert one.vision_share == pytest.approx(share, abs=1e-4)


def _mean_one(weights, queries, known):
    """Mean over heads and `queries` of [B, H, S, S], made 1 on average over `known` keys."""
    mean = (weights * queries[:, None, :, None]).sum((1, 2)) * known
    return mean / (mean.sum(1) / known.sum(1).clamp(min=1))[:, None].clamp(min=1e-12)
