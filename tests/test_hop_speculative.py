"""Hops under speculation: token-identical to greedy of the same pruned model, with the same cache.

A delimiter may stand anywhere in a verified step, several may, and a rejected one opens no hop.
"""

import functools
import itertools

import pytest
from hop_runs import PRUNED, chatter, held, new_tokens, words_said
from laws import SCORER, TINY_MODELS, dare, forward, inputs_of, shared_model

from dare_hf import DareCache
from dare_hf.compat import CACHE, cache_of
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
