"""Adapters where models live: offloaded by accelerate, in half precision, refused settings."""

import accelerate
import pytest
import torch
from laws import forward, inputs_of
from peft import PeftModel, get_peft_model
from peft_runs import LEARNED, adapted, routers, saved, tokens
from snapshots import hold_same, snapshot

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.errors import DareConfigError, DareStateError, UnsupportedModelError
from dare_hf.testing import tiny_model
from dare_hf.training import add_adapter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("when", ["before", "after"])
def test_cpu_offload_changes_nothing(when, folder):
    model = tiny_model("llava")
    inputs = inputs_of(model)
    plain, routed = tokens(model, inputs), tokens(adapted(tiny_model("llava")), inputs)
    if when == "before":
        accelerate.cpu_offload(model, execution_device=CPU)
        apply_dare(model, saved(folder))
    else:
        apply_dare(model, saved(folder))
        accelerate.cpu_offload(model, execution_device=CPU)
        with pytest.raises(DareStateError, match="offload hooks"):
            tokens(model, inputs)
        return
    assert tokens(model, inputs) == routed
    remove_dare(model)
    assert tokens(model, inputs) == plain


def test_routers_of_pefts_are_offloaded_with_the_model():
    routed = tokens(adapted(tiny_model("llava")), inputs_of(tiny_model("llava")))
    model = adapted(tiny_model("llava"))
    accelerate.cpu_offload(model, execution_device=CPU)
    assert routers(model)[0].weight.device.type == "meta"
    assert tokens(model, inputs_of(tiny_model("llava"))) == routed


def test_routers_stay_float32_on_a_half_model(folder):
    model = tiny_model("llava", dtype=torch.bfloat16)
    for options in ({}, {"low_cpu_mem_usage": True}):
        peft_model = PeftModel.from_pretrained(model, saved(folder), **options)
        assert {p.dtype for r in routers(model) for p in r.parameters()} == {torch.float32}
        assert forward(peft_model, inputs_of(model)).logits.dtype == torch.bfloat16
        peft_model.unload()


REFUSED = {
    "routed decode": ({"decode": "routed", "pruned": "drop"}, "decode"),
    "scaling by no router": ({"scorer": "attention", "score_scaling": "multiply"}, "score_scaling"),
    "a list too short": ({"schedule": [(0.5, 0.5)] * 3}, r"4.*3"),
    "an unknown scorer": ({"scorer": "no_such_scorer"}, "no_such_scorer"),
    "a delimiter outside": ({"hop_delimiters": (5000,)}, "5000"),
    "text without a processor": ({"hop_delimiters": ("</x>",)}, "processor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_does_not_fit_is_refused_on_every_way(case):
    fields, match = REFUSED[case]
    model = tiny_model("llava")
    before = snapshot(model)
    config = DareConfig.from_peft_type(**{**LEARNED, **fields})  # as a file brings it
    for call in (lambda: get_peft_model(model, config), lambda: add_adapter(model, config, "x")):
        with pytest.raises(DareConfigError, match=rf"(?s){match}"):
            call()
        hold_same(before, snapshot(model))
        assert all(p.requires_grad for p in model.parameters())
    peft_model = adapted(model)
    inputs = inputs_of(model)
    routed = tokens(peft_model, inputs)
    with pytest.raises(DareConfigError, match=rf"(?s){match}"):
        peft_model.add_adapter("x", config)
    assert list(peft_model.peft_config) == ["default"]
    assert tokens(peft_model, inputs) == routed


def test_an_unsupported_model_is_refused():
    with pytest.raises(UnsupportedModelError):
        get_peft_model(torch.nn.Linear(2, 2), DareConfig(**LEARNED))


def test_other_modules_cannot_be_saved_along():
    with pytest.raises(DareConfigError, match="modules_to_save"):
        DareConfig(modules_to_save=["lm_head"])
