"""Freeze, routed decode and mean updates in the ways people call generate."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from laws import dare, generate, inputs_of, rows_of, shared_model
from router_runs import controller_of, routed
from skipping_runs import skipping, thresholds_for

from dare_hf import last_report
from dare_hf.compat import cache_of
from dare_hf.testing import collate, tiny_model

NAMES = ("llava", "qwen2_5_vl")
FREEZE = {"vision_retention": 0.4, "text_retention": 0.6, "pruned": "freeze"}


@contextmanager
def freezing(name: str):
    model = shared_model(name, "sdpa", torch.float32)
    with dare(model, **FREEZE):
        yield model


WAYS = {"freeze": freezing, "skip": skipping}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_without_a_cache_the_tokens_are_the_same(way, name):
    with WAYS[way](name) as model:
        inputs = inputs_of(getattr(model, "base_model", model), (1, 2))
        with_cache = generate(model, inputs, max_new_tokens=8)
        without = generate(model, inputs, max_new_tokens=8, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_beams_of_a_row_are_those_it_has_alone(way, name):
    with WAYS[way](name) as model:
        base = getattr(model, "get_base_model", lambda: model)()
        rows = rows_of(base, (0, 1, 2))
        together = generate(model, collate(base, rows), max_new_tokens=8, num_beams=3)
        for k, row in enumerate(rows):
            alone = generate(model, collate(base, [row]), max_new_tokens=8, num_beams=3)
            assert torch.equal(alone.sequences[0, -8:], together.sequences[k, -8:])


@pytest.mark.parametrize("way", WAYS)
def test_a_second_sequence_inside_generate_is_its_own(way):
    """Guidance of nearly 1 runs the negative prompt beside, and changes nothing."""
    negative = torch.full((1, 4), 30)
    guided = {
        "guidance_scale": 1.0001,
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": torch.ones_like(negative),
    }
    with WAYS[way]("llava") as model:
        inputs = inputs_of(getattr(model, "base_model", model), (1,))
        alone, report = generate(model, inputs, max_new_tokens=8), last_report(model)
        beside = generate(model, inputs, max_new_tokens=8, **guided)
        guided_report = last_report(model)
    assert torch.equal(alone.sequences, beside.sequences)
    assert guided_report.kv_bytes == report.kv_bytes
    assert guided_report.skipped_layers == report.skipped_layers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype, name):
    """Rows alone have the tokens they have together, with all three at once where they go."""
    model = tiny_model(name, dtype=dtype)
    rows = rows_of(model, (0, 2))
    for fields in ({"pruned": "freeze"}, {"decode": "routed"}):
        with routed(model, mean_update=True, **fields) as wrapped:
            routers = controller_of(wrapped).routers
            generator = torch.Generator().manual_seed(0)
            for router in routers:
                drawn = torch.randn(router.mean_update.shape, generator=generator)
                router.mean_update.copy_(0.3 * drawn)
            if "decode" in fields:
                thresholds_for(routers)
            logits = wrapped(**collate(model, rows), use_cache=False).logits
            assert logits.dtype == dtype
            assert logits.isfinite().all()
            out = generate(wrapped, collate(model, rows), max_new_tokens=6)
            if dtype == torch.float64:
                for k, row in enumerate(rows):
                    alone = generate(wrapped, collate(model, [row]), max_new_tokens=6)
                    assert torch.equal(alone.sequences[0, -6:], out.sequences[k, -6:])


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_a_prompt_store_all_of_it(name):
    with freezing(name) as model:
        inputs = inputs_of(model, (1,))
        out = generate(model, inputs, max_new_tokens=4, prefill_chunk_size=8)
        report = last_report(model)
    stored = int(inputs["attention_mask"].sum()) + 3
    assert cache_of(out).kept_lengths().unique().tolist() == [stored]
    assert report.kv_bytes == report.kv_bytes_predicted
