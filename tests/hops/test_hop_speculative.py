"""Hops under speculation: token-identical to greedy of the same pruned model, with the same cache.

A delimiter may stand anywhere in a verified step, several may, and a rejected one opens no hop.
"""

import functools
import itertools

import pytest
import torch
from hop_runs import DELIMITER, PRUNED, chatter, held, new_tokens, words_said
from laws import (
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    dare,
    forward,
    inputs_of,
    shared_model,
)

from dare_hf import DareCache
from dare_hf.compat import CACHE, cache_of
from dare_hf.engine.counted_call import CountedCall
from dare_hf.testing import tiny_model


@functools.cache
def assistant(name: str, same: bool):
    """The target's own weights, which are accepted often, or others, which seldom are."""
    return tiny_model(name, seed=0 if same else 1)


SPECULATION = {
    "lookup": lambda name: {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
    "assistant": lambda name: {"assistant_model": assistant(name, True)},
    "stranger": lambda name: {"assistant_model": assistant(name, False)},
}
SCORES = {
    "stored": {"scorer": SCORER},
    "stored_per_hop": {"scorer": SCORER, "hop_budget": "per_hop"},
    "observed": {"scorer": "attention", "text_retention": 0.9},
    "observed_pooled": {"scorer": "attention", "text_retention": 0.9, "hop_budget": "pooled"},
    "key_norm": {"scorer": "key_norm", "hop_score": "stored"},
    "cap": {"scorer": SCORER, "max_kv_tokens": 10},
    "cap_observed": {"scorer": "attention", "max_kv_tokens": 10},
    "window": {"scorer": "random", "decode_window": 3},
}

LOOKED_UP = ("stored", "lookup", "drop")
FAST = {
    ("qwen2_5_vl", "assistant", "observed", "bypass"),
    ("gemma3", "assistant", "cap_observed", "drop"),
}


def cases():
    for name, mode, key, pruned in itertools.product(
        TINY_MODELS, SPECULATION, SCORES, ("bypass", "drop")
    ):
        fast = (name, mode, key, pruned) in FAST or (key, mode, pruned) == LOOKED_UP
        marks = () if fast else pytest.mark.slow
        yield pytest.param(name, mode, key, pruned, marks=marks, id=f"{name}-{mode}-{key}-{pruned}")


@functools.cache
def greedy(name: str, key: str, pruned: str):
    """Inputs, delimiters that occur, the ids of a greedy run and what its cache came to hold."""
    model, fields = shared_model(name), {**PRUNED, **SCORES[key], "pruned": pruned}
    inputs = inputs_of(model)
    delimiters = words_said(model, inputs, **fields)
    with dare(model, **fields, hop_delimiters=delimiters):
        out = chatter(model, inputs)
        return inputs, delimiters, out.sequences.tolist(), settled(model, out)


def settled(model, out):
    """What the cache holds once the next token begins the hops that the last step has closed."""
    cache = cache_of(out)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    forward(model, {"input_ids": out.sequences[:, -1:]}, **{CACHE: cache}, use_cache=True)
    return {
        "hops": cache.hops.tolist(),
        "kept": cache.kept_lengths().tolist(),
        "tokens": [mask.tolist() for mask in held(cache, cache.get_seq_length())],
    }


@pytest.mark.parametrize(("name", "mode", "scores", "pruned"), list(cases()))
def test_speculation_with_hops_is_greedy(name, mode, scores, pruned):
    inputs, delimiters, sequences, state = greedy(name, scores, pruned)
    model, fields = shared_model(name), {**PRUNED, **SCORES[scores], "pruned": pruned}
    with dare(model, **fields, hop_delimiters=delimiters):
        fast = chatter(model, inputs, **SPECULATION[mode](name))
        assert fast.sequences.tolist() == sequences
        assert settled(model, fast) == state
    assert state["hops"][0] >= 4, "hardly a hop closed"


@pytest.mark.parametrize("mode", ["lookup", "assistant"])
def test_hops_do_begin_inside_verified_steps(mode):
    """Else the tests above would hold without anything being masked inside a step."""
    inputs, delimiters, sequences, _ = greedy("gemma3", "observed", "bypass")
    model, steps = shared_model("gemma3"), []
    fields = {**PRUNED, **SCORES["observed"], "hop_delimiters": delimiters}
    with dare(model, **fields):
        cache, before = DareCache(), [len(inputs["input_ids"][0]), 0]

        def look(module, args, kwargs, output):
            steps.append((cache.get_seq_length() - before[0], int(cache.hops[0]) - before[1]))
            before[:] = cache.get_seq_length(), int(cache.hops[0])

        handle = model.register_forward_hook(look, with_kwargs=True)
        try:
            fast = chatter(model, inputs, **{CACHE: cache}, **SPECULATION[mode]("gemma3"))
        finally:
            handle.remove()
    assert fast.sequences.tolist() == sequences
    assert len(steps) < len(sequences[0]) - len(inputs["input_ids"][0]), "nothing was accepted"
    assert any(tokens > 1 and hops > 0 for tokens, hops in steps)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["stored", "observed"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_delimiters_of_several_ids_are_found_across_steps(name, scores):
    """The tail that a sequence is matched against goes back with every rejected candidate."""
    model, fields = shared_model(name), {**PRUNED, **SCORES[scores]}
    inputs = inputs_of(model)
    with dare(model, **fields):
        said = new_tokens(inputs, chatter(model, inputs))[0].tolist()
    pairs = [tuple(said[i : i + 2]) for i in range(len(said) - 1)]
    often = tuple(sorted(set(pairs), key=lambda pair: (-pairs.count(pair), pair))[:3])
    with dare(model, **fields, hop_delimiters=often):
        out = chatter(model, inputs)
        plain = settled(model, out)
        for mode in ("lookup", "assistant"):
            fast = chatter(model, inputs, **SPECULATION[mode](name))
            assert fast.sequences.tolist() == out.sequences.tolist(), mode
            assert settled(model, fast) == plain, mode
    assert plain["hops"][0] >= 3, "hardly a hop closed"


VERIFIED = [1, 50, 1, 70, 1]
"""Tokens of each verified step that are accepted: more than a window behind a delimiter."""
REJECTED = [0, 40, 90, 0, 80]
"""Candidates behind them that are not."""
ENDS = (3, 45, 60)
"""Sampled tokens that close a hop: the first with 47 accepted ones behind it in its step."""


def step_by_step(model, inputs, words, verified, rejected):
    """What the cache holds after sampled `words` that came in verified steps, and their logits."""
    cache, prompt = DareCache(), inputs["input_ids"].shape[1]
    controller, logits = model._dare.controller, []
    mask = inputs["attention_mask"]
    call = CountedCall(prompt_length=prompt, start=0, continues=True)
    with controller.generating(call, cache):
        forward(model, inputs, **{CACHE: cache}, use_cache=True)
        at = 0
        for accepted, wrong in zip(verified, rejected, strict=True):
            new = torch.cat([words[:, at : at + accepted], words[:, :wrong]], dim=1)
            seen = torch.cat([mask, mask.new_ones(len(mask), at + new.shape[1])], dim=1)
            step = {"input_ids": new, "attention_mask": seen}
            out = forward(model, step, **{CACHE: cache}, use_cache=True)
            logits.append(out.logits[:, :accepted])
            at += accepted
            cache.crop(-wrong)
    kept = [mask.tolist() for mask in held(cache, cache.get_seq_length())]
    return torch.cat(logits, dim=1), (cache.hops.tolist(), kept)


def long_steps():
    names, rows = ("llava", "chameleon", "gemma3"), {"alone": (1,), "padded": (0, 1, 2)}
    for name, key, batch in itertools.product(names, ("observed", "cap_observed"), rows):
        fast = (key == "observed") == (batch == "padded")
        marks = () if fast and name != "gemma3" else pytest.mark.slow
        yield pytest.param(name, key, rows[batch], marks=marks, id=f"{name}-{key}-{batch}")


@pytest.mark.parametrize(("name", "fields", "images"), list(long_steps()))
def test_long_verified_steps_are_steps_of_one_token(name, fields, images):
    """Neither accepted tokens behind a delimiter nor rejected ones crowd out its hop's queries."""
    model, inputs = shared_model(name), inputs_of(shared_model(name), images)
    count = sum(VERIFIED)
    generator = torch.Generator().manual_seed(4)
    words = torch.randint(20, 90, (len(images), count), generator=generator)
    words[:, list(ENDS)] = DELIMITER
    with dare(model, **{**PRUNED, **SCORES[fields]}, hop_delimiters=(DELIMITER,)):
        slow, left = step_by_step(model, inputs, words, [1] * count, [0] * count)
        fast, ours = step_by_step(model, inputs, words, VERIFIED, REJECTED)
    assert ours == left
    assert_close(fast, slow, tolerance=10 * FP32_TOLERANCE, what=name)
