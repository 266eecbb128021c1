"""A user's forward hook that raises: the same forward can be repeated, or is refused."""

import copy

import pytest
import torch
from faults import hold_same, state_of
from hop_runs import BY_WORD, DELIMITER
from laws import dare, forward, inputs_of, shared_model

from dare_hf import DareCache
from dare_hf.architectures.locate import attention_of, locate
from dare_hf.compat import CACHE
from dare_hf.errors import DareInputError

WORDS = [21, DELIMITER, 23, DELIMITER]


def raising(module):
    """Let a module's next forward raise when it is over."""

    def fail(*args):
        handle.remove()
        raise RuntimeError("on purpose")

    handle = module.register_forward_hook(fail)


def steps_of(model):
    """A prompt and single tokens, the last of which begins a hop: arguments of each forward."""
    inputs = inputs_of(model, (0, 1))
    steps, mask = [inputs], inputs["attention_mask"]
    for word in [*WORDS, 25]:
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        steps.append({"input_ids": torch.full((2, 1), word), "attention_mask": mask})
    return steps


@pytest.mark.parametrize("at", [0, 1, len(WORDS) + 1], ids=["prompt", "token", "hop"])
@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_forward_whose_hook_raised_can_be_repeated(name, at):
    """Of a part of the model: the cache is as before. Of the model itself: it is refused."""
    model = shared_model(name)
    anatomy = locate(model)
    last = anatomy.layers[-1]
    with dare(model, **BY_WORD):
        steps, cache = steps_of(model), DareCache()
        for step in steps[:at]:
            forward(model, step, **{CACHE: cache}, use_cache=True)
        plain = copy.deepcopy(cache)
        logits = forward(model, steps[at], **{CACHE: plain}, use_cache=True).logits
        expected = logits, state_of(plain)
        for module in (anatomy.layers[0], attention_of(last), last, anatomy.text_model, model):
            one = copy.deepcopy(cache)
            raising(module)
            with pytest.raises(RuntimeError, match="on purpose"):
                forward(model, steps[at], **{CACHE: one}, use_cache=True)
            if module is model:
                length = steps[at]["input_ids"].shape[1]
                with pytest.raises(DareInputError, match="attention_mask: expected"):
                    forward(model, steps[at], **{CACHE: one}, use_cache=True)
                one.crop(-length)
            again = forward(model, steps[at], **{CACHE: one}, use_cache=True).logits
            found = again, state_of(one)
            for state in (found[1], expected[1]):  # copies count anew
                state.pop("report", None)
            hold_same(found, expected, f"{name}, {type(module).__name__}")
