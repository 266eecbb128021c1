"""Law 7: remove_dare gives back the very model, also after an exception mid-forward."""

import pytest
import torch
from laws import (
    ATTENTIONS,
    SCORER,
    TINY_MODELS,
    dare,
    forward,
    generate,
    hashed_scores,
    inputs_of,
)
from snapshots import hold_same, snapshot, warm

from dare_hf import DareConfig, apply_dare, dare_disabled, register_scorer, remove_dare
from dare_hf.testing import decoder_layers, tiny_model

SCORERS = ("attention", "random", "key_norm", "position", SCORER)
"""What HF itself writes on a module in every run."""


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_remove_restores_every_attribute(name, scorer, attention):
    model = tiny_model(name, attn_implementation=attention)
    inputs = inputs_of(model, (0, 1, 2))
    plain = warm(model, inputs)
    before = snapshot(model)
    assert apply_dare(model, DareConfig(scorer=scorer)) is model
    generate(model, inputs)
    with dare_disabled(model):
        forward(model, inputs)
    remove_dare(model)
    hold_same(before, snapshot(model))
    assert torch.equal(forward(model, inputs).logits, plain)


def test_remove_restores_a_model_nothing_ran_on():
    model = tiny_model("llava")
    before = snapshot(model)
    apply_dare(model)
    remove_dare(model)
    hold_same(before, snapshot(model))


class Broken(Exception):
    pass


def broken_scores(hidden, modality, *, layer, hop, positions):
    if layer == 2:
        raise Broken
    return hashed_scores(hidden, modality, layer=layer, hop=hop, positions=positions)


register_scorer("test_broken", broken_scores)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_remove_restores_after_an_exception_in_a_scorer(name, attention):
    model = tiny_model(name, attn_implementation=attention)
    inputs = inputs_of(model, (0, 1, 2))
    plain = warm(model, inputs)
    before = snapshot(model)
    apply_dare(model, DareConfig(scorer="test_broken"))
    for call in (generate, forward):
        with pytest.raises(Broken):
            call(model, inputs)
    remove_dare(model)
    hold_same(before, snapshot(model))
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_exception_inside_a_layer_leaves_the_patched_model_working(name):
    model = tiny_model(name)
    inputs = inputs_of(model)
    plain = warm(model, inputs)
    before = snapshot(model)
    with dare(model, scorer="attention"):
        whole = generate(model, inputs)

        def fail(*args):
            raise Broken

        handle = decoder_layers(model)[2].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            generate(model, inputs)
        handle.remove()
        again = generate(model, inputs)
    assert again.sequences.tolist() == whole.sequences.tolist()
    hold_same(before, snapshot(model))
    assert torch.equal(forward(model, inputs).logits, plain)


def test_disabling_ends_with_its_block_also_by_an_exception():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    with dare(model):
        pruned = forward(model, inputs).logits
        with pytest.raises(Broken), dare_disabled(model):
            raise Broken
        assert torch.equal(forward(model, inputs).logits, pruned)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_apply_may_follow_remove(name):
    model = tiny_model(name)
    inputs = inputs_of(model)
    runs = []
    for _ in range(2):
        with dare(model, scorer="attention"):
            runs.append(generate(model, inputs))
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()


def test_hooks_of_others_survive():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    calls = []
    layer = decoder_layers(model)[1]
    handle = layer.register_forward_hook(lambda *args: calls.append("before"))
    apply_dare(model)
    later = layer.register_forward_hook(lambda *args: calls.append("during"))
    forward(model, inputs)
    remove_dare(model)
    forward(model, inputs)
    assert calls == ["before", "during"] * 2
    handle.remove()
    later.remove()


def test_the_state_dict_is_untouched_by_a_training_free_scorer():
    model = tiny_model("chameleon")
    names = list(model.state_dict())
    with dare(model):
        assert list(model.state_dict()) == names
