"""LoRA around DARE: put on before, after and over it, over several hops and left padding."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_runs import adapted, lora, saved
from places import (
    FULL,
    PRUNED,
    assert_same_trace,
    place_inputs,
    place_model,
    plain_trace,
    routed_trace,
    trace,
)

from dare_hf import apply_dare, dare_disabled, remove_dare

NAMES = ("llava", "qwen2_5_vl", "smolvlm")
FROZEN = 1e-5
"""A frozen model and a trainable one differ by 5e-7, DARE or not: torch takes other kernels."""

MERGED = 5e-5
"""Merged weights are sums that were rounded once, before the product."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """By model a folder with a LoRA that changes its output."""
    found = {}
    for name in NAMES:
        torch.manual_seed(1)
        found[name] = str(tmp_path_factory.mktemp(name))
        get_peft_model(place_model(name), lora()).save_pretrained(found[name])
    return found


def merged(name, adapters):
    """The single-process reference: the LoRA's weights in the model, no peft."""
    return PeftModel.from_pretrained(place_model(name), adapters[name]).merge_and_unload()


CASES = [
    ("llava", "attention"),
    *(
        pytest.param("llava", case, marks=pytest.mark.slow)
        for case in PRUNED
        if case != "attention"
    ),
    *(pytest.param(name, "attention", marks=pytest.mark.slow) for name in NAMES[1:]),
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_order_does_not_matter(name, case, adapters):
    reference = merged(name, adapters)
    inputs = place_inputs(reference)
    plain = plain_trace(reference, inputs)
    expected = routed_trace(reference, inputs, PRUNED[case])
    expected.report = None  # a wrapper's own products count too

    before = PeftModel.from_pretrained(place_model(name), adapters[name]).eval()
    assert_same_trace(plain_trace(before, inputs), plain, "LoRA alone", MERGED)
    assert_same_trace(routed_trace(before, inputs, FULL), plain, "retention 1.0", MERGED)
    first = routed_trace(before, inputs, PRUNED[case])
    assert_same_trace(first, expected, "LoRA, then DARE", MERGED)

    after = place_model(name)
    apply_dare(after, PRUNED[case])
    unadapted = trace(after, inputs)
    wrapped = PeftModel.from_pretrained(after, adapters[name]).eval()
    assert trace(wrapped, inputs).report["flops"] != unadapted.report["flops"]
    assert_same_trace(trace(wrapped, inputs), first, "DARE, then LoRA", tolerance=0.0)
    with dare_disabled(wrapped):
        assert_same_trace(plain_trace(wrapped, inputs), plain, "dare_disabled", MERGED)
    unadapted.report = None
    with wrapped.disable_adapter():
        assert_same_trace(trace(wrapped, inputs), unadapted, "LoRA off", FROZEN)
    remove_dare(wrapped)
    assert_same_trace(plain_trace(wrapped, inputs), plain, "after remove_dare", MERGED)


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_lora_is_taken_off_under_dare(way, adapters):
    model = place_model("llava")
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    bare = routed_trace(model, inputs, PRUNED["attention"])
    together = routed_trace(merged("llava", adapters), inputs, PRUNED["attention"])
    apply_dare(model, PRUNED["attention"])
    wrapped = PeftModel.from_pretrained(model, adapters["llava"]).eval()
    left = getattr(wrapped, way)()
    assert left is model
    expected = bare if way == "unload" else together
    assert_same_trace(trace(model, inputs), expected, way, tolerance=FROZEN)
    remove_dare(model)
    if way == "unload":
        assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", FROZEN)


def test_a_router_adapter_beside_a_lora(adapters, tmp_path_factory):
    """apply_dare(model, folder) inside a PeftModel, and routers of peft over merged weights."""
    folder = saved(tmp_path_factory.mktemp("routers"), decode_window=4)
    reference = adapted(merged("llava", adapters), decode_window=4)
    inputs = place_inputs(reference.get_base_model())
    expected = trace(reference, inputs)
    assert expected.report["hops"] == 4
    expected.report = None
    wrapped = PeftModel.from_pretrained(place_model("llava"), adapters["llava"]).eval()
    alone = plain_trace(wrapped, inputs)
    apply_dare(wrapped, folder)
    assert_same_trace(trace(wrapped, inputs), expected, "routers and LoRA", MERGED)
    assert trace(wrapped, inputs).sequences.tolist() != alone.sequences.tolist()
    remove_dare(wrapped)
    assert_same_trace(plain_trace(wrapped, inputs), alone, "after remove_dare", tolerance=0.0)
