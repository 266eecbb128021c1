"""FLOPs and bytes: the formulas against torch's counter and against measured tensors."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE
from dare_hf.report.flops import (
    LayerShape,
    attention_scorer_flops,
    forward_flops,
    head_flops,
    key_norm_scorer_flops,
    kv_bytes,
    layer_flops,
    linear_macs_per_token,
    router_flops,
    shapes_of,
    unpruned_flops,
    unpruned_generate_flops,
    unpruned_kv_bytes,
)
from dare_hf.testing import TINY_MODELS, tiny_inputs, tiny_model

ROWS, PROMPT = 2, 21


def _llava() -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,  # not hidden / heads
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=96)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def _counted(model: nn.Module, **inputs: object) -> int:
    """FLOPs torch counts in one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_llava_prefill_and_decode_equal_torchs_count() -> None:
    model = _llava()
    config = model.config.text_config
    shapes = shapes_of(model.model.language_model.layers, config)
    ids = torch.randint(0, 96, (ROWS, PROMPT))
    cache = DynamicCache(config=config)
    counted = _counted(model, input_ids=ids, **{CACHE: cache})
    head = head_flops(config.hidden_size, config.vocab_size, ROWS * PROMPT)
    assert unpruned_flops(shapes, [PROMPT] * ROWS, [PROMPT] * ROWS) + head == counted

    step = {"input_ids": ids[:, :1], CACHE: cache}
    counted = _counted(model, **step)
    head = head_flops(config.hidden_size, config.vocab_size, ROWS)
    keys = [[PROMPT + 1] * ROWS] * len(shapes)
    assert forward_flops(shapes, [[1] * ROWS] * len(shapes), keys) + head == counted
    assert unpruned_flops(shapes, [1] * ROWS, [PROMPT + 1] * ROWS) + head == counted


def test_sliding_window_equals_torchs_count_and_the_caches_bytes() -> None:
    window = 8
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    shapes = shapes_of(model.model.layers, config)
    assert [shape.window for shape in shapes] == [window, None]
    ids, cache, seen = torch.randint(0, 96, (1, PROMPT)), DynamicCache(config=config), 0
    for q in (PROMPT, 1, 1):
        step = {"input_ids": ids[:, :q], CACHE: cache}
        counted = _counted(model, **step)
        seen += q
        head = head_flops(config.hidden_size, config.vocab_size, q)
        assert unpruned_flops(shapes, [q], [seen]) + head == counted
    stored = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert unpruned_kv_bytes(shapes, [seen], 4) == stored


def test_experts_count_as_many_as_a_token_passes() -> None:
    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=5,
        num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1,
    )  # fmt: skip
    layer = Qwen3MoeForCausalLM(config).model.layers[0]
    attention = 32 * (4 * 8) * 2 + 32 * (2 * 8) * 2
    assert linear_macs_per_token(layer) == attention + 32 * 5 + 2 * 3 * 32 * 24


def test_listed_experts_and_wrapped_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(5))
            self.top_k = 3

    assert linear_macs_per_token(Block()) == 3 * 24
    wrapper = nn.Linear(6, 4)
    wrapper.base_layer, wrapper.lora_A, wrapper.lora_B = (
        nn.Linear(6, 4), nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False),
    )  # fmt: skip
    assert linear_macs_per_token(wrapper) == 24 + 12 + 8


def test_router_is_not_part_of_the_layer() -> None:
    layer = _llava().model.language_model.layers[0]
    before = linear_macs_per_token(layer)
    layer.dare_router = nn.Linear(48, 2)
    assert linear_macs_per_token(layer) == before
    assert router_flops(48, 10) == 2 * 10 * 48 * 2


def test_meta_weights_cost_the_same() -> None:
    model = _llava()
    real = shapes_of(model.model.language_model.layers, model.config.text_config)
    meta = model.to("meta")
    config = meta.config.text_config
    assert shapes_of(meta.model.language_model.layers, config) == real
    assert (real[0].q_heads, real[0].kv_heads, real[0].qk_dim) == (6, 2, 16)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_kv_bytes(itemsize: int) -> None:
    shapes = [LayerShape(10, 4, 2, 8, 6), LayerShape(10, 4, 1, 8, 8)]
    expected = (3 + 5) * 2 * (8 + 6) * itemsize + (1 + 2) * 1 * 16 * itemsize
    assert kv_bytes(shapes, [[3, 5], [1, 2]], itemsize) == expected
    assert layer_flops(10, 3, 7, 4, 8, 6) == 2 * (3 * 10 + 4 * 3 * 7 * 14)
    assert forward_flops(shapes[:1], [[3]], [[7]]) == 2 * (3 * 10 + 4 * 3 * 7 * 14)


def test_scorer_flops() -> None:
    shape = LayerShape(10, 4, 2, 8, 6)
    assert attention_scorer_flops(shape, 32, 100) == 2 * 100 * (4 * 32 * 8 + 2 * 6)
    assert key_norm_scorer_flops(shape, 50, 100) == 2 * 100 * 2 * 8 * 51


def test_generate_equals_torchs_count() -> None:
    model = _llava()
    config = model.config.text_config
    shapes = shapes_of(model.model.language_model.layers, config)
    ids = torch.randint(0, 96, (ROWS, PROMPT))
    with FlopCounterMode(display=False) as counter:
        out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    flops = unpruned_generate_flops(
        shapes,
        [PROMPT] * ROWS,
        out.shape[1] - PROMPT,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
    )
    assert flops == counter.get_total_flops()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_each_architecture_equals_torchs_count(name: str) -> None:
    model = tiny_model(name, attn_implementation="eager")
    inputs = tiny_inputs(model, batch=2)
    parts = locate(model)
    shapes = shapes_of(parts.layers, parts.text_config)
    rows, length = inputs["input_ids"].shape
    hidden, vocab = parts.text_config.hidden_size, parts.text_config.vocab_size
    head = head_flops(hidden, vocab, rows * length)
    counted = _counted(model, **inputs, use_cache=False)
    assert unpruned_flops(shapes, [length] * rows, [length] * rows) + head == counted
