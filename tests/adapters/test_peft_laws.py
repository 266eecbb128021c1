"""Laws 3 and 8 with a router adapter: ragged rows, several images, several hops, run twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws import FP32_TOLERANCE, SPECIAL_IDS, rows_of
from peft import get_peft_model

from dare_hf import DareConfig, last_report
from dare_hf.compat import cache_of
from dare_hf.testing import TINY_MODELS, collate, tiny_model

SETTINGS = {
    "max_new_tokens": 10,
    "do_sample": False,
    "suppress_tokens": SPECIAL_IDS,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_row_depends_on_neither_its_batch_nor_an_earlier_run(name):
    config = DareConfig(
        scorer="router",
        schedule="learned",
        vision_retention=0.4,
        text_retention=0.6,
        hop_delimiters=tuple(range(10, 60)),
    )
    model: Any = get_peft_model(tiny_model(name), config)
    for router in model._dare.controller.routers:
        router.weight.data.mul_(30)  # sharp scores
    rows = rows_of(model, (0, 1, 2))
    batch = collate(model, rows)
    first = model.generate(**copy.deepcopy(batch), **SETTINGS)
    report = last_report(model)
    second = model.generate(**copy.deepcopy(batch), **SETTINGS)
    assert torch.equal(first.sequences, second.sequences)
    assert report.kv_bytes == report.kv_bytes_predicted < report.kv_bytes_baseline
    assert max(cache_of(first).hops.tolist()) > 3
    for k, row in enumerate(rows):
        alone = model.generate(**collate(model, [row]), **SETTINGS)
        new = alone.sequences[0, -10:]
        assert torch.equal(new, first.sequences[k, -10:])
        steps = zip(alone.logits, first.logits, strict=True)
        assert max(float((a[0] - b[k]).abs().max()) for a, b in steps) < FP32_TOLERANCE
