"""Tiny vision-language models built from configs: no hub, deterministic, sharp.

Random models with small weights print one token for ever, and every identity holds by degeneracy.
So the weights of these are drawn at a standard deviation of 0.24 or more, norms kept at 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

PAD_ID, BOS_ID, EOS_ID, IMAGE_ID, IMAGE_START_ID, IMAGE_END_ID, VIDEO_ID = range(7)
FIRST_TEXT_ID = 10
"""Ids from here up to ``text_ids_end`` are plain text in every tiny model."""

CHAMELEON_TEXT_IDS = 100
CHAMELEON_CODES = 32
_HIDDEN, _HEADS, _KV_HEADS = 32, 4, 2


def _text(layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": 120,
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        **extra,
    }


def _llava(layers: int, overrides: dict[str, Any]) -> PreTrainedConfig:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "projection_dim": 16,
    }
    text = _text(layers, model_type="llama", tie_word_embeddings=False, **overrides)
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=9
    )


def _qwen2_5_vl(layers: int, overrides: dict[str, Any]) -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "out_hidden_size": _HIDDEN,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=_text(layers, rope_parameters=rope, **overrides),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=IMAGE_START_ID,
        vision_end_token_id=IMAGE_END_ID,
        tie_word_embeddings=False,
    )


def _gemma3(layers: int, overrides: dict[str, Any]) -> PreTrainedConfig:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
    }
    pattern = ["sliding_attention", "full_attention"]
    # Real Gemma ties its output to its input embeddings; at random that repeats the last token.
    options = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 12,
        "layer_types": [pattern[layer % 2] for layer in range(layers)],
        "tie_word_embeddings": False,
        **overrides,
    }
    return Gemma3Config(
        vision_config=vision,
        text_config=_text(layers, **options),
        mm_tokens_per_image=9,
        boi_token_index=IMAGE_START_ID,
        eoi_token_index=IMAGE_END_ID,
        image_token_index=IMAGE_ID,
        tie_word_embeddings=False,
    )


def image_token_name(code: int) -> str:
    """Return the vocabulary name Chameleon gives to a VQ code: its digits as letters A to J."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _chameleon(layers: int, overrides: dict[str, Any]) -> PreTrainedConfig:
    vq = {
        "embed_dim": 8,
        "num_embeddings": CHAMELEON_CODES,
        "latent_channels": 16,
        "resolution": 12,
        "base_channels": 32,  # GroupNorm wants multiples of 32
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    }
    names = {
        "<image>": IMAGE_ID,
        "<racm3:break>": IMAGE_START_ID,
        "<eoss>": IMAGE_END_ID,
        **{image_token_name(code): CHAMELEON_TEXT_IDS + code for code in range(CHAMELEON_CODES)},
    }
    options = {"vocab_size": CHAMELEON_TEXT_IDS + CHAMELEON_CODES, **overrides}
    text: dict[str, Any] = {**_text(layers), **options}
    return ChameleonConfig(vq_config=vq, vocabulary_map=names, **text)


_BUILDERS: dict[str, tuple[type[PreTrainedModel], Callable[..., PreTrainedConfig]]] = {
    "llava": (LlavaForConditionalGeneration, _llava),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl),
    "gemma3": (Gemma3ForConditionalGeneration, _gemma3),
    "chameleon": (ChameleonForConditionalGeneration, _chameleon),
}
TINY_MODELS: tuple[str, ...] = tuple(_BUILDERS)
"""Names :func:`tiny_model` knows; each is the model's ``model_type``."""


def sharpen(model: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw every matrix and bias anew; leave norms, whose weights are vectors of ones."""
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    for parameter in model.parameters():
        if id(parameter) not in norms:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * (std if parameter.dim() > 1 else std / 2))


def tiny_model(
    name: str,
    *,
    layers: int = 4,
    seed: int = 0,
    std: float = 0.24,
    attn_implementation: str | None = None,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Return a tiny random model in eval mode whose greedy tokens vary.

    Args:
        name: One of :data:`TINY_MODELS`.
        layers: Decoder layers.
        seed: Seed of the weights; torch's global generator is left alone.
        std: Standard deviation of the weights; below 0.24 the tokens become degenerate.
        attn_implementation: Attention of the text model and the tower (default: the model's own).
        dtype: Type of all weights (default float32).
        **config_overrides: Fields of the text config.

    Raises:
        ValueError: ``name`` is not a tiny model.

    Examples:
        >>> from dare_hf.testing import tiny_model
        >>> tiny_model("qwen2_5_vl").config.model_type
        'qwen2_5_vl'
    """
    if name not in _BUILDERS:
        raise ValueError(f"name must be one of {TINY_MODELS}, got {name!r}")
    cls, build = _BUILDERS[name]
    config = build(layers, config_overrides)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32, **kwargs)
    sharpen(model, std, torch.Generator().manual_seed(seed))
    model.generation_config.pad_token_id = PAD_ID
    # Runs have a fixed length unless a test asks for an end.
    model.generation_config.eos_token_id = None
    return model.to(dtype or torch.float32).eval()
