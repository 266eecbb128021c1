"""Packed sequences are refused by name; what only looks like them is not."""

import copy

import pytest
import torch
from laws import SCORER, dare, forward, generate, inputs_of, shared_model
from peft_runs import adapted
from transformers import DataCollatorWithFlattening

from dare_hf import DareConfig, dare_disabled
from dare_hf.errors import DareInputError
from dare_hf.testing import tiny_model

NAMES = ("llava", "gemma3", "qwen2_5_vl")
CONFIG = DareConfig(scorer=SCORER, schedule="constant", vision_retention=0.4, text_retention=0.6)


def flattened(**options):
    rows = [{"input_ids": list(range(20, 20 + n)), "labels": [20] * n} for n in (9, 7, 5)]
    return DataCollatorWithFlattening(return_tensors="pt", **options)(rows)


def batches():
    packed = flattened()
    ids, positions = packed["input_ids"], packed["position_ids"]
    assert positions.tolist() == [[*range(9), *range(7), *range(5)]]
    yield {"input_ids": ids, "position_ids": positions}
    yield packed
    yield flattened(return_flash_attn_kwargs=True) | {"position_ids": None}
    yield {"input_ids": ids, "seq_idx": torch.zeros_like(ids)}
    yield {"input_ids": ids, "position_ids": positions[None].expand(3, -1, -1)}
    mask = torch.ones_like(ids)
    yield {"input_ids": ids, "position_ids": positions + 4, "attention_mask": mask}
    two = torch.cat([torch.arange(21)[None], positions])
    yield {"input_ids": ids.repeat(2, 1), "position_ids": two}
    # left padding, then two documents
    padded = torch.tensor([[1, 1, 1, *range(9), *range(9)]])
    mask = torch.tensor([[0] * 3 + [1] * 18])
    yield {"input_ids": ids, "position_ids": padded, "attention_mask": mask}


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_refused(name):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1))
    with dare(model, CONFIG):
        pruned = generate(model, inputs).sequences
        for batch in batches():
            batch = {key: value for key, value in batch.items() if value is not None}
            with pytest.raises(DareInputError, match="packed sequences"):
                forward(model, batch, use_cache=False)
        with pytest.raises(DareInputError, match="packed sequences"):
            generate(model, next(batches()))
        with dare_disabled(model):
            packed = next(batches())
            if name == "qwen2_5_vl":
                packed["position_ids"] = packed["position_ids"][None].expand(3, -1, -1)
            forward(model, packed, use_cache=False)
        assert generate(model, inputs).sequences.equal(pruned)


@pytest.mark.parametrize("name", NAMES[:2])
def test_packed_sequences_are_refused_in_training(name):
    model = adapted(tiny_model(name)).train()
    with pytest.raises(DareInputError, match="packed sequences"):
        model(**flattened())


def positions_of(model, inputs):
    """Return what the model's own generate gives: pads, images along three axes."""
    prepared = {}

    def keep(module, args, kwargs):
        prepared.setdefault("position_ids", kwargs.get("position_ids"))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    generate(model, inputs, max_new_tokens=1)
    handle.remove()
    return prepared["position_ids"]


@pytest.mark.parametrize("name", [*NAMES, "chameleon"])
@pytest.mark.parametrize("images", [(1,), (0, 1, 2)])
def test_positions_of_one_sequence_are_none(name, images):
    model = shared_model(name)
    inputs = inputs_of(model, images)
    positions = positions_of(model, inputs)
    assert positions is not None
    with dare(model, CONFIG):
        found = forward(model, {**copy.deepcopy(inputs), "position_ids": positions})
        assert found.logits.isfinite().all()
        shifted = positions + 7
        forward(model, {**copy.deepcopy(inputs), "position_ids": shifted})
        generate(model, inputs)
