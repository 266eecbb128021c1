"""What names cannot tell of a language model's toy size: fields of its config.

Each is small enough that what is particular happens within a prompt: windows and chunks are shorter
than it, layers alternate, multipliers are not 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.architectures.text_models import TEXT_SUPPORTED
from dare_hf.testing import family_parts as parts
from dare_hf.testing.family import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

_EVEN = frozenset({"minimax_m3_vl_text"})
"""Rows of one batch are equally long, as :class:`Family` says."""

_WINDOW = 12
_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
_ALTERNATING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": [*["linear_attention", "full_attention"] * 2, "full_attention"],
}
_LINEAR: dict[str, Any] = {**parts.HALF_ROPE, **_HYBRID}
_CONV: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": [*["conv", "full_attention"] * 2, "full_attention"],
}
_DELTA: dict[str, Any] = {
    **_LATENT,
    **_HYBRID,
    "mlp_layer_types": ["dense", *["sparse"] * 4],
    "num_experts_per_token": 2,
    "num_expert_group": 1,
}
_MAMBA: dict[str, Any] = {
    "num_hidden_layers": 5,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}
_MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
_WINDOWS_BEHIND: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": _WINDOW,
    "max_window_layers": 2,
    "layer_types": None,
}
_HEADS: dict[str, Any] = {"head_dim": 8}

CONFIGS: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3"), _LATENT),
    **dict.fromkeys(("sarvam_mla", "youtu"), _LATENT),
    **dict.fromkeys(("gpt-sw3", "gpt2"), _GPT2),
    **dict.fromkeys(("kolibri1", "laguna", "mellum"), _ALTERNATING),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONV),
    **dict.fromkeys(("qwen2", "qwen3"), _WINDOWS_BEHIND),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _LINEAR),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared"), _MULTIPLIERS),
    "bailing_hybrid": _DELTA,
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3, 4]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": parts.MROPE}},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots3_note_text": parts.DOTS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3_text": parts.ALTERNATING,
    "gemma3n_text": {**parts.SHARING, "laurel_rank": 4},
    "gemma4_text": parts.GEMMA4,
    "gemma4_unified_text": parts.GEMMA4,
    "granitemoehybrid": {**_MAMBA, **_HYBRID, **_MULTIPLIERS, "num_key_value_heads": 2},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "jamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
    },
    "kimi_linear": _DELTA,
    "lara_mini": {
        "num_hidden_layers": 5,
        "layer_types": [
            *["linear_attention", "full_attention", "linear_attention"],
            *["sliding_attention", "full_attention"],
        ],
    },
    "lfm3": {
        "num_hidden_layers": 5,
        "layer_types": [
            *["conv", "full_attention", "conv"],
            *["sliding_attention", "full_attention"],
        ],
    },
    "llama4_text": {"num_experts_per_tok": 1},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 5,
        "layer_types": [*["minimax_m3_sparse", "full_attention"] * 2, "full_attention"],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
    "ministral": {**_HEADS, **_ALTERNATING},
    "ministral3": {
        "rope_parameters": {
            **parts.ROPE,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        }
    },
    "mixtral": {"sliding_window": _WINDOW},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": _WINDOW},
    "nemotron": {**_HEADS, "num_key_value_heads": 2},
    "nemotron_h": parts.NEMOTRON_H,
    "olmo_hybrid": _HYBRID,
    "phi": {"qk_layernorm": True},
    "phi3": {"sliding_window": _WINDOW},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True},
}


def _family(model_type: str) -> Family:
    """A model that sees no pictures; its prompts have several lengths where they may."""
    return Family(
        None,
        CONFIGS.get(model_type, {}),
        sees=False,
        images=(0, 0, 0),
        even=model_type in _EVEN,
        type_ids=(),
    )


TEXT_FAMILIES: dict[str, Family] = {
    spec.model_type: _family(spec.model_type) for spec in TEXT_SUPPORTED
}
