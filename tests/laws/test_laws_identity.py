"""Law 1: at retention 1.0, or disabled, the model is the one it was."""

import pytest
import torch
from laws import (
    ATTENTIONS,
    BATCHES,
    FP32_TOLERANCE,
    TINY_MODELS,
    assert_close,
    assert_same_run,
    dare,
    everything,
    forward,
    generate,
    inputs_of,
    shared_model,
)

from dare_hf import DareCache, DareConfig, dare_disabled
from dare_hf.compat import cache_of

SCORERS = ("attention", "random", "key_norm", "position", "test_content")


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_greedy_is_token_identical_at_retention_one(name, attention, rows):
    model = shared_model(name, attention)
    inputs = inputs_of(model, BATCHES[rows])
    plain, plain_logits = generate(model, inputs), forward(model, inputs).logits
    with dare(model, **everything()):
        assert_same_run(generate(model, inputs), plain, what=f"{name} at retention 1.0")
        logits = forward(model, inputs).logits
    real = inputs["attention_mask"].bool()
    assert_close(logits[real], plain_logits[real], tolerance=FP32_TOLERANCE, what="bare forward")


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("schedule", ["constant", "two_stage"])
def test_no_scorer_or_schedule_changes_anything_at_retention_one(scorer, schedule):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1, 2))
    plain = generate(model, inputs)
    with dare(model, **everything(scorer=scorer, schedule=schedule, plan_every=2)):
        assert_same_run(generate(model, inputs), plain, what=f"{scorer}, {schedule}")


@pytest.mark.parametrize("fields", [{"pruned": "drop"}, {"batch_budget": "equal"}])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_mode_changes_anything_at_retention_one(name, fields):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    plain = generate(model, inputs)
    with dare(model, **everything(**fields)):
        assert_same_run(generate(model, inputs), plain, what=f"{name}, {fields}")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_pixels_through_the_tower_change_nothing_at_retention_one(name):
    model = shared_model(name)
    inputs = inputs_of(model, (2,), pixels=True)
    plain = generate(model, inputs)
    with dare(model, **everything()):
        assert_same_run(generate(model, inputs), plain, what=f"{name} with pixels")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_disabled_is_the_plain_model_bit_for_bit(name, attention):
    model = shared_model(name, attention)
    inputs = inputs_of(model, (0, 1, 2))
    plain, plain_logits = generate(model, inputs), forward(model, inputs).logits
    with dare(model, vision_retention=0.2, text_retention=0.5):
        pruned = forward(model, inputs).logits
        with dare_disabled(model):
            off = generate(model, inputs)
            assert torch.equal(forward(model, inputs).logits, plain_logits)
        assert torch.equal(forward(model, inputs).logits, pruned), "disabling outlived its block"
    assert_same_run(off, plain, tolerance=0.0, what=f"{name} disabled")
    assert not isinstance(cache_of(off), DareCache)
    real = inputs["attention_mask"].bool()
    assert not torch.allclose(pruned[real], plain_logits[real]), "the pruning pruned nothing"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_generate_returns_a_dare_cache(name):
    model = shared_model(name)
    with dare(model, DareConfig.preset("safe")):
        out = generate(model, inputs_of(model))
    assert isinstance(cache_of(out), DareCache)


@pytest.mark.parametrize("fields", [everything(), {"vision_retention": 0.3}])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_hidden_states_keep_their_full_shapes(name, fields):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    plain = forward(model, inputs, output_hidden_states=True)
    plain_run = generate(model, inputs, output_hidden_states=True)
    with dare(model, **fields):
        routed = forward(model, inputs, output_hidden_states=True)
        run = generate(model, inputs, output_hidden_states=True)
    shapes = [state.shape for state in plain.hidden_states]
    assert [state.shape for state in routed.hidden_states] == shapes
    for ours, theirs in zip(run.hidden_states, plain_run.hidden_states, strict=True):
        assert [state.shape for state in ours] == [state.shape for state in theirs]
    if fields == everything():
        real = inputs["attention_mask"].bool()
        for layer, (ours, theirs) in enumerate(
            zip(routed.hidden_states, plain.hidden_states, strict=True)
        ):
            assert_close(
                ours[real], theirs[real], tolerance=FP32_TOLERANCE, what=f"hidden states {layer}"
            )
