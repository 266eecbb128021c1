"""A prefill allocates no more than the unpatched model does: the allocator itself is asked."""

import pytest
import torch
from laws import dare

from dare_hf.benchmark.memory import peak_bytes
from dare_hf.benchmark.random_llava import Setting, build_inputs, build_model

SETTING = Setting(tokens=2560, layers=2, hidden=128, intermediate=256, vocab=300)
WHOLE = {"vision_retention": 1.0, "text_retention": 1.0, "schedule": "constant"}
MORE = 1.05
"""What bookkeeping may take beside the model's own peak."""


@pytest.fixture(scope="module")
def model():
    return build_model(SETTING)


def inputs_of(pads: int = 0) -> dict:
    """The bench's prompt, its first tokens pads."""
    inputs = build_inputs(SETTING) | {"logits_to_keep": 1}
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, :pads] = 0
    return inputs | ({"attention_mask": mask} if pads else {})


def decoded(model, inputs) -> None:
    """A prefill and two steps."""
    wanted = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
    model.generate(**wanted, max_new_tokens=3, do_sample=False, suppress_tokens=[3])


RUNS = {
    "forward": lambda model: model(**inputs_of()),
    "padded": lambda model: model(**inputs_of(pads=6)),
    "generate": lambda model: decoded(model, inputs_of()),
}


@pytest.fixture(scope="module")
def plain(model) -> dict[str, int]:
    """Peaks of the unpatched model."""
    return {way: peak_bytes(lambda way=way: RUNS[way](model)) for way in RUNS}


@pytest.mark.parametrize("way", RUNS)
@pytest.mark.parametrize("fields", [{"scorer": "key_norm"}, {"hop_delimiters": (7,)}])
def test_at_retention_1_it_is_that_of_the_unpatched_model(model, plain, way, fields):
    with dare(model, **WHOLE, **fields):
        ours = peak_bytes(lambda: RUNS[way](model))
    assert plain[way] > 2**22, "the measure sees the model"
    assert ours <= MORE * plain[way]


@pytest.mark.parametrize("scorer", ["key_norm", "attention"])
def test_pruned_layers_hold_less(model, plain, scorer):
    """At .4 and .7 a layer runs 0.43 of the tokens; the embeddings are all there."""
    fields = {"vision_retention": 0.4, "text_retention": 0.7, "schedule": "constant"}
    with dare(model, **fields, scorer=scorer):
        ours = peak_bytes(lambda: RUNS["forward"](model))
    assert ours <= 0.75 * plain["forward"]
