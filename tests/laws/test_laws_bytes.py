"""Law 6: the bytes of the cache are the bytes that the rates promise."""

import json
import math

import pytest
import torch
from laws import (
    BATCHES,
    NEW_TOKENS,
    TINY_MODELS,
    dare,
    everything,
    forward,
    generate,
    inputs_of,
    shared_model,
)

from dare_hf import DareCache, DareConfig, DareReport, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.routing.retention import build_table
from dare_hf.testing import decoder_layers, modality_of

SLACK, SPARE_TOKENS = 1.25, 64
"""What a cache may hold over its largest row, and tokens a layer on top."""
CONFIGS = {
    "full": everything(),
    "constant": {"vision_retention": 0.4, "text_retention": 0.7},
    "drop": {"vision_retention": 0.4, "text_retention": 0.7, "pruned": "drop"},
    "equal": {"vision_retention": 0.3, "batch_budget": "equal"},
    "two_stage": {"schedule": "two_stage", "plan_every": 2},
    "safe": {"schedule": "safe", "text_retention": 1.0, "scorer": "attention"},
    "attention": {"schedule": "two_stage", "scorer": "attention"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def token_bytes(model) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    attention = decoder_layers(model)[0].self_attn
    heads = model.config.get_text_config().num_key_value_heads
    return 2 * heads * attention.head_dim * torch.finfo(model.dtype).bits // 8


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_measured_bytes_are_predicted_bytes(name, config, rows):
    model = shared_model(name)
    inputs = inputs_of(model, BATCHES[rows])
    with dare(model, **CONFIGS[config]):
        cache = cache_of(generate(model, inputs))
        report = last_report(model)
    hold_bytes(model, cache, report)
    real = int(inputs["attention_mask"].sum()) + (NEW_TOKENS - 1) * len(inputs["input_ids"])
    layers = len(decoder_layers(model))
    assert report.kv_bytes_baseline == real * layers * token_bytes(model)
    if config == "full":
        assert report.kv_bytes == report.kv_bytes_baseline
    else:
        assert report.kv_bytes < report.kv_bytes_baseline


def hold_bytes(model, cache, report):
    """Hold every way to count a cache's bytes to the tokens it says it keeps."""
    kept, one = cache.kept_lengths(), token_bytes(model)
    assert cache.kv_bytes() == int(kept.sum()) * one
    assert report.kv_bytes == cache.kv_bytes()
    assert report.kv_bytes_predicted == report.kv_bytes
    limit = sum(SLACK * int(layer.max()) * len(layer) * one + SPARE_TOKENS * one for layer in kept)
    assert cache.allocated_bytes() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_follow_the_dtype(dtype):
    model = shared_model("llava", dtype=DTYPES[dtype])
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model):
        cache = cache_of(generate(model, inputs))
        hold_bytes(model, cache, last_report(model))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_prompt_keeps_exactly_its_budgets(name):
    """Forced tokens are two and one of each row, under every budget here."""
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2), text=20)
    modality = modality_of(model, inputs)
    rates = {"vision_retention": 0.35, "text_retention": 0.6}
    table = build_table(4, schedule="two_stage", **rates)
    with dare(model, schedule="two_stage", **rates):
        out = forward(model, inputs, use_cache=True)
    kept = cache_of(out).kept_lengths()
    for layer in range(4):
        for row in range(3):
            wanted = 0
            for kind in (0, 1):
                count = int((modality[row] == kind).sum())
                k = math.ceil(table.rate(0, layer, kind) * count - 1e-4)
                wanted += max(k, min(1, count))
            assert kept[layer, row] == wanted


def test_beams_count_as_rows():
    model = shared_model("llava")
    inputs = inputs_of(model)
    with dare(model):
        cache = cache_of(generate(model, inputs, num_beams=3))
        report = last_report(model)
    hold_bytes(model, cache, report)
    assert cache.kept_lengths().shape[1] == 3


@pytest.mark.parametrize("name", TINY_MODELS)
def test_rejected_candidates_are_in_no_baseline(name):
    """The unpruned cache of a speculated run holds what was written, not what was tried."""
    model = shared_model(name)
    inputs = inputs_of(model)
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    words = list(range(10, 16))
    others = [i for i in range(model.config.get_text_config().vocab_size) if i not in words]
    with dare(model):
        out = generate(model, inputs, max_new_tokens=20, suppress_tokens=others, **lookup)
        cache, report = cache_of(out), last_report(model)
        hold_bytes(model, cache, report)
    whole = cache.get_seq_length() * len(decoder_layers(model)) * token_bytes(model)
    assert report.kv_bytes_baseline == whole


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_report_is_plain_numbers_and_lives_on_the_cache(name):
    model = shared_model(name)
    with dare(model, DareConfig.preset("safe")):
        cache = cache_of(generate(model, inputs_of(model, (0, 1, 2))))
        report = last_report(model)
    assert isinstance(report, DareReport)
    assert cache.report.to_dict() == report.to_dict()
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert set(report.flops) == set(report.flops_baseline) == {"prefill", "decode"}
    assert 0 < report.flops["prefill"] < report.flops_baseline["prefill"]
    assert 0 < report.flops["decode"] < report.flops_baseline["decode"]
    assert str(report)
    assert report.seconds > 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_at_retention_one_the_layers_cost_what_they_cost(name):
    model = shared_model(name)
    with dare(model, **everything(scorer="position")):
        generate(model, inputs_of(model, (0, 1, 2)))
        report = last_report(model)
    assert report.flops == report.flops_baseline
    for layer in report.retention[0]:
        assert set(layer.values()) == {1.0}


def test_a_report_says_what_was_kept():
    model = shared_model("llava")
    inputs = inputs_of(model, (1, 1))
    with dare(model, vision_retention=0.4, text_retention=0.7):
        generate(model, inputs)
        report = last_report(model)
    for layer in report.retention[0]:
        assert layer["vision"] == pytest.approx(4 / 9)  # ceil(0.4 * 9) of 9
        assert layer["text"] == pytest.approx(10 / 13)  # ceil(0.7 * 13) of 13
    assert report.tokens["vision"][0] == 18
    assert report.tokens["text"][0] == 26


def test_a_cache_of_the_users_own_is_used_and_measured():
    model, cache = shared_model("gemma3"), DareCache()
    with dare(model):
        out = generate(model, inputs_of(model), **{CACHE: cache})
        hold_bytes(model, cache, last_report(model))
    assert cache_of(out) is cache
