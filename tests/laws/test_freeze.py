"""pruned="freeze": tokens that do not run keep their state, their keys and values are seen."""

from __future__ import annotations

import pytest
import torch
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    SCORER,
    assert_close,
    dare,
    forward,
    generate,
    hashed_scores,
    inputs_of,
    rows_of,
    shared_model,
)
from oracle_runs import oracle_model, routing_of
from parity_runs import hold_steps
from router_runs import controller_of, routed, trainee, written_batch

from dare_hf import DareCache, DareConfig, apply_dare, last_report
from dare_hf.cache.ring import RING
from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.testing import (
    collate,
    decoder_layers,
    oracle_forward,
    tiny_model,
    written_inputs,
)
from dare_hf.testing.oracle import masked_layers
from dare_hf.testing.shrink import shrunk_model

MODELS = ("llava", "qwen2_5_vl", "chameleon", "gemma3")
FIELDS = {"vision_retention": 0.4, "text_retention": 0.6, "pruned": "freeze"}


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("more", [{}, {"plan_every": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_compact_execution_is_the_oracle(name, more, attention, rows):
    fields = {"schedule": "constant", **FIELDS, **more}
    model = shared_model(name, attention, torch.float32)
    plain = oracle_model(name, attention, torch.float32)
    inputs = inputs_of(model, BATCHES[rows])
    span, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    with dare(model, **fields):
        logits = forward(model, inputs).logits
        out = generate(model, inputs)
        report = last_report(model)
    routing = routing_of(fields)
    oracle = oracle_forward(plain, inputs, hashed_scores, routing)
    assert any((keep != real).any() for keep in oracle.keep)
    assert_close(logits[real], oracle.logits[real], tolerance=FP32_TOLERANCE, what=name)
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    oracle = oracle_forward(plain, written, hashed_scores, routing, span=span)
    for step, step_logits in enumerate(out.logits):
        theirs = oracle.logits[:, span - 1 + step].to(step_logits.dtype)
        assert_close(step_logits, theirs, tolerance=FP32_TOLERANCE, what=f"{name} step {step}")
    # every real token is stored, and fewer run
    stored = written["attention_mask"].sum(1)
    assert cache_of(out).kept_lengths().tolist() == [stored.tolist()] * len(oracle.keep)
    assert report.kv_bytes == report.kv_bytes_predicted == report.kv_bytes_baseline
    assert report.flops["prefill"] < report.flops_baseline["prefill"]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"mean_update": True}, {"hop_budget": "per_hop"}, {"max_kv_tokens": 9}],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_the_training_forward_is_generate_step_by_step(name, fields, rows):
    with routed(trainee(name), pruned="freeze", **fields) as model:
        if "mean_update" in fields:
            for router in controller_of(model).routers:
                router.mean_update.copy_(torch.randn(router.mean_update.shape) * 0.5)
        batch, out, span = written_batch(model, rows)
        report = last_report(model)
        model.eval()
        taught = model(**batch)
    assert max(cache_of(out).hops) >= 2
    assert report.kv_bytes == report.kv_bytes_predicted < report.kv_bytes_baseline
    hold_steps(out, taught.logits.detach(), span, what=f"{name}, {fields}")


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_attention_scores_are_of_all_keys(name, rows):
    """What ran is read from the plans: a full-size forward of those has the same logits."""
    model = shared_model(name, "sdpa", torch.float32)
    plain = oracle_model(name, "sdpa", torch.float32)
    inputs, plans = inputs_of(model, BATCHES[rows]), []
    fields = {**FIELDS, "recent_tokens": 1, "schedule": "ramp"}
    with dare(model, scorer="attention", **fields):
        for layer in decoder_layers(model):
            inner = layer._dare.inner

            def tapped(*args, _inner=inner, _state=layer._dare, **kwargs):
                run = _state.controller.run
                plans.append((_state.index, run.plans[_state.index].keep))
                if run.frozen is None or run.frozen:
                    scores.append(run.attention_score)
                return _inner(*args, **kwargs)

            layer._dare.inner = tapped
        scores = []
        logits = forward(model, inputs).logits
    real = inputs["attention_mask"].bool()
    kept = {i: real if keep is None else keep for i, keep in plans}
    assert any((kept[i] != real).any() for i in kept)
    with masked_layers(plain, lambda layer, hidden: kept[layer], frozen=True):
        theirs = plain(**inputs, use_cache=False).logits
    assert_close(logits[real], theirs[real], tolerance=FP32_TOLERANCE, what=name)
    assert float(scores[-1][real].min()) > 0  # those that did not run have one too


def test_the_ring_says_where_its_queries_stood():
    model = shared_model("llava", "sdpa", torch.float32)
    inputs = inputs_of(model, (1, 2))
    fields = {**FIELDS, "scorer": "attention", "recent_tokens": 1, "schedule": "ramp"}
    with dare(model, **fields, hop_delimiters=(119,)):
        plans = {}
        for layer in decoder_layers(model):
            inner = layer._dare.inner

            def tapped(*args, _inner=inner, _state=layer._dare, **kwargs):
                plans[_state.index] = _state.controller.run.plans[_state.index]
                return _inner(*args, **kwargs)

            layer._dare.inner = tapped
        cache = DareCache()
        forward(model, inputs, **{CACHE: cache, "use_cache": True})
    rings = [slot.ring for slot in cache.layers]
    frozen = [index for index, plan in plans.items() if plan.keep is not None]
    assert frozen
    for index in frozen:
        for row, keep in enumerate(plans[index].keep):
            stood = rings[index].positions[row]
            assert stood[stood >= 0].tolist() == keep.nonzero()[:, 0].tolist()[-RING:]


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_it_is_alone_and_chunks_store_what_a_prompt_does(name):
    model = shared_model(name, "sdpa", torch.float32)
    rows = rows_of(model, (0, 1, 2))
    with dare(model, **FIELDS, hop_delimiters=tuple(range(10, 60))):
        together = generate(model, collate(model, rows), max_new_tokens=10)
        for k, row in enumerate(rows):
            alone = generate(model, collate(model, [row]), max_new_tokens=10)
            assert torch.equal(alone.sequences[0, -10:], together.sequences[k, -10:])


def test_a_later_turn_is_frozen_over_a_cache():
    model = shared_model("llava", "sdpa", torch.float32)
    inputs = inputs_of(model, (1,))
    with dare(model, **FIELDS):
        cache = DareCache()
        first = generate(model, inputs, max_new_tokens=4, **{CACHE: cache})
        ids = torch.cat([first.sequences, torch.arange(20, 40)[None]], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        generate(model, turn, max_new_tokens=4, **{CACHE: cache})
        report = last_report(model)
    assert len(set(cache.kept_lengths()[:, 0].tolist())) == 1
    assert report.kv_bytes == report.kv_bytes_predicted
    assert report.flops["prefill"] < report.flops_baseline["prefill"]


def test_speculation_is_token_identical():
    model = shared_model("llava", "sdpa", torch.float32)
    inputs = inputs_of(model, (1,))
    for scorer in (SCORER, "attention"):
        fields = {**FIELDS, "scorer": scorer, "hop_delimiters": tuple(range(10, 60))}
        with dare(model, **fields):
            greedy = generate(model, inputs, max_new_tokens=14)
            looked = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
            ours = generate(model, inputs, max_new_tokens=14, **looked)
        assert torch.equal(greedy.sequences, ours.sequences)


def test_checkpointing_has_the_same_gradients_or_is_refused():
    found = []
    for checkpointed in (False, True):
        model = tiny_model("llava")
        inputs = inputs_of(model, (1, 2))
        with routed(model, pruned="freeze") as wrapped:
            wrapped.train()
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": False})
                with pytest.raises(DareInputError, match="freeze"):
                    wrapped(**inputs, use_cache=False)
            wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
            grads = [router.weight.grad.flatten() for router in controller_of(wrapped).routers]
            found.append(torch.cat(grads))
    assert found[0].any()
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_flops_are_those_expected():
    from dare_hf.expected import HopTokens
    from dare_hf.expected.flops import expected_flops
    from dare_hf.expected.subject import Subject

    model = tiny_model("llava")
    inputs = inputs_of(model, (1,))
    config = DareConfig(schedule="constant", scorer="random", recent_tokens=0, **FIELDS)
    apply_dare(model, config)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    report = last_report(model)
    tokens = HopTokens(text=report.tokens["text"][0], vision=report.tokens["vision"][0])
    expected = expected_flops(Subject.of(model, config, None), tokens)
    assert expected.prefill == report.flops["prefill"]


def test_what_cannot_freeze_is_refused():
    freeze = DareConfig(pruned="freeze")
    for kind in ("gemma3n", "deepseek_v3"):
        with pytest.raises(DareConfigError, match=r"pruned: .*freeze"):
            apply_dare(shrunk_model(kind), freeze)
    fields = {"scorer": "last_query", "first_layers_whole": 1, "pruned": "freeze"}
    with pytest.raises(DareConfigError, match=r"pruned: .*last_query"):
        apply_dare(tiny_model("llava"), DareConfig(**fields))
    with pytest.raises(DareConfigError, match="pruned"):
        DareConfig(pruned="freezing")
