"""score_scaling="multiply": every token that runs is updated by its score's share."""

import pytest
import torch
from laws import BATCHES, FP32_TOLERANCE, assert_close, forward, generate, inputs_of
from peft_runs import adapted, routers

from dare_hf.testing import decoder_layers, modality_of, tiny_model, written_inputs

WHOLE = {"schedule": "constant", "vision_retention": 1.0, "text_retention": 1.0}


def scaled_by_hand(model, own, inputs):
    """Logits of an unpatched model whose layers' updates are multiplied by the routers' scores."""
    modality = modality_of(model, inputs)

    def scale(router):
        def after(layer, args, output):
            hidden, first = args[0], output[0] if isinstance(output, tuple) else output
            scores = router.scores(hidden, modality)[..., None]
            result = hidden + scores * (first - hidden)
            return (result, *output[1:]) if isinstance(output, tuple) else result

        return after

    pairs = zip(decoder_layers(model), own, strict=True)
    handles = [layer.register_forward_hook(scale(router)) for layer, router in pairs]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_unpruned_it_is_the_scaled_model(name):
    model, plain = tiny_model(name), tiny_model(name)
    inputs = inputs_of(model, BATCHES["padded"])
    peft_model = adapted(model, score_scaling="multiply", **WHOLE)
    real, own = inputs["attention_mask"].bool(), routers(peft_model)
    logits = forward(peft_model, inputs).logits
    wanted = scaled_by_hand(plain, own, inputs)
    assert_close(logits[real], wanted[real], tolerance=FP32_TOLERANCE, what="prompt")
    out = generate(peft_model, inputs)
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    wanted = scaled_by_hand(plain, own, written)
    for step, ours in enumerate(out.logits):
        theirs = wanted[:, inputs["input_ids"].shape[1] - 1 + step]
        assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what=f"step {step}")


@pytest.mark.parametrize("fields", [{}, {"plan_every": 2, "pruned": "drop"}], ids=["own", "shared"])
def test_pruned_it_is_the_training_forward(fields):
    model, plain = tiny_model("llava"), tiny_model("llava")
    inputs = inputs_of(model, BATCHES["padded"])
    peft_model = adapted(model, score_scaling="multiply", **fields)
    out = generate(peft_model, inputs)
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    span = inputs["input_ids"].shape[1]
    labels = written["input_ids"].clone()
    labels[:, :span] = -100
    trained = forward(peft_model, {**written, "labels": labels}).logits
    for step, ours in enumerate(out.logits):
        theirs = trained[:, span - 1 + step]
        assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what=f"step {step}")
