"""Learned rates: where they start, who reads which row, when they are read again."""

import pytest
import torch
from hop_runs import closing
from laws import BATCHES, FP32_TOLERANCE, assert_close, forward, inputs_of
from peft import get_peft_model
from peft_runs import LEARNED, adapted, learn, routers, tokens

from dare_hf import DareConfig, last_report
from dare_hf.engine.attach import state_of
from dare_hf.routing import TEXT, VISION
from dare_hf.routing.retention import build_table
from dare_hf.testing import (
    HopRules,
    OracleRouting,
    hop_forward,
    oracle_forward,
    tiny_model,
    written_inputs,
)
from dare_hf.training import auxiliary_loss

STEPS = {1: [[3, 4, 11, 16]], 3: [[2, 9], [5, 6, 7, 15], [0, 12]]}


def table_of(model):
    state_of(model).controller.follow_adapter()
    return state_of(model).controller.table


def test_fresh_rates_are_the_two_stage_table_without_exempt_layers():
    fields = {"vision_retention": 0.4, "text_retention": 0.7, "hop_decay": 0.8}
    table = table_of(adapted(tiny_model("llava"), seed=None, **fields))
    wanted = build_table(4, schedule="two_stage", max_hops=4, **fields)
    assert len(table.vision) == len(table.text) == 4
    for hop in range(6):
        for layer in range(4):
            for kind in (0, 1):
                rate = table.rate(hop, layer, kind)
                assert rate == pytest.approx(wanted.rate(hop, layer, kind), abs=1e-6)


def test_row_0_serves_hops_0_and_1_and_the_last_row_all_later_ones():
    model = adapted(tiny_model("llava"))
    table = table_of(model)
    for layer, router in enumerate(routers(model)):
        rates = router.rates().double()
        for hop, row in enumerate([0, 0, 2, 3, 3, 3]):
            for kind in (0, 1):
                assert table.rate(hop, layer, kind) == rates[row, kind].item()


def test_one_row_for_all_hops_without_hop_awareness():
    model = adapted(tiny_model("llava"), hop_aware=False)
    assert routers(model)[0].rate_logits.shape == (1, 2)
    table = table_of(model)
    assert table.rate(0, 1, 1) == table.rate(7, 1, 1) == routers(model)[1].rates()[0, 1].item()


def test_a_shared_plan_has_the_rates_of_its_plan_layer():
    model = adapted(tiny_model("llava"), plan_every=3)
    table = table_of(model)
    assert table.plan_layers == (0, 0, 0, 3)
    for kind in (0, 1):
        assert table.rate(2, 1, kind) == table.rate(2, 0, kind)


def test_rates_are_read_again_when_they_changed_and_only_then():
    model = adapted(tiny_model("llava"))
    inputs = inputs_of(model.get_base_model())
    controller = state_of(model).controller
    forward(model, inputs)
    first = controller.table
    forward(model, inputs)
    assert controller.table is first
    optimizer = torch.optim.SGD([r.rate_logits for r in routers(model)], lr=1.0)
    for router in routers(model):
        router.rate_logits.grad = torch.ones_like(router.rate_logits)
    optimizer.step()
    forward(model, inputs)
    second = controller.table
    assert second.rate(0, 0, 1) < first.rate(0, 0, 1)
    routers(model)[2].rate_logits.data.fill_(4.0)
    forward(model, inputs)
    assert controller.table.rate(0, 2, 0) == routers(model)[2].rates()[0, 0].item()
    assert controller.in_use.planner.table is controller.table


def test_a_devices_rates_are_read_by_version_and_identity(monkeypatch):
    model = adapted(tiny_model("llava"))
    controller = state_of(model).controller
    monkeypatch.setattr("dare_hf.engine.active_adapter._stacked", lambda logits: None)
    controller.follow_adapter()
    read = controller.table
    controller.follow_adapter()
    assert controller.table is read
    learn(model, seed=4)
    controller.follow_adapter()
    assert controller.table != read


def test_a_fixed_schedule_has_no_rates_that_train():
    model = adapted(tiny_model("llava"), schedule="constant", vision_retention=1.0)
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"weight", "bias"}
    table = table_of(model)
    for layer, router in enumerate(routers(model)):
        assert router.rates()[0, 1] == 1.0
        assert router.rates()[2, 0].item() == pytest.approx(table.rate(2, layer, 0))


def router_scores(model):
    """The active routers as a scorer the oracle can call."""
    own = routers(model)

    def scores(hidden, modality, *, layer, hop, positions):
        with torch.no_grad():
            return own[layer].scores(hidden, modality)

    return scores


def oracle_of(model, pruned):
    table = table_of(model)
    pairs = [list(zip(*rows, strict=True)) for rows in zip(table.vision, table.text, strict=True)]
    routing = OracleRouting(pairs[0], plan_layers=table.plan_layers, pruned=pruned)
    return routing, HopRules(rates=pairs, delimiters=[(12,)])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("pruned", ["bypass", "drop"])
def test_a_routed_prompt_is_the_masked_oracles(name, pruned):
    model = tiny_model(name)
    inputs = inputs_of(model, BATCHES["padded"])
    peft_model = adapted(model, pruned=pruned)
    logits = forward(peft_model, inputs).logits
    routing, _ = oracle_of(peft_model, pruned)
    oracle = oracle_forward(tiny_model(name), inputs, router_scores(peft_model), routing)
    real = inputs["attention_mask"].bool()
    assert any((keep != real).any() for keep in oracle.keep), "the case prunes nothing"
    assert_close(logits[real], oracle.logits[real], tolerance=FP32_TOLERANCE, what=name)


@pytest.mark.parametrize("pruned", ["bypass", "drop"])
def test_hops_by_stored_router_scores_are_the_oracles(pruned):
    model = tiny_model("llava")
    inputs = inputs_of(model, BATCHES["padded"])
    peft_model = adapted(model, pruned=pruned, hop_delimiters=(12,))
    out = closing(peft_model, inputs, STEPS[3])
    assert last_report(peft_model).hops > 3
    routing, rules = oracle_of(peft_model, pruned)
    plain = tiny_model("llava")
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    span = inputs["input_ids"].shape[1]
    oracle = hop_forward(plain, written, router_scores(peft_model), routing, rules, span=span)
    for step, logits in enumerate(out.logits):
        theirs = oracle.logits[:, span - 1 + step]
        assert_close(logits, theirs, tolerance=FP32_TOLERANCE, what=f"step {step}")


def test_learned_rates_may_come_with_another_scorer():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    peft_model = get_peft_model(model, DareConfig(**{**LEARNED, "scorer": "attention"}))
    tokens(peft_model, inputs)
    report = last_report(peft_model)
    assert report.retention[0][3]["vision"] < 0.5


def test_a_fresh_configuration_routes_as_it_says():
    model = tiny_model("llava")
    peft_model = get_peft_model(model, DareConfig(scorer="random", schedule="constant"))
    tokens(peft_model, inputs_of(model))
    controller = state_of(peft_model).controller
    assert controller.config.scorer == "random"
    assert set(controller.table.vision[0]) == {0.4}


@pytest.mark.parametrize("plan_every", [1, 4])
def test_the_first_layers_of_a_deep_model_are_whole_and_the_others_hold_the_mean(plan_every):
    fields = {"vision_retention": 0.4, "text_retention": 0.7, "plan_every": plan_every}
    model = adapted(tiny_model("llava", layers=9), seed=None, **fields)
    for kind, target in ((VISION, 0.4), (TEXT, 0.7)):
        assert table_of(model).mean(kind) == pytest.approx(target, abs=1e-6)
    learn(model)
    table = table_of(model)
    assert table.vision[0][:2] == table.text[0][:2] == (1.0, 1.0)
    assert max(*table.vision[0][2:], *table.text[0][2:]) < 1.0
    assert table.plan_layers[2] == 2, "the first layer that prunes selects"
    old = adapted(tiny_model("llava", layers=9), plan_every=plan_every, first_layers_whole=0)
    assert max(table_of(old).text[0]) < 1.0, "adapters trained before keep their tables"


def test_rates_and_scores_at_their_targets_cost_nothing_beside_whole_layers():
    """The auxiliary loss asks the free layers for the mean that they have to hold."""
    fields = {"vision_retention": 0.4, "text_retention": 0.7, "hop_aware": False}
    model = adapted(tiny_model("llava", layers=9), seed=None, lambda_hard=0.0, **fields)
    inputs = inputs_of(model.get_base_model(), (1,), text=(40,))
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 30, -100)
    with torch.no_grad():
        for router in routers(model)[2:]:
            router.weight.zero_()
            router.bias.copy_(router.rate_logits[0])
    model(**inputs, labels=labels).loss.backward()
    model.zero_grad()
    model(**inputs, labels=labels)
    loss, parts = auxiliary_loss(model)
    assert loss.item() == pytest.approx(0.0, abs=1e-6), parts
    with torch.no_grad():
        routers(model)[5].rate_logits.add_(1.0)
    model(**inputs, labels=labels)
    assert auxiliary_loss(model)[0].item() > 1e-3


def test_every_parameter_of_a_router_takes_part_beside_whole_layers():
    """Else DDP, which counts the gradients that come, waits for some that never do."""
    model = adapted(tiny_model("llava", layers=9), hop_aware=False)
    inputs = inputs_of(model.get_base_model(), (1,), text=(40,))
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 30, -100)
    loss = model(**inputs, labels=labels).loss + auxiliary_loss(model)[0]
    loss.backward()
    for layer, router in enumerate(routers(model)):
        assert all(p.grad is not None for p in router.parameters()), layer
        assert bool(router.rate_logits.grad.any()) == (layer >= 2)
