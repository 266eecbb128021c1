"""Continuous batching and paged caches: refused with the reason; the model runs as before."""

from __future__ import annotations

import pytest
import torch
from laws import SPECIAL_IDS
from places import (
    PRUNED,
    assert_same_trace,
    place_inputs,
    place_model,
    plain_trace,
    routed_trace,
    trace,
)
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from dare_hf import DareConfig, apply_dare, dare_disabled, remove_dare
from dare_hf.errors import DareError, DareInputError, DareStateError

PROMPTS = [[1, 20, 21, 22], [1, 30, 31, 32, 33, 34]]
GREEDY = GenerationConfig(
    max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0, suppress_tokens=SPECIAL_IDS
)
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
REASON = r"(?s)same tokens in every layer.*(remove_dare|set_attn_implementation)"


def ids(prompt=PROMPTS[0]) -> torch.Tensor:
    return torch.tensor([prompt])


CALLS = {
    "generate_batch": lambda model: model.generate_batch(PROMPTS, generation_config=GREEDY),
    "init_continuous_batching": lambda model: model.init_continuous_batching(GREEDY),
    "the context manager": lambda model: model.continuous_batching_context_manager(
        GREEDY
    ).__enter__(),
    "cache_implementation": lambda model: model.generate(
        ids(), generation_config=GREEDY, cache_implementation="paged"
    ),
    "its generation config": lambda model: model.generate(
        ids(),
        generation_config=GenerationConfig(**GREEDY.to_diff_dict(), cache_implementation="paged"),
    ),
    "a forward of its own": lambda model: model(
        ids(), cache=PagedAttentionCache.__new__(PagedAttentionCache), use_cache=False
    ),
}


@pytest.fixture
def model():
    return place_model("llava")


@pytest.mark.parametrize("case", CALLS)
def test_a_paged_cache_is_refused_with_the_reason(model, case):
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    apply_dare(model, PRUNED["attention"])
    expected = trace(model, inputs)
    with pytest.raises(DareError, match=REASON):
        CALLS[case](model)
    assert_same_trace(trace(model, inputs), expected, "after the refusal", tolerance=0.0)
    remove_dare(model)
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)


@pytest.mark.parametrize("case", ["generate_batch", "init_continuous_batching"])
def test_another_thread_is_not_disabled(model, case):
    """Continuous batching runs the model in a thread that dare_disabled does not reach."""
    apply_dare(model, PRUNED["content"])
    with dare_disabled(model), pytest.raises(DareStateError, match=REASON):
        CALLS[case](model)


def answers(model) -> list[list[int]]:
    found = model.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=SMALL, warmup=False
    )
    assert all(answer.error is None for answer in found.values())
    return [answer.generated_tokens for answer in found.values()]


def test_without_dare_it_runs():
    model = place_model("llava")
    before = answers(model)
    alone = [
        model.generate(ids(p), generation_config=GREEDY)[0, len(p) :].tolist() for p in PROMPTS
    ]
    assert before == alone
    apply_dare(model, PRUNED["attention"])
    remove_dare(model)
    assert answers(model) == before


def test_a_manager_made_before_is_refused_too():
    model = place_model("llava")
    manager = model.init_continuous_batching(GREEDY, SMALL)
    apply_dare(model, PRUNED["content"])
    manager.start()
    manager.add_request(PROMPTS[0], max_new_tokens=4)
    answer = manager.get_result(timeout=60)
    manager.stop(block=True, timeout=20)
    assert "same tokens in every layer" in answer.error
    assert not answer.generated_tokens
    inputs = place_inputs(model)
    expected = routed_trace(place_model("llava"), inputs, PRUNED["content"])
    assert_same_trace(trace(model, inputs), expected, "after the refusal", tolerance=0.0)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_paged_attention_is_refused_when_dare_is_put_on(name):
    model = place_model(name, attn_implementation="paged|eager")
    with pytest.raises(DareStateError, match=REASON):
        apply_dare(model, PRUNED["content"])
    model.set_attn_implementation("eager")
    inputs = place_inputs(model)
    eager = place_model(name, attn_implementation="eager")
    expected = routed_trace(eager, inputs, PRUNED["content"])
    assert_same_trace(routed_trace(model, inputs, PRUNED["content"]), expected, name, tolerance=0.0)


CHANGES = [("sdpa", "eager"), ("sdpa", "paged|eager"), ("eager", "sdpa")]


@pytest.mark.parametrize("case", ["attention", "content"])
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_attention_changed_under_dare_is_refused(before, after, case):
    model = place_model("llava", attn_implementation=before)
    inputs = place_inputs(model)
    plain = plain_trace(model, inputs)
    apply_dare(model, PRUNED[case])
    model.set_attn_implementation(after)
    with pytest.raises(DareStateError, match=rf"(?s){before}.*remove_dare"):
        trace(model, inputs)
    remove_dare(model)
    assert model.config._attn_implementation == after  # the user's own setting stays
    model.set_attn_implementation(before)
    assert_same_trace(plain_trace(model, inputs), plain, "after remove_dare", tolerance=0.0)


@pytest.mark.parametrize("scorer", ["attention", "key_norm"])
def test_the_same_attention_set_again_is_no_change(scorer):
    model = place_model("llava")
    inputs = place_inputs(model)
    config = DareConfig(vision_retention=0.4, text_retention=0.7, scorer=scorer)
    expected = routed_trace(model, inputs, config)
    apply_dare(model, config)
    model.set_attn_implementation("sdpa")
    assert_same_trace(trace(model, inputs), expected, "set again", tolerance=0.0)


def test_a_static_cache_has_another_reason():
    model = place_model("llava")
    apply_dare(model, PRUNED["content"])
    with pytest.raises(DareInputError, match=r"cache_implementation.*static.*dare_disabled"):
        model.generate(ids(), generation_config=GREEDY, cache_implementation="static")
