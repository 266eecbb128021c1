"""What a layer of a pruned prefill adds to the model's own operations: they are counted."""

import pytest
import torch
from laws import dare

from dare_hf.benchmark.operations import Operations
from dare_hf.benchmark.random_llava import Setting, build_inputs, build_model
from dare_hf.compat import CACHE

RATES = {"vision_retention": 0.4, "text_retention": 0.7, "schedule": "constant"}


def operations(layers: int, fields: dict | None) -> int:
    """Operations of a prefill, views left out."""
    setting = Setting(tokens=160, layers=layers, hidden=64, intermediate=64, vocab=100)
    model = build_model(setting)
    inputs = build_inputs(setting) | {"logits_to_keep": 1}
    with torch.inference_mode():
        if fields is None:
            with Operations() as found:
                model(**inputs)
            return found.count
        with dare(model, **RATES, **fields), Operations() as found:
            out = model(**inputs)
        assert max(map(max, out[CACHE].kept_lengths().tolist())) < setting.tokens, "nothing went"
        return found.count


def of_a_layer(fields: dict | None) -> int:
    """Operations that the seventh layer adds to six."""
    return operations(7, fields) - operations(6, fields)


@pytest.mark.parametrize(
    ("scorer", "most"), [("random", 55), ("attention", 100)], ids=["random", "attention"]
)
def test_a_layer_adds_few_operations_to_a_prefill(scorer, most):
    assert of_a_layer({"scorer": scorer}) - of_a_layer(None) <= most
