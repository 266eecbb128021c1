"""fit_router: routers and rates in closed form, on a tiny model."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import SPECIAL_IDS, inputs_of
from peft import PeftModel

from dare_hf import DareConfig, apply_dare, dare_disabled, last_report
from dare_hf.calibration import fit_router
from dare_hf.calibration.continuation import continued
from dare_hf.calibration.rates import TRIED_RATES, RateFit, _hops, _shares
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.testing import tiny_model

NO_IMAGES = {"suppress_tokens": SPECIAL_IDS}


def batches_of(model, count=3):
    return [inputs_of(model, (1, 2), seed=seed, pixels=True) for seed in range(count)]


@pytest.fixture(scope="module")
def fitted():
    model = tiny_model("llava")
    found = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routed = fit_router(
        model,
        batches_of(model),
        max_new_tokens=6,
        generate_kwargs=NO_IMAGES,
        details=found.append,
    )
    return routed, found[0], before


def test_the_backbone_is_untouched(fitted):
    routed, _, before = fitted
    after = routed.get_base_model().state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert {name for name in after if name not in before} == {
        name for name in after if "dare_router" in name
    }


def test_rates_meet_the_budget_and_the_costlier_layers_keep_more(fitted):
    routed, details, _ = fitted
    config = routed.peft_config["default"]
    vision, text = zip(*details.rates[0], strict=True)
    assert sum(vision) / len(vision) == pytest.approx(config.vision_retention, abs=1e-6)
    assert sum(text) / len(text) == pytest.approx(config.text_retention, abs=1e-6)
    assert details.costs.weights == [1.0, *[0.0] * (config.max_hops - 1)]  # no delimiter: one row
    assert details.rates[1:] == [details.rates[0]] * (config.max_hops - 1)
    costs = [row[-1] for row in details.costs.layers["vision"]]
    assert vision[costs.index(max(costs))] == max(vision)
    model = routed.get_base_model()
    model(**inputs_of(model, (1,), pixels=True))  # rates are read at the next forward
    table = model._dare.controller.table
    assert table.vision[0] == pytest.approx(vision, abs=1e-5)
    assert config.cut_layer == ("auto" if details.cut_layer is None else details.cut_layer)


def test_scores_follow_what_the_continuation_attends_to(fitted):
    """A layer's router explains importance on the data it saw better than a constant does."""
    _, details, _ = fitted
    assert any(vision > 0.05 for _, vision in details.explained)
    assert details.tokens["vision"] > 20


def test_mean_scores_are_the_rates(fitted):
    """So that the losses of a training find them where they want them."""
    routed, details, _ = fitted
    model = routed.get_base_model()
    routers = model._dare.controller.routers
    hidden = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        for layer in model._dare.controller.anatomy.layers
    ]
    batches = batches_of(model)
    with dare_disabled(routed), torch.no_grad():
        for inputs in batches:
            model(**inputs)
    for hook in hooks:
        hook.remove()
    layers = len(routers)
    image = model.config.image_token_id
    for index, (router, (rate, _)) in enumerate(zip(routers, details.rates[0], strict=True)):
        scores = []
        for number, inputs in enumerate(batches):
            vision = inputs["input_ids"] == image
            kind = torch.where(vision, 1, 0)
            scores.append(router.scores(hidden[number * layers + index], kind)[vision])
        wanted = min(max(rate, 0.05), 0.95)
        assert torch.cat(scores).mean().item() == pytest.approx(wanted, abs=0.1)


def test_it_generates_within_the_budget_and_loads_again(fitted, tmp_path):
    routed, _, _ = fitted
    model = routed.get_base_model()
    inputs = inputs_of(model, (1,), seed=9, pixels=True)
    settings = {"do_sample": False, "max_new_tokens": 6, **NO_IMAGES}
    out = routed.generate(**copy.deepcopy(inputs), **settings)
    assert last_report(routed).kv_bytes < last_report(routed).kv_bytes_baseline
    routed.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llava"), str(tmp_path))
    assert torch.equal(again.generate(**inputs, **settings), out)


def test_a_batch_with_labels_brings_its_own_continuation():
    model = tiny_model("llava")
    batch = inputs_of(model, (1,), pixels=True)
    labels = batch["input_ids"].clone()
    labels[:, :-5] = -100
    batch["labels"] = labels
    complete = continued(model, batch, 4, {})
    assert complete["input_ids"] is batch["input_ids"]
    assert complete["labels"] is labels


def test_a_continuation_ends_where_its_row_ends():
    model = tiny_model("llava")
    batch = inputs_of(model, (1, 2), pixels=True)
    plain = model.generate(**copy.deepcopy(batch), max_new_tokens=6, do_sample=False, **NO_IMAGES)
    length = batch["input_ids"].shape[1]
    model.generation_config.eos_token_id = int(plain[0, length + 2])
    complete = continued(model, batch, 6, dict(NO_IMAGES))
    ends = complete["labels"][0, length:]
    assert ends[:3].tolist() == plain[0, length : length + 3].tolist()
    assert (ends[3:] == -100).all()
    assert complete["attention_mask"][0, length:].tolist() == [1, 1, 1, *[0] * (len(ends) - 3)]
    assert (complete["labels"][:, :length] == -100).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "chameleon"])
def test_every_kind_of_model_and_a_padded_batch(name, dtype):
    model = tiny_model(name, layers=2, dtype=dtype)
    images = {"suppress_tokens": [*SPECIAL_IDS, *(range(100, 140) if name == "chameleon" else ())]}
    found = []
    fit_router(
        model,
        batches_of(model, 2),
        max_new_tokens=5,
        generate_kwargs=images,
        details=found.append,
    )
    for router in model._dare.controller.routers:
        assert router.weight.dtype == torch.float32
        assert torch.isfinite(router.weight).all()
    vision, text = zip(*found[0].rates[0], strict=True)
    assert sum(vision) / 2 == pytest.approx(0.4)
    assert sum(text) / 2 == pytest.approx(0.7)
    assert found[0].tokens["vision"] > 20


def test_a_modality_nobody_saw_is_said(told):
    model = tiny_model("llava", layers=2)
    text = [inputs_of(model, (0,), pixels=True)]
    config = DareConfig(scorer="router", schedule="constant")
    fit_router(model, text, config, max_new_tokens=3, generate_kwargs=NO_IMAGES)
    assert "no later query saw a vision token in layers [0, 1]" in " ".join(told)


def test_a_named_cut_and_rates_that_are_not_to_be_fitted_stay():
    model = tiny_model("llava")
    config = DareConfig(scorer="router", schedule="learned", cut_layer=1)
    found = []
    routed = fit_router(
        model,
        batches_of(model),
        config,
        max_new_tokens=3,
        generate_kwargs=NO_IMAGES,
        fit_rates=False,
        details=found.append,
    )
    controller = routed.get_base_model()._dare.controller
    assert (found[0].rates, controller.config.cut_layer) == (None, 1)
    started = [router.rates()[0].tolist() for router in controller.routers]
    text, vision = zip(*started, strict=True)
    assert text == pytest.approx([0.7] * 4, abs=1e-5)
    assert sum(vision) / 4 == pytest.approx(0.4, abs=1e-2)


def test_static_rates_stay_as_configured():
    model = tiny_model("llava")
    config = DareConfig(scorer="router", schedule="constant", vision_retention=0.5)
    found = []
    routed = fit_router(
        model,
        batches_of(model, 1),
        config,
        max_new_tokens=3,
        generate_kwargs=NO_IMAGES,
        details=found.append,
    )
    assert found[0].rates is None
    assert set(routed.get_base_model()._dare.controller.table.vision[0]) == {0.5}


def test_refusals():
    model = tiny_model("llava")
    with pytest.raises(DareInputError, match="at least one batch"):
        fit_router(model, [])
    with pytest.raises(DareConfigError, match="scorer"):
        fit_router(model, batches_of(model, 1), DareConfig())
    with pytest.raises(DareInputError, match="input_ids"):
        fit_router(model, [{"pixel_values": torch.zeros(1)}])
    assert "_dare" not in vars(model)  # a refusal leaves the model as it was
    assert not any("dare_router" in name for name, _ in model.named_modules())
    model = apply_dare(tiny_model("llava"))
    with pytest.raises(DareStateError, match="remove_dare"):
        fit_router(model, batches_of(model, 1))


def hop_rows(batches, hops):
    """Hop ids: the second half of each row is cut into `hops` hops of equal length."""
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        length = batch["labels"].shape[1]
        half = length // 2
        batch["labels"][:, :half] = -100
        places = torch.arange(length)
        hop = torch.where(places < half, 0, 1 + (places - half) * hops // (length - half))
        batch["hop_ids"] = hop.expand(len(batch["labels"]), -1).clone()
    return batches


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("hop_aware", [True, False])
def test_rates_by_hop_meet_the_budget_over_the_hops_there_are(name, hop_aware):
    """Three hops and a prompt, left-padded: hops 0 and 1 share a row, rows 1 and 4 serve none."""
    model = tiny_model(name, layers=2)
    config = DareConfig(
        scorer="router", schedule="learned", max_hops=5, hop_aware=hop_aware, vision_retention=0.5
    )
    found = []
    routed = fit_router(model, hop_rows(batches_of(model, 2), 3), config, details=found.append)
    costs, rates = found[0].costs, found[0].rates
    if not hop_aware:
        assert costs.weights == [1.0]
        assert costs.hops == {"vision": [], "text": []}
        assert len(rates) == 1
        return
    assert costs.weights == pytest.approx([0.5, 0, 0.25, 0.25, 0])
    assert costs.budgets["vision"] == pytest.approx([0.8, 0.625, 0.5, 0.375, 0.25])
    assert costs.budgets["text"] == pytest.approx([1.0, 0.875, 0.7, 0.525, 0.4])
    for name in ("vision", "text"):
        assert [len(row) for row in costs.hops[name]] == [5, 0, 5, 5, 0]
        at_target = {row[2] for row in costs.hops[name] if row}
        assert len(at_target) == 1  # the same rates everywhere
    mean = sum(
        weight * sum(vision for vision, _ in row) / 2
        for weight, row in zip(costs.weights, rates, strict=True)
    )
    assert mean == pytest.approx(0.5)
    assert rates[1] == rates[0]
    assert rates[4] == rates[3]
    table = [router.rates() for router in routed.get_base_model()._dare.controller.routers]
    written = [[tuple(layer[row].flip(0).tolist()) for layer in table] for row in range(5)]
    torch.testing.assert_close(torch.tensor(written), torch.tensor(rates), atol=1e-5, rtol=0)


def test_the_dearest_hop_keeps_most(monkeypatch):
    """Costs made up: only hops 2 mind, only vision; the budget goes there, the mean stays."""
    model = tiny_model("llava", layers=2)
    config = DareConfig(scorer="router", schedule="learned", max_hops=4, vision_retention=0.5)
    found = []

    def cost(self, rates):
        kept = [rates.get((2, layer, 1), 1.0) for layer in range(2)]
        return 10.0 - sum(kept)

    monkeypatch.setattr(RateFit, "_cost", cost)
    fit_router(model, hop_rows(batches_of(model, 1), 3), config, details=found.append)
    vision = [sum(vision for vision, _ in row) / 2 for row in found[0].rates]
    assert vision[2] == pytest.approx(0.8)  # 1.6 targets, the most that was tried
    assert 0.5 * vision[0] + 0.25 * vision[2] + 0.25 * vision[3] == pytest.approx(0.5)
    assert vision[0] < 0.5
    text = [sum(text for _, text in row) / 2 for row in found[0].rates]
    assert sum(w * r for w, r in zip(found[0].costs.weights, text, strict=True)) == pytest.approx(
        0.7
    )


def test_hops_are_weighed_as_the_losses_weigh_them_and_whole_text_is_not_tried():
    model = tiny_model("llava", layers=2)
    batches = hop_rows(batches_of(model, 2), 3)
    batches[1]["hop_ids"] = batches[1]["hop_ids"].clamp(max=1)  # a prompt and one hop
    config = DareConfig(scorer="router", schedule="learned", max_hops=4, text_retention=1.0)
    found = []
    routed = fit_router(model, batches, config, details=found.append)
    costs = found[0].costs
    assert costs.budgets["text"] == costs.hops["text"] == []
    assert {text for row in found[0].rates for _, text in row} == {1.0}
    wanted = torch.zeros(4)
    for batch in batches:
        routed(**batch)
        present = model._dare.controller.record.seen.any(-1).float()
        shares = present / present.sum(1, keepdim=True) / 4
        for hop, share in enumerate(shares.sum(0)):
            wanted[0 if hop <= 1 else hop] += share
    assert costs.weights == pytest.approx(wanted.tolist())


def test_every_hop_of_a_sequence_counts_alike():
    """Six tokens in hops of four and of two; another row has two hops of one token."""
    model = tiny_model("llava", layers=2)
    controller = apply_dare(model)._dare.controller
    batch = {
        "input_ids": torch.full((2, 8), 50),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "hop_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 2]]),
    }
    batch["labels"] = torch.where(batch["hop_ids"] > 0, batch["input_ids"], -100)
    found = _shares(batch, _hops(controller, batch))
    assert found.tolist() == [*[0.125] * 4, 0.25, 0.25, 0.5, 0.5]


def test_tried_rates_fall():
    for rates in TRIED_RATES.values():
        assert list(rates) == sorted(rates, reverse=True)
