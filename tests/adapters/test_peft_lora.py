"""LoRA beside the routers: in either order, switched and saved apart."""

import pytest
import torch
from laws import inputs_of
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_runs import LEARNED, adapted, add_quietly, learn, load_quietly, lora, saved, tokens

from dare_hf import DareConfig, apply_dare, dare_disabled, remove_dare
from dare_hf.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("lora"))
    torch.manual_seed(1)
    get_peft_model(tiny_model("llava"), lora()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lora_alone(lora_folder):
    model = tiny_model("llava")
    PeftModel.from_pretrained(model, lora_folder)
    return tokens(model, inputs_of(model))


def both(folder, lora_folder, order):
    model = tiny_model("llava")
    adapters = {"routing": saved(folder), "tuning": lora_folder}
    for name in order:
        load_quietly(model, adapters[name], name)
    return model


ORDERS = [("routing", "tuning"), ("tuning", "routing")]


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_holds_both_in_either_order(order, folder, lora_folder, lora_alone):
    model = both(folder, lora_folder, order)
    inputs = inputs_of(model)
    plain, routed = (
        tokens(tiny_model("llava"), inputs),
        tokens(adapted(tiny_model("llava")), inputs),
    )
    together = tokens(model, inputs)
    assert together not in (plain, routed, lora_alone)
    with dare_disabled(model):
        assert tokens(model, inputs) == lora_alone, "dare_disabled turns off DARE only"
    model.set_adapter("tuning")
    assert tokens(model, inputs) == lora_alone
    model.set_adapter("routing")
    assert tokens(model, inputs) == routed
    model.set_adapter(["tuning", "routing"])
    assert tokens(model, inputs) == together
    model.disable_adapters()
    assert tokens(model, inputs) == plain
    model.enable_adapters()
    assert tokens(model, inputs) == together
    model.delete_adapter("routing")
    assert tokens(model, inputs) == lora_alone
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)


def test_each_is_saved_without_the_other(folder, lora_folder):
    model = both(folder, lora_folder, ORDERS[0])
    routing = get_peft_model_state_dict(model, adapter_name="routing")
    tuning = get_peft_model_state_dict(model, adapter_name="tuning")
    assert len(routing) == 4 * 3
    assert all("dare_router" in key for key in routing)
    assert tuning
    assert all("lora_" in key for key in tuning)


@pytest.mark.parametrize("order", ORDERS)
def test_fresh_adapters_train_together(order):
    model = tiny_model("llava")
    for name in order:
        add_quietly(model, DareConfig(**LEARNED) if name == "routing" else lora(), name)
    model.set_adapter(["tuning", "routing"])
    learn(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("dare_router" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    assert all("dare_router" in name or "lora_" in name for name in trained)


def test_apply_dare_serves_inside_a_lora_peft_model(folder, lora_folder, lora_alone, tmp_path):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    peft_model = PeftModel.from_pretrained(model, lora_folder)
    assert apply_dare(peft_model, saved(folder)) is peft_model
    together = tokens(peft_model, inputs)
    assert together == tokens(both(folder, lora_folder, ORDERS[0]), inputs)
    with dare_disabled(peft_model):
        assert tokens(peft_model, inputs) == lora_alone
    with peft_model.disable_adapter():
        assert tokens(peft_model, inputs) == tokens(adapted(tiny_model("llava")), inputs)
    peft_model.save_pretrained(tmp_path)
    assert all("lora_" in key for key in get_peft_model_state_dict(peft_model))
    remove_dare(peft_model)
    assert tokens(peft_model, inputs) == lora_alone
