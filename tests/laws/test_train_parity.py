"""Law 4: the training forward has the logits of step-by-step generate fed the same tokens."""

import itertools

import pytest
import torch
from hop_runs import BY_WORD, LONG, closing, injected_columns, new_tokens
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    dare,
    forward,
    inputs_of,
    rows_of,
    shared_model,
)
from loop_runs import DELIMITERS, Featured, assert_steps_are, looped, recomputed
from parity_runs import hold_steps
from router_runs import STEPS, controller_of, routed, trainee, written_batch

from dare_hf import last_report
from dare_hf.compat import cache_of
from dare_hf.config.dare_config import PRESETS
from dare_hf.testing import collate, token_hops, written_inputs

ROUTINGS = {
    "bypass": {},
    "drop": {"pruned": "drop"},
    "per_hop": {"hop_budget": "per_hop"},
    "drop_per_hop": {"hop_budget": "per_hop", "pruned": "drop"},
    "cap": {"max_kv_tokens": 9},
    "cap_drop": {"max_kv_tokens": 9, "pruned": "drop"},
    "window": {"decode_window": 3},
    "no_prefix": {"prefix_tokens": 0},
    "always": {"always_keep_token_ids": (20, 30, 40, 50)},
    "grid": {"uniform_share": 0.5, "pruned": "drop"},
    "shared_plans": {"plan_every": 2, "pruned": "drop"},
    "recent": {"recent_tokens": 3},
    "recent_drop": {"recent_tokens": 3, "recent_share": 0.6, "pruned": "drop"},
    "whole": {"first_layers_whole": 1, "plan_every": 2},
    "ramp": {"schedule": "ramp", "vision_retention": 0.5, "text_retention": 0.6},
    "static": {"schedule": "two_stage", "vision_retention": 0.5, "text_retention": 0.6},
    "blind": {"hop_aware": False},
    "gumbel": {"selector": "gumbel"},
    "raw_input": {"normalize_input": False},
    "literal": PRESETS["literal"],
    "multiply": {"score_scaling": "multiply"},
    "multiply_drop": {"score_scaling": "multiply", "pruned": "drop"},
}


def marked(*values, fast: bool):
    marks = [] if fast else [pytest.mark.slow]
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def parity_cases():
    for name, key, rows in itertools.product(TINY_MODELS, ROUTINGS, BATCHES):
        usual = key in ("bypass", "drop") and rows == "padded"
        yield marked(name, key, rows, fast=usual or (name == "llava" and rows == "padded"))


@pytest.mark.parametrize(("name", "routing", "rows"), list(parity_cases()))
def test_the_training_forward_is_generate_step_by_step(name, routing, rows):
    with routed(trainee(name), **ROUTINGS[routing]) as model:
        batch, out, span = written_batch(model, rows)
        taught = model(**batch)
    assert min(cache_of(out).hops) >= 2
    assert cache_of(taught) is None
    assert taught.loss.requires_grad
    hold_steps(out, taught.logits.detach(), span, what=f"{name}, {routing}")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_these_cases_prune(name):
    """The plain model has other logits, and so has one whose hops are not counted."""
    with routed(trainee(name)) as model:
        batch, _, span = written_batch(model)
        taught = forward(model, batch).logits
        one_hop = torch.ones_like(batch["labels"])
        one_hop[:, :span] = 0
        uncounted = forward(model, batch, hop_ids=one_hop).logits
        with model.disable_adapter():
            plain = forward(model, batch).logits
    last = slice(span + LONG // 2, None)
    for other in (uncounted, plain):
        assert (taught - other)[:, last].abs().amax(dim=(1, 2)).min() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_given_hop_ids_are_the_derived_ones(attention):
    with routed(trainee("llava", attention)) as model:
        batch, _, span = written_batch(model)
        real = batch["attention_mask"].bool()
        hops = token_hops(batch["input_ids"], real, span, [(12,)], None)
        derived = forward(model, batch).logits
        given = forward(model, batch, hop_ids=hops).logits
        del batch["labels"]
        unlabelled = forward(model, batch, hop_ids=hops)
    assert torch.equal(derived, given)
    assert torch.equal(derived, unlabelled.logits)
    assert cache_of(unlabelled) is None


INJECTED = {
    "bypass": {},
    "drop": {"pruned": "drop"},
    "freeze": {"pruned": "freeze"},
    "skip": {"decode": "routed"},
}


def injected_cases():
    for name, pruned, rows in itertools.product(TINY_MODELS, INJECTED, BATCHES):
        usual = pruned == "bypass" or (pruned != "drop" and name == "llava")
        yield marked(name, pruned, rows, fast=rows == "padded" and usual)


@pytest.mark.parametrize(("name", "pruned", "rows"), list(injected_cases()))
def test_injected_spans_are_routed_as_generate_routes_them(name, pruned, rows):
    """Words and images that a HopLoop injects; rows that get nothing have pads there."""
    model = trainee(name)
    parts = rows_of(model, BATCHES[rows], text=[9, 14, 7][: len(BATCHES[rows])])
    inputs, featured = collate(model, parts), Featured(model)
    prompt = inputs["input_ids"].shape[1]
    # one row alone writes a rarer id too seldom
    ends = DELIMITERS if rows == "padded" else tuple(range(10, 80))
    with routed(model, hop_delimiters=ends, max_hops=6, **INJECTED[pruned]) as wrapped:
        if pruned == "skip":
            # at 0.45 chameleon writes a word twice; in layer 0 both have one score but for
            # rounding, which then says which of them a later hop keeps
            for router in controller_of(wrapped).routers:
                router.thresholds.fill_(0.4)
        out = looped(model, inputs, featured, max_new_tokens=20)
        skipped = last_report(wrapped).skipped_layers
        ids = out.sequences[:, :-1]
        labels = torch.full_like(ids, -100)
        injected = injected_columns(cache_of(out))
        inside = {column for start, end in injected for column in range(start, end)}
        sampled = [c for c in range(prompt, ids.shape[1]) if c not in inside]
        labels[:, sampled] = ids[:, sampled]
        with torch.no_grad():
            full = recomputed(model, parts, inputs, out, featured, labels=labels)
        record = controller_of(wrapped).record
    assert featured.rows
    assert injected
    assert record.seen.shape[1] >= 4
    assert bool(sum(skipped)) == (pruned == "skip")
    assert_steps_are(full, out, prompt, f"{name}, {pruned}")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_row_does_not_depend_on_its_batch(name):
    with routed(trainee(name)) as model:
        inner = model.get_base_model()
        inputs = inputs_of(inner, (1,))
        span = inputs["input_ids"].shape[1]
        out = closing(inner, inputs, STEPS[1])
        alone = written_inputs(inner, inputs, out.sequences)
        del alone["position_ids"]
        labels = out.sequences.clone()
        labels[:, :span] = -100
        logits = forward(model, alone, labels=labels).logits
        padded = dict(alone)
        for key, value in (("input_ids", 0), ("attention_mask", 0), ("mm_token_type_ids", 0)):
            if key in padded:
                padded[key] = torch.nn.functional.pad(padded[key], (5, 3), value=value)
        if "token_type_ids" in padded:
            padded["token_type_ids"] = torch.nn.functional.pad(padded["token_type_ids"], (5, 3))
        wide = torch.nn.functional.pad(labels, (5, 3), value=-100)
        others = forward(model, padded, labels=wide).logits[:, 5:-3]
    assert_close(logits, others, tolerance=FP32_TOLERANCE, what=name)


UNTRAINED = {
    "content": {"scorer": SCORER},
    "drop": {"scorer": SCORER, "pruned": "drop"},
    "random": {"scorer": "random", "pruned": "drop"},
    "key_norm": {"scorer": "key_norm", "hop_budget": "per_hop"},
    "position": {"scorer": "position", "decode_window": 5},
    "cap": {"max_kv_tokens": 9, "pruned": "drop"},
    "shared_plans": {"scorer": "key_norm", "schedule": "two_stage", "plan_every": 2},
    "grid": {"uniform_share": 0.5},
}


def untrained_cases():
    for name, key in itertools.product(TINY_MODELS, UNTRAINED):
        yield marked(name, key, fast=name == "qwen2_5_vl" or key == "content")


@pytest.mark.parametrize(("name", "key"), list(untrained_cases()))
def test_the_compact_path_and_the_simulation_agree(name, key):
    """Labels alone run the compact path of a model without routers, hop ids the simulation.

    In float64: of two scores 1e-7 apart, other gemm kernels in float32 take the other token.
    """
    model = shared_model(name, dtype=torch.float64)
    inputs = inputs_of(model, BATCHES["padded"])
    span = inputs["input_ids"].shape[1]
    with dare(model, **{**BY_WORD, **UNTRAINED[key]}):
        out = closing(model, inputs, STEPS[3])
        written = written_inputs(model, inputs, out.sequences)
        del written["position_ids"]
        labels = out.sequences.clone()
        labels[:, :span] = -100
        compact = forward(model, written, labels=labels).logits
        real = written["attention_mask"].bool()
        window = UNTRAINED[key].get("decode_window")
        hops = token_hops(out.sequences, real, span, [(12,)], window)
        simulated = forward(model, written, labels=labels, hop_ids=hops).logits
    assert new_tokens(inputs, out).shape[1] == LONG
    hold_steps(out, simulated, span, what=f"{name}, {key}")
    real = written["attention_mask"].bool()[..., None]
    assert_close(compact * real, simulated * real, tolerance=FP32_TOLERANCE, what=name)
