"""bfloat16 and 4-bit: plain tokens at retention 1.0, below it the masked run of the same model."""

from __future__ import annotations

import pytest
import torch
from hop_runs import held
from laws import assert_close, dare, forward
from places import (
    FULL,
    MODELS,
    PRUNED,
    assert_same_trace,
    place_inputs,
    place_model,
    plain_trace,
    routed_trace,
)
from transformers import AutoModelForImageTextToText

from dare_hf import DareCache
from dare_hf.compat import CACHE, cache_of
from dare_hf.testing import masked_forward
from dare_hf.training.quantized import quantization_config

LAST_PLACES = 0.13
"""Two units in the last place of a bfloat16 logit of 10: other kernels sum in another order."""

MASKED = 0.5
"""The same through four layers, whose sums over the kept tokens are of other lengths."""

QUANTISED = 2e-3
"""4-bit weights times float32 states; on some processors the product itself is of bfloat16."""

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""bitsandbytes quantises blocks of 64."""


def hold_to_the_masked_run(model, inputs, config, tolerance: float, what: str) -> None:
    """The compact forward gives the logits of a full-size one in which pruned tokens are masked."""
    with dare(model, config):
        out = forward(model, inputs, **{CACHE: DareCache()})
    keep = held(cache_of(out), inputs["input_ids"].shape[1])
    assert any(not bool(kept[inputs["attention_mask"].bool()].all()) for kept in keep)
    reference = masked_forward(model, inputs, keep)
    last = (ours[:, -1].float() for ours in (out.logits, reference))
    assert_close(*last, tolerance=tolerance, what=what)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS[2:]]


@pytest.mark.parametrize("name", [*MODELS[:2], *SLOWER])
def test_bfloat16(name):
    model, wide = place_model(name, dtype=torch.bfloat16), place_model(name)
    wide.load_state_dict(model.state_dict())
    inputs, wide_inputs = place_inputs(model), place_inputs(wide)
    plain = plain_trace(model, inputs)
    full = routed_trace(model, inputs, FULL)
    assert_same_trace(full, plain, "retention 1.0", tolerance=LAST_PLACES)
    for case in ("attention", "content"):
        hold_to_the_masked_run(model, inputs, PRUNED[case], MASKED, case)
    found, other = (
        routed_trace(m, i, PRUNED["capped"]) for m, i in ((model, inputs), (wide, wide_inputs))
    )
    # budgets are of counts, so that they are those of the float32 model to the token
    assert found.kept.tolist() == other.kept.tolist()
    assert found.report["flops"] == other.report["flops"]
    assert 2 * found.report["kv_bytes"] == other.report["kv_bytes"]
    assert found.report["kv_bytes"] == found.report["kv_bytes_predicted"]
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)


@pytest.mark.extras
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_4_bit(name, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    place_model(name, **WIDE).save_pretrained(tmp_path)
    config = quantization_config(bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
    model.generation_config = place_model(name).generation_config
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules()) == 4 * 7
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    full = routed_trace(model, inputs, FULL)
    assert_same_trace(full, plain, "retention 1.0", tolerance=QUANTISED)
    for case in ("attention", "content", "key_norm"):
        found = routed_trace(model, inputs, PRUNED[case])
        assert found.report["hops"] == 4
        assert found.report["kv_bytes"] == found.report["kv_bytes_predicted"]
        assert found.report["kv_bytes"] < found.report["kv_bytes_baseline"]
        assert found.sequences.tolist() != plain.sequences.tolist()
        hold_to_the_masked_run(model, inputs, PRUNED[case], QUANTISED, case)
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)
