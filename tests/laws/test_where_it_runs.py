"""Under the wrappers models live in: gradient checkpointing, offload, compile-free training."""

import accelerate
import pytest
import torch
from laws import (
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    assert_same_run,
    dare,
    everything,
    forward,
    generate,
    inputs_of,
)

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.compat import cache_of
from dare_hf.testing import tiny_model

PRUNED = {"vision_retention": 0.4, "text_retention": 0.7}
SCORERS = ("attention", SCORER)


def gradients(model, inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits of a training forward and the gradient of each parameter."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    picked = logits[inputs["attention_mask"].bool()][:, 10:100]
    picked.log_softmax(-1)[:, 0].mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return logits.detach(), grads


@pytest.mark.parametrize("fields", [everything(), PRUNED], ids=["full", "pruned"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_gradient_checkpointing_is_exact(name, fields):
    model = tiny_model(name).train()
    inputs = inputs_of(model, (0, 1, 2))
    plain = gradients(model, inputs)
    with dare(model, **fields):
        straight = gradients(model, inputs)
        model.activation_checkpointing_enable({"use_reentrant": False})
        checkpointed = gradients(model, inputs)
        model.activation_checkpointing_disable()
    assert_close(checkpointed[0], straight[0], tolerance=0.0, what="logits")
    for ours, theirs in zip(checkpointed[1], straight[1], strict=True):
        assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what="gradient")
    if fields == everything():
        real = inputs["attention_mask"].bool()
        assert_close(straight[0][real], plain[0][real], tolerance=FP32_TOLERANCE, what="logits")
        for ours, theirs in zip(straight[1], plain[1], strict=True):
            assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what="gradient to the plain one")


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_cpu_offload_changes_nothing(name, when, scorer):
    model = tiny_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    config = DareConfig(scorer=scorer, schedule="constant", **PRUNED)
    plain = generate(model, inputs)
    apply_dare(model, config)
    expected = generate(model, inputs)
    remove_dare(model)
    if when == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        apply_dare(model, config)
    else:
        apply_dare(model, config)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_same_run(generate(model, inputs), expected, tolerance=0.0, what=f"offload {when}")
    if when == "before":
        remove_dare(model)
        assert_same_run(generate(model, inputs), plain, tolerance=0.0, what="offload, removed")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_bfloat16_runs(name):
    model = tiny_model(name, dtype=torch.bfloat16)
    inputs = inputs_of(model, (0, 1, 2))
    plain = generate(model, inputs)
    with dare(model, **everything()):
        assert generate(model, inputs).sequences.tolist() == plain.sequences.tolist()
    for scorer in SCORERS:
        with dare(model, scorer=scorer, **PRUNED):
            out = generate(model, inputs)
        assert out.sequences.shape == plain.sequences.shape
        assert cache_of(out).layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("name", TINY_MODELS)
def test_train_mode_generates_as_eval_mode_does(name):
    model = tiny_model(name)
    inputs = inputs_of(model)
    with dare(model, **PRUNED):
        expected = generate(model, inputs)
        model.train()
        assert_same_run(generate(model, inputs), expected, tolerance=0.0, what="train mode")
        assert model.training


def test_inference_mode_and_grad_mode_agree():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    with dare(model, scorer="attention", **PRUNED):
        expected = forward(model, inputs).logits
        with torch.inference_mode():
            assert_close(model(**inputs).logits, expected, tolerance=0.0, what="inference mode")
        assert_close(
            model(**inputs).logits.detach(), expected, tolerance=FP32_TOLERANCE, what="grad mode"
        )
