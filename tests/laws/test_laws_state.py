"""Law 8: no state leaks between runs, batches, models, copies or turns."""

import copy
import gc
from contextlib import suppress

import pytest
import torch
from laws import (
    SCORER,
    TINY_MODELS,
    assert_same_run,
    dare,
    everything,
    forward,
    generate,
    inputs_of,
    shared_model,
)
from transformers import DynamicCache, LogitsProcessor

from dare_hf import (
    DareCache,
    DareConfig,
    apply_dare,
    last_report,
    register_scorer,
    remove_dare,
)
from dare_hf.compat import CACHE, cache_of
from dare_hf.testing import tiny_model

PRUNED = {"vision_retention": 0.4, "text_retention": 0.7}
SCORERS = ("attention", SCORER)


class Interrupt(Exception):
    pass


class InterruptAt(LogitsProcessor):
    """Stops generate with an exception, as a user's Ctrl-C would."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise Interrupt
        return scores


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_run_depends_on_no_run_before_it(name, scorer):
    model = shared_model(name)
    inputs, other = inputs_of(model), inputs_of(model, (0, 1, 2), seed=3)
    with dare(model, scorer=scorer, **PRUNED):
        first = generate(model, inputs)
        report = last_report(model)
        stop = InterruptAt(other["input_ids"].shape[1] + 2)
        for _ in range(2):
            generate(model, other)
            with pytest.raises(Interrupt):
                generate(model, other, logits_processor=[stop])
            forward(model, other)
            again = generate(model, inputs)
            assert_same_run(again, first, tolerance=0.0, what=name)
            assert last_report(model).flops == report.flops
            assert last_report(model).kv_bytes == report.kv_bytes


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_deepcopy_is_independent(name, scorer):
    model = tiny_model(name)
    inputs = inputs_of(model)
    plain = generate(model, inputs)
    apply_dare(model, DareConfig(scorer=scorer, schedule="constant", **PRUNED))
    first = generate(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert_same_run(generate(twin, inputs), first, tolerance=0.0, what="the copy")
    changed = generate(model, inputs)
    assert not torch.equal(changed.logits[0], first.logits[0]), "the original runs the copy"
    remove_dare(model)
    assert_same_run(generate(twin, inputs), first, tolerance=0.0, what="the copy, still patched")
    remove_dare(twin)
    assert_same_run(generate(twin, inputs), plain, tolerance=0.0, what="the copy, restored")


def test_a_copy_of_a_plain_model_is_plain():
    model = tiny_model("llava")
    twin = copy.deepcopy(model)
    inputs = inputs_of(model)
    plain = forward(model, inputs).logits
    with dare(model, **PRUNED):
        assert torch.equal(forward(twin, inputs).logits, plain)


def test_two_patched_models_do_not_know_each_other():
    one, two = tiny_model("llava"), tiny_model("qwen2_5_vl")
    inputs = {model: inputs_of(model) for model in (one, two)}
    with dare(one, **PRUNED):
        alone = generate(one, inputs[one])
    with dare(two, scorer="attention", schedule="safe"):
        alone_two = generate(two, inputs[two])
        report = last_report(two)
        with dare(one, **PRUNED):
            assert_same_run(generate(one, inputs[one]), alone, tolerance=0.0, what="the first")
            assert last_report(two).flops == report.flops
            again = generate(two, inputs[two])
            assert_same_run(again, alone_two, tolerance=0.0, what="the second")
        again = generate(two, inputs[two])
        assert_same_run(again, alone_two, tolerance=0.0, what="the second, alone again")


def second_turn(inputs, out, text: int = 6):
    """Return the inputs of a chat's next turn: all that was said, and more words."""
    rows = len(out.sequences)
    generator = torch.Generator().manual_seed(9)
    words = torch.randint(10, 100, (rows, text), generator=generator)
    ids = torch.cat([out.sequences, words], dim=1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    turn = {"input_ids": ids}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            turn[name] = torch.nn.functional.pad(inputs[name], (0, more), value=value)
    return turn


@pytest.mark.parametrize("images", [(1,), (0, 1, 2)], ids=["alone", "padded"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_turns_with_a_carried_cache_are_the_models_own_at_retention_one(name, images):
    model = shared_model(name)
    inputs = inputs_of(model, images)
    config = model.config.get_text_config()
    plain = generate(model, inputs, **{CACHE: DynamicCache(config=config)})
    turn = second_turn(inputs, plain)
    plain_turn = generate(model, turn, **{CACHE: cache_of(plain)})
    with dare(model, **everything()):
        cache = DareCache()
        first = generate(model, inputs, **{CACHE: cache})
        assert_same_run(first, plain, what="first turn")
        second = generate(model, turn, **{CACHE: cache})
    assert cache_of(second) is cache
    assert_same_run(second, plain_turn, what="second turn")


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_turns_of_a_pruned_chat_prune_the_new_part(name, scorer):
    model, cache = shared_model(name), DareCache()
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, scorer=scorer, **PRUNED):
        first = generate(model, inputs, **{CACHE: cache})
        before = cache.kept_lengths()
        turn = second_turn(inputs, first, text=20)
        second = generate(model, turn, **{CACHE: cache})
        report = last_report(model)
    assert cache.get_seq_length() == second.sequences.shape[1] - 1
    grown = cache.kept_lengths() - before
    everything_new = second.sequences.shape[1] - first.sequences.shape[1]
    assert (grown < everything_new).all(), "the second prompt was not pruned"
    assert cache.kv_bytes() == report.kv_bytes == report.kv_bytes_predicted


def test_an_old_cache_does_not_touch_a_new_run():
    model = shared_model("llava")
    inputs = inputs_of(model)
    with dare(model, **PRUNED):
        first = generate(model, inputs)
        kept = cache_of(first).kept_lengths()
        generate(model, inputs_of(model, (0, 1, 2)))
    assert torch.equal(cache_of(first).kept_lengths(), kept)


def fails_late(hidden, modality, *, layer, hop, positions):
    """Scores two layers, then fails."""
    if layer == 2:
        raise RuntimeError("on purpose")
    return torch.rand(hidden.shape[:2])


register_scorer("test_fails_late", fails_late)


@pytest.mark.parametrize("scorer", ["random", "test_fails_late"])
def test_a_forward_with_gradients_leaves_nothing_behind(scorer):
    """What a recomputation is found by must not be what keeps it alive, also after a failure."""
    model = shared_model("llava")
    inputs = inputs_of(model)
    with dare(model, scorer=scorer, vision_retention=0.5, schedule="constant"):
        controller = model._dare.controller
        with torch.enable_grad(), suppress(RuntimeError):
            model(**copy.deepcopy(inputs))
        gc.collect()
        assert len(controller._recompute) == 0
