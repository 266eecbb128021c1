"""4-bit backbones: right gradients after an eval forward, and a router trained on one."""

from __future__ import annotations

import pytest
import torch
from laws import inputs_of
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from dare_hf import DareConfig
from dare_hf.errors import DareStateError
from dare_hf.recipes import Recipe, train
from dare_hf.testing import tiny_model
from dare_hf.training import auxiliary_loss
from dare_hf.training.quantized import keep_gradients_right, quantization_config

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llava", layers=2, hidden_size=64, intermediate_size=128, head_dim=16)
    model.save_pretrained(path)
    return path


def load(folder):
    config = quantization_config(bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


def quantised(model):
    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


def batch_of(model):
    batch = inputs_of(model, (1, 2), pixels=True)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-6] = -100
    return batch


def router_gradients(model, batch):
    model.zero_grad()
    model.train()
    (model(**batch).loss + auxiliary_loss(model)[0]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_decoder_layers_are_quantised(folder):
    model = load(folder)
    names = [name for name, m in model.named_modules() if m in set(quantised(model))]
    assert len(names) == 2 * 7
    assert all(".language_model.layers." in name for name in names)


def test_gradients_are_right_after_an_eval_forward(folder):
    model = load(folder)
    assert keep_gradients_right(model) == len(quantised(model))
    routed = get_peft_model(model, DareConfig(scorer="router", schedule="learned"))
    batch = batch_of(routed)
    before = router_gradients(routed, batch)
    routed.eval()
    with torch.no_grad():
        routed(**batch)
        routed.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=2)
    after = router_gradients(routed, batch)
    assert all(value.abs().max() > 0 for name, value in before.items() if "weight" in name)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_the_trap_is_there_without_it(folder):
    """Where this fails, bitsandbytes has mended it and keep_gradients_right can go."""
    model = load(folder)
    if not getattr(quantised(model)[0], "support_avx512bf16_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    routed = get_peft_model(model, DareConfig(scorer="router", schedule="learned"))
    for layer in quantised(routed):
        object.__setattr__(layer, "support_avx512bf16_for_cpu", True)
    batch = batch_of(routed)
    before = router_gradients(routed, batch)
    routed.eval()
    with torch.no_grad():
        routed(**batch)
    with pytest.raises(DareStateError, match="repacked"):
        keep_gradients_right(routed)
    try:
        after = router_gradients(routed, batch)
    except (RuntimeError, UserWarning):
        return  # torch itself says that nothing backpropagates through the repacked kernel
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (before, after)]
    assert not torch.allclose(*flat, rtol=1e-2)


def test_training_moves_the_router_and_no_backbone_tensor(folder):
    routed = get_peft_model(load(folder), DareConfig(scorer="router", schedule="learned"))
    keep_gradients_right(routed)
    frozen = {n: v.clone() for n, v in routed.state_dict().items() if "dare_" not in n}
    batch = batch_of(routed)
    parameters = [p for p in routed.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    first = {n: p.detach().clone() for n, p in routed.named_parameters() if p.requires_grad}
    for _ in range(3):
        router_gradients(routed, batch)
        optimizer.step()
    for name, value in routed.state_dict().items():
        if "dare_" not in name:
            assert torch.equal(value, frozen[name]), name
    assert all(not torch.equal(p, first[n]) for n, p in routed.named_parameters() if n in first)


def test_a_recipe_trains_on_a_4_bit_embedded_model(tmp_path):
    recipe = Recipe(
        "anole", str(tmp_path), task=("maze",), steps=1, batch_size=2, load_in_4bit=True
    )
    result = train(recipe)
    assert len(quantised(result.model)) == 12 * 7
    assert set(result.folders) == {"dare"}
