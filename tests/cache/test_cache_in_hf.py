"""Without DARE the cache is a DynamicCache: HF's own code gets the same from both."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dare_hf.cache import DareCache
from dare_hf.compat import CACHE

# The same sums in another memory layout: a few units in the last place of logits around 10.
LOGITS_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (2, 9)).repeat(1, 3)
    ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_prefill_chunks_and_steps(model, inputs, attention):
    model.set_attn_implementation(attention)
    ours, theirs = DareCache(config=model.config), DynamicCache(config=model.config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for start, end in [(0, 9), (9, 20), (20, 21), (21, 22)]:
        kwargs = {"attention_mask": mask[:, :end], "input_ids": ids[:, start:end]}
        expected = model(**{CACHE: theirs}, **kwargs).logits
        got = model(**{CACHE: ours}, **kwargs).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=LOGITS_TOLERANCE)
        assert ours.get_seq_length() == theirs.get_seq_length() == end


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_generate(model, inputs, how):
    tokens = []
    for cache in (DynamicCache(config=model.config), DareCache()):
        torch.manual_seed(1)
        kwargs = {**inputs, **how, "max_new_tokens": 12}
        tokens.append(model.generate(**{CACHE: cache}, **kwargs))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant"])
def test_speculative_decoding_crops(model, inputs, how):
    ids = inputs["input_ids"][1:]
    if how == "assistant":
        extra = {"assistant_model": copy.deepcopy(model)}
    else:
        extra = {"prompt_lookup_num_tokens": 4}
    expected = model.generate(ids, max_new_tokens=24)
    cache = DareCache()
    got = model.generate(ids, **{CACHE: cache}, max_new_tokens=24, **extra)
    assert torch.equal(got, expected)
    assert cache.get_seq_length() == ids.shape[1] + 23


def test_a_cache_is_carried_to_the_next_turn(model, inputs):
    ids = inputs["input_ids"][1:]
    cache = DareCache()
    first = model.generate(ids, **{CACHE: cache}, max_new_tokens=5)
    turn = torch.cat([first, ids[:, :4]], dim=1)
    expected = model.generate(turn, max_new_tokens=5)
    assert torch.equal(model.generate(turn, **{CACHE: cache}, max_new_tokens=5), expected)


def test_training_through_the_cache(model, inputs):
    ids = inputs["input_ids"][1:]
    weight = model.model.layers[0].self_attn.k_proj.weight
    grads = []
    with torch.enable_grad():
        for cache in (DynamicCache(config=model.config), DareCache()):
            model.zero_grad()
            model(ids[:, :6], **{CACHE: cache})
            model(ids[:, 6:7], **{CACHE: cache})
            model(ids[:, 7:12], **{CACHE: cache}).logits.sum().backward()
            grads.append(weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_inference_mode_and_no_grad_can_take_turns(model, inputs):
    ids = inputs["input_ids"][1:]
    expected = model(ids).logits[:, -1]
    cache = DareCache()
    modes = [torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode]
    for i, mode in enumerate(modes):
        with mode():
            got = model(ids[:, i * 3 : i * 3 + 3], **{CACHE: cache}).logits
    got = model(ids[:, 12:], **{CACHE: cache}).logits[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=LOGITS_TOLERANCE)
