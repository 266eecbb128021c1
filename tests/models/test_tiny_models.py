"""The tiny models are deterministic and sharp, or every law over them would hold by degeneracy."""

import copy

import pytest
import torch

from dare_hf.testing import TINY_MODELS, collate, tiny_inputs, tiny_model, tiny_rows

NEW_TOKENS = 16
FEWEST_DISTINCT = 5
"""Of 16 greedy tokens; a degenerate model prints one or two."""


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_tiny_model_prints_varied_tokens_and_rows_do_not_touch(name, pixels):
    model = tiny_model(name)
    rows = tiny_rows(model, images=(0, 1, 2), pixels=pixels)
    batch = model.generate(**collate(model, rows), max_new_tokens=NEW_TOKENS, do_sample=False)
    for index, row in enumerate(rows):
        inputs = collate(model, [row])
        alone = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert alone[0, -NEW_TOKENS:].tolist() == batch[index, -NEW_TOKENS:].tolist()
        assert len(set(alone[0, -NEW_TOKENS:].tolist())) >= FEWEST_DISTINCT


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_tiny_model_is_the_same_each_time(name):
    first, second = (tiny_model(name) for _ in range(2))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    inputs = [tiny_inputs(model, images=(2,), pixels=True) for model in (first, second)]
    assert torch.equal(first(**inputs[0]).logits, second(**copy.deepcopy(inputs[1])).logits)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="llava"):
        tiny_model("no_such_model")
