"""The literal preset, in both readings of its scaling, trains and generates as it was trained."""

import math

import pytest
import torch
from laws import forward, inputs_of
from parity_runs import hold_steps
from router_runs import FIELDS, written_batch
from trainer_runs import logs_of, trained_parameters, trainer_of

from dare_hf import DareConfig, apply_dare
from dare_hf.testing import tiny_model
from dare_hf.training import cosine_temperature

STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
get_peft_model = pytest.importorskip("peft").get_peft_model


def literal(scaling):
    torch.manual_seed(0)
    config = DareConfig.preset("literal", score_scaling=scaling, **FIELDS)
    return get_peft_model(tiny_model("llava"), config)


@pytest.mark.parametrize("scaling", ["multiply_training", "multiply"])
def test_it_trains_and_generates_as_it_was_trained(scaling, tmp_path):
    model = literal(scaling)
    before = trained_parameters(model)
    trainer = trainer_of(tmp_path, model, max_steps=STEPS)
    trainer.train()
    logs = logs_of(trainer)
    taus = [entry["dare/tau"] for entry in logs]
    assert taus == [cosine_temperature(step / STEPS, 1.0, 0.2) for step in range(STEPS)]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs)
    after = trained_parameters(model)
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    model.eval()
    batch, out, span = written_batch(model)
    hold_steps(out, forward(model, batch).logits, span, what=scaling)
    model.save_pretrained(tmp_path / "adapter")
    loaded = apply_dare(tiny_model("llava"), tmp_path / "adapter")
    inputs = inputs_of(loaded, (1, 2))
    assert torch.equal(forward(loaded, inputs).logits, forward(model, inputs).logits)


def test_scores_multiply_where_the_reading_says():
    """In training mode under both, in eval mode under one; by values, not by gradients alone."""
    found, batch = {}, written_batch(literal("straight_through"))[0]
    for scaling in ("straight_through", "multiply_training", "multiply"):
        model = literal(scaling)
        for training in (True, False):
            model.train(training)
            torch.manual_seed(3)  # of the Gumbel noise
            with torch.no_grad():
                found[scaling, training] = model(**batch).logits
    plain, trained, both = "straight_through", "multiply_training", "multiply"
    assert torch.equal(found[trained, False], found[plain, False])
    assert (found[both, False] - found[plain, False]).abs().max() > 0.1
    assert torch.equal(found[trained, True], found[both, True])
    assert (found[trained, True] - found[plain, True]).abs().max() > 0.1
