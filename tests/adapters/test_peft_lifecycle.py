"""Router adapters come and go as peft's do, and take routing with them."""

import copy

import pytest
import torch
from laws import dare, forward, inputs_of
from peft import PeftModel, get_peft_model
from peft_runs import (
    LEARNED,
    MODELS,
    adapted,
    learn,
    load_quietly,
    lora,
    routers,
    saved,
    tokens,
)
from snapshots import hold_same, snapshot, warm

from dare_hf import DareConfig, apply_dare, dare_disabled, last_report, remove_dare
from dare_hf.errors import DareStateError
from dare_hf.testing import tiny_model
from dare_hf.training import add_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("name", MODELS)
def test_get_peft_model_installs_what_apply_dare_installs(name, folder):
    model = tiny_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    plain = tokens(model, inputs)
    peft_model = adapted(model)
    routed = tokens(peft_model, inputs)
    assert routed != plain, "the case prunes nothing"
    report = last_report(peft_model)
    assert report.kv_bytes < report.kv_bytes_baseline
    assert report.kv_bytes == report.kv_bytes_predicted
    assert last_report(model) == report, "the inner model has another report"
    assert tokens(model, inputs) == routed, "the inner model generates otherwise"
    other = tiny_model(name)
    apply_dare(other, saved(folder, name))
    assert tokens(other, inputs) == routed


@pytest.mark.parametrize("name", MODELS)
def test_unload_gives_back_the_very_model(name):
    model = tiny_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    plain = warm(model, inputs)
    trainable = [p.requires_grad for p in model.parameters()]
    before = snapshot(model)
    peft_model = adapted(model, hop_delimiters=(12,))
    tokens(peft_model, inputs)
    assert peft_model.unload() is model
    hold_same(before, snapshot(model))
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(forward(model, inputs).logits, plain)
    with pytest.raises(DareStateError, match="apply_dare"):
        last_report(model)
    assert adapted(model).unload() is model, "a second adapter after the first was unloaded"


def test_deleting_the_last_adapter_gives_back_the_very_model():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    plain = warm(model, inputs)
    before = snapshot(model)
    peft_model = adapted(model)
    peft_model.add_adapter("other", DareConfig(**LEARNED))
    peft_model.delete_adapter("other")
    peft_model.delete_adapter("default")
    hold_same(before, snapshot(model))
    assert torch.equal(forward(model, inputs).logits, plain)


def test_transformers_own_calls_install_and_remove(folder):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    plain = warm(model, inputs)
    before = snapshot(model)
    model.load_adapter(saved(folder), adapter_name="router")
    expected = tokens(adapted(tiny_model("llava")), inputs)
    assert tokens(model, inputs) == expected
    assert not any(p.requires_grad for p in model.parameters())
    model.delete_adapter("router")
    after = snapshot(model)
    for name in ("_hf_peft_config_loaded", "_weight_conversions"):  # HF's own notes
        before["modules"][""].pop(name, None)
        after["modules"][""].pop(name, None)
    hold_same(before, after)
    assert torch.equal(forward(model, inputs).logits, plain)
    add_adapter(model, DareConfig(**LEARNED), "fresh")
    learn(model)
    assert tokens(model, inputs) == expected
    assert all(p.requires_grad for router in routers(model) for p in router.parameters())


def test_several_adapters_each_with_its_own_configuration(folder):
    model = tiny_model("llava")
    inputs = inputs_of(model, (1, 2))
    first = tokens(adapted(tiny_model("llava"), seed=1), inputs)
    fields = {"schedule": "constant", "vision_retention": 0.3, "hop_delimiters": (12,)}
    second = tokens(adapted(tiny_model("llava"), seed=2, **fields), inputs)
    assert first != second
    peft_model = adapted(model, seed=1, name="first")
    peft_model.load_adapter(saved(folder, seed=2, **fields), "second")
    assert tokens(peft_model, inputs) == first
    peft_model.set_adapter("second")
    assert tokens(peft_model, inputs) == second
    peft_model.set_adapter("first")
    assert tokens(peft_model, inputs) == first
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        peft_model.delete_adapter("first")
    assert tokens(peft_model, inputs) == second


def test_training_flags_follow_peft():
    peft_model = adapted(tiny_model("llava"), name="one")
    base = [p for n, p in peft_model.named_parameters() if "dare_router" not in n]
    flags = {n: p.requires_grad for n, p in peft_model.named_parameters() if "dare_router" in n}
    assert not any(p.requires_grad for p in base)
    assert all(flags.values())
    assert len(flags) == 4 * 3, "weight, bias and rates of each layer"
    peft_model.add_adapter("two", DareConfig(**LEARNED))
    grown = {n: p.requires_grad for n, p in peft_model.named_parameters() if "dare_router" in n}
    assert grown == {**flags, **{n.replace(".one.", ".two."): False for n in flags}}
    peft_model.set_adapter("two")
    for name, parameter in peft_model.named_parameters():
        assert parameter.requires_grad == ("dare_router.two." in name)


def test_both_ways_to_switch_it_off():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    plain = tokens(model, inputs)
    peft_model = adapted(model)
    routed = tokens(peft_model, inputs)
    for one in (peft_model, model):
        with dare_disabled(one):
            assert tokens(peft_model, inputs) == plain
            assert tokens(model, inputs) == plain
    with peft_model.disable_adapter():
        assert tokens(peft_model, inputs) == plain
    assert tokens(peft_model, inputs) == routed


def test_a_deepcopy_is_independent():
    peft_model = adapted(tiny_model("llava"))
    inputs = inputs_of(peft_model.get_base_model())
    routed = tokens(peft_model, inputs)
    twin = copy.deepcopy(peft_model)
    learn(twin, seed=5)
    changed = tokens(twin, inputs)
    assert changed != routed
    assert tokens(peft_model, inputs) == routed
    peft_model.unload()
    assert tokens(twin, inputs) == changed


def test_dare_of_the_other_owner_is_refused(folder):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    with dare(model):
        routed = tokens(model, inputs)
        for call in (
            lambda: get_peft_model(model, DareConfig(**LEARNED)),
            lambda: add_adapter(model, DareConfig(**LEARNED), "x"),
            lambda: model.load_adapter(saved(folder), adapter_name="x"),
        ):
            with pytest.raises(DareStateError, match="remove_dare"):
                call()
            assert tokens(model, inputs) == routed
    peft_model = adapted(model)
    routed = tokens(peft_model, inputs)
    for one in (peft_model, model):
        for call in (apply_dare, remove_dare, lambda m: apply_dare(m, saved(folder))):
            with pytest.raises(DareStateError, match="unload"):
                call(one)
    assert tokens(peft_model, inputs) == routed


def test_wrapping_twice_and_merging_are_refused(folder):
    peft_model = adapted(tiny_model("llava"))
    inputs = inputs_of(peft_model.get_base_model())
    routed = tokens(peft_model, inputs)
    with (
        pytest.raises(DareStateError, match="add_adapter"),
        pytest.warns(UserWarning, match="second time"),
    ):
        get_peft_model(peft_model, DareConfig(**LEARNED))
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(DareStateError, match="merged"):
            getattr(peft_model, name)()
    assert tokens(peft_model, inputs) == routed


def test_two_routers_cannot_be_active_at_once(folder):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    load_quietly(model, saved(folder), "one")
    load_quietly(model, saved(folder, seed=1), "two")
    routed = tokens(model, inputs)
    with pytest.raises(DareStateError, match=r"\['one', 'two'\]"):
        model.set_adapter(["one", "two"])
    assert tokens(model, inputs) == routed
    model.set_adapter("one")
    assert tokens(model, inputs) != routed


def test_rows_cannot_name_their_own_adapters():
    peft_model = adapted(tiny_model("llava"))
    inputs = inputs_of(peft_model.get_base_model())
    with pytest.raises(ValueError, match="set_adapter"):
        peft_model.generate(**inputs, adapter_names=["default"], max_new_tokens=2)


@pytest.mark.parametrize("name", ["weight", "keys", "a.b", "merge"])
def test_a_name_that_torch_needs_is_refused(name):
    model = tiny_model("llava")
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name"):
        get_peft_model(model, DareConfig(**LEARNED), adapter_name=name)
    hold_same(before, snapshot(model))
    assert all(p.requires_grad for p in model.parameters())


def test_routers_move_with_the_model():
    peft_model = adapted(tiny_model("llava"))
    inputs = inputs_of(peft_model.get_base_model())
    peft_model.to(torch.float64)
    assert all(r.weight.dtype == torch.float64 for r in routers(peft_model))
    tokens(
        peft_model,
        {k: v for k, v in inputs.items() if k != "mm_encoder_outputs"}
        | {"pixel_values": torch.zeros(1, 3, 12, 12, dtype=torch.float64)},
    )


@pytest.mark.parametrize("options", [{"adapter_name": "router"}, {"low_cpu_mem_usage": True}])
def test_from_pretrained_under_another_name_and_on_the_meta_device(folder, options):
    inputs = inputs_of(tiny_model("llava"))
    routed = tokens(adapted(tiny_model("llava")), inputs)
    peft_model = PeftModel.from_pretrained(tiny_model("llava"), saved(folder), **options)
    assert tokens(peft_model, inputs) == routed
    assert not any(p.requires_grad for p in peft_model.parameters())
    options = {**options, "adapter_name": "more"}
    peft_model.load_adapter(saved(folder, seed=1), **options)
    peft_model.set_adapter("more")
    assert tokens(peft_model, inputs) == tokens(adapted(tiny_model("llava"), seed=1), inputs)


def test_a_lora_in_the_same_peft_model_is_refused_by_peft():
    peft_model = adapted(tiny_model("llava"))
    with pytest.raises(ValueError, match="different peft types"):
        peft_model.add_adapter("another", lora())
