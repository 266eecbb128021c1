"""Hops in one full-length forward: what a step-by-step generate with compaction computes."""

import itertools

import pytest
import torch
from hop_parity_runs import LAYERS, hold_steps, oracle_rules, steps_for, unpatched
from hop_runs import BY_WORD, LONG, PRUNED, closing, held, new_tokens
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    dare,
    forward,
    hashed_scores,
    inputs_of,
    shared_model,
)

from dare_hf import DareCache, register_scorer
from dare_hf.compat import CACHE, cache_of
from dare_hf.testing import (
    HopRules,
    hop_forward,
    masked_forward,
    token_hops,
    written_inputs,
)

"""Where the rows close their hops: two at once, one after another, at the first token."""

ROUTINGS = {
    "bypass": {"pruned": "bypass"},
    "drop": {"pruned": "drop"},
    "bypass_per_hop": {"hop_budget": "per_hop"},
    "drop_per_hop": {"pruned": "drop", "hop_budget": "per_hop"},
    "shared_plans": {"schedule": "two_stage", "plan_every": 2, "pruned": "drop"},
    "cap": {"max_kv_tokens": 9},
    "cap_forced": {"max_kv_tokens": 5, "decode_window": 2, "always_keep_token_ids": (20, 30, 40)},
    "cap_drop": {"max_kv_tokens": 9, "pruned": "drop"},
    "whole_layers_drop": {
        "schedule": ((0.5, 0.6), (1.0, 1.0), (0.4, 0.8), (1.0, 1.0)),
        "pruned": "drop",
        "hop_decay": 1.0,
    },
    "window": {"decode_window": 4, "hop_budget": "per_hop"},
    "no_prefix": {"prefix_tokens": 0, "vision_retention": 0.2, "text_retention": 0.3},
    "always": {"always_keep_token_ids": (20, 30, 40, 50), "text_retention": 0.2},
    "few_rates": {"max_hops": 3},
    "blind": {"hop_aware": False},
}


def marked(name: str, key: str, rows: str, *, fast: bool):
    """One case of a matrix; what is not fast is slow."""
    marks = [] if fast else [pytest.mark.slow]
    return pytest.param(name, key, rows, marks=marks, id=f"{name}-{key}-{rows}")


def even_scores(hidden, modality, **kwargs):
    """The content's score without its last bits: one word twice is a tie in every gemm shape."""
    return (hashed_scores(hidden, modality, **kwargs) * 4096).round() / 4096


EVEN = "test_even"
register_scorer(EVEN, even_scores)


def routing_cases():
    for name, key, rows in itertools.product(TINY_MODELS, ROUTINGS, BATCHES):
        usual = key in ("bypass", "drop") and rows == "padded"
        fast = usual or (name == "llava" and rows == "alone")
        yield marked(name, key, rows, fast=fast)


@pytest.mark.parametrize(("name", "routing", "rows"), list(routing_cases()))
def test_generate_with_hops_is_the_oracle(name, routing, rows):
    """The oracle chooses by slow loops what each hop keeps; it never asks the fast code."""
    model, plain = shared_model(name), unpatched(name)
    inputs = inputs_of(model, BATCHES[rows])
    fields, span = {**BY_WORD, "scorer": EVEN, **ROUTINGS[routing]}, inputs["input_ids"].shape[1]
    with dare(model, **fields):
        out = closing(model, inputs, steps_for(inputs))
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    oracle = hop_forward(plain, written, even_scores, *oracle_rules(fields), span=span)
    hold_steps(out, oracle.logits, span, what=f"{name}, {routing}")
    kept = torch.stack([layer.sum(1) for layer in oracle.held])
    cache = cache_of(out)
    assert cache.kept_lengths().tolist() == kept.tolist()
    for layer, (ours, theirs) in enumerate(
        zip(held(cache, written["input_ids"].shape[1]), oracle.held, strict=True)
    ):
        assert ours.tolist() == theirs.tolist(), f"layer {layer} keeps other tokens"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_hops_of_these_cases_prune(name):
    """Without the hops' compaction the oracle gives other logits, so equality says something."""
    model, plain = shared_model(name), unpatched(name)
    inputs = inputs_of(model, BATCHES["padded"])
    span = inputs["input_ids"].shape[1]
    with dare(model, **BY_WORD):
        out = closing(model, inputs, steps_for(inputs))
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    routing, hops = oracle_rules(BY_WORD)
    free = HopRules(rates=[routing.rates, routing.rates, [(1.0, 1.0)] * LAYERS])
    one, other = (
        hop_forward(plain, written, hashed_scores, routing, rules, span=span)
        for rules in (hops, free)
    )
    assert one.hop.max(dim=1).values.tolist() == [3, 5, 3]
    assert (one.logits - other.logits)[:, -1].abs().amax(dim=-1).min() > 0.1


def test_the_oracles_hops_are_counted_by_hand():
    ids = torch.tensor([[7, 7, 8, 1, 7, 8, 7, 7, 8, 7]])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 0] = False
    assert token_hops(ids, real, 4, [(7, 8)], None).tolist() == [[-1, 0, 0, 0, 1, 1, 2, 2, 2, 3]]
    assert token_hops(ids, real, 4, [(7,)], 2).tolist() == [[-1, 0, 0, 0, 1, 2, 2, 3, 4, 4]]


SCORES = {
    "attention": {"scorer": "attention", "schedule": "two_stage"},
    "attention_stored": {"scorer": "attention", "hop_score": "stored"},
    "observed_pooled": {"scorer": SCORER, "hop_score": "observed"},
    "observed_drop": {"scorer": "attention", "pruned": "drop"},
    "random": {"scorer": "random", "pruned": "drop"},
    "key_norm": {"scorer": "key_norm", "hop_budget": "per_hop"},
    "position": {"scorer": "position", "decode_window": 5},
}


def score_cases():
    for name, key, rows in itertools.product(TINY_MODELS, SCORES, BATCHES):
        fast = rows == "alone" and (name == "qwen2_5_vl" or key == "attention")
        yield marked(name, key, rows, fast=fast)


@pytest.mark.parametrize(("name", "scores", "rows"), list(score_cases()))
def test_whatever_a_hop_keeps_the_logits_are_the_oracles(name, scores, rows):
    """What each step could see is read from the cache, so this holds for scores of any origin."""
    model, plain = shared_model(name), unpatched(name)
    inputs = inputs_of(model, BATCHES[rows])
    span, cache, seen = inputs["input_ids"].shape[1], DareCache(), []
    size = span + LONG - 1
    with dare(model, **{**BY_WORD, **SCORES[scores]}):
        out = closing(
            model,
            inputs,
            steps_for(inputs),
            watch=lambda ids: seen.append(held(cache, size)),
            **{CACHE: cache},
        )
    assert min(cache.hops) >= 2
    real = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, LONG - 1), value=True)
    keep, visible = [], []
    for layer in range(LAYERS):
        executed = seen[0][layer] & real
        executed[:, span:] = True
        rows_seen = [executed[:, None].expand(-1, span, -1)]
        rows_seen += [step[layer][:, None] & real[:, None] for step in seen[1:]]
        keep.append(executed)
        visible.append(torch.cat(rows_seen, dim=1))
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    hold_steps(out, masked_forward(plain, written, keep, visible), span, what=f"{name}, {scores}")


TEACHING = {
    "bypass": {"pruned": "bypass"},
    "drop": {"pruned": "drop"},
    "attention": {"scorer": "attention"},
    "attention_drop": {"scorer": "attention", "pruned": "drop", "hop_budget": "pooled"},
    "attention_stored": {"scorer": "attention", "hop_score": "stored"},
    "two_stage": {"scorer": "key_norm", "schedule": "two_stage", "plan_every": 2},
    "cap": {"max_kv_tokens": 9, "pruned": "drop"},
    "cap_without_hops": {"max_kv_tokens": 9, "hop_delimiters": ()},
    "window": {"scorer": "random", "decode_window": 3, "pruned": "drop"},
}


def teaching_cases():
    for name, key, rows in itertools.product(TINY_MODELS, TEACHING, BATCHES):
        usual = key == "drop" and rows == "padded"
        fast = usual or (name == "qwen2_5_vl" and rows == "alone")
        yield marked(name, key, rows, fast=fast)


@pytest.mark.parametrize(("name", "teaching", "rows"), list(teaching_cases()))
def test_the_teacher_forced_forward_is_generate_step_by_step(name, teaching, rows):
    """Law 4, on sharp weights; the labels alone say where the prompt ends.

    In float64: of two scores 1e-7 apart, other gemm kernels in float32 take the other token.
    """
    model = shared_model(name, dtype=torch.float64)
    inputs = inputs_of(model, BATCHES[rows])
    span = inputs["input_ids"].shape[1]
    with dare(model, **{**BY_WORD, **TEACHING[teaching]}):
        out = closing(model, inputs, steps_for(inputs))
        written = written_inputs(model, inputs, out.sequences)
        del written["position_ids"]  # nobody who trains gives them
        labels = out.sequences.clone()
        labels[:, :span] = -100
        taught = forward(model, written, labels=labels)
    assert new_tokens(inputs, out).shape[1] == LONG
    assert cache_of(taught) is None
    hold_steps(out, taught.logits, span, what=f"{name}, {teaching}")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_prompts_of_other_lengths_are_told_apart_by_their_labels(name):
    """Right-padded rows whose prompts end at other columns, as a training batch has them.

    In float64: of two scores 1e-7 apart, other gemm kernels in float32 take the other token.
    """
    model = shared_model(name, dtype=torch.float64)
    with dare(model, **PRUNED, hop_delimiters=(12,)):
        alone = []
        for images, steps in ((1, [[2, 9]]), (0, [[4, 5, 11]])):
            inputs = inputs_of(model, (images,))
            alone.append((inputs, closing(model, inputs, steps)))
        inputs, out = alone[0]
        spans = [case[0]["input_ids"].shape[1] for case in alone]
        short = alone[1][1].sequences
        width = out.sequences.shape[1]
        gap = width - short.shape[1]
        ids = torch.cat([out.sequences, torch.nn.functional.pad(short, (0, gap))])
        batch = written_inputs(model, inputs, out.sequences)
        del batch["position_ids"]
        for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if key in batch:
                second = written_inputs(model, alone[1][0], short)[key]
                batch[key] = torch.cat([batch[key], torch.nn.functional.pad(second, (0, gap))])
        batch["input_ids"], labels = ids, ids.clone()
        for row, span in enumerate(spans):
            labels[row, :span] = -100
        labels[batch["attention_mask"] == 0] = -100
        logits = forward(model, batch, labels=labels).logits
    for row, (_, run) in enumerate(alone):
        steps = torch.stack(run.logits, dim=1)[0]
        ours = logits[row, spans[row] - 1 :][: len(steps)].to(steps.dtype)
        assert_close(ours, steps, tolerance=FP32_TOLERANCE, what=f"{name}, row {row}")
