"""Any architecture of transformers at toy size: its own config class with small numbers.

Only numbers that say a size are replaced, found by their names; whatever a config derives from
them (layer patterns, head widths, expert lists) it derives anew. What names cannot tell stands in
`families`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from dare_hf.testing.families import family_of
from dare_hf.testing.models import (
    BOS_ID,
    EOS_ID,
    IMAGE_END_ID,
    IMAGE_ID,
    IMAGE_START_ID,
    PAD_ID,
    VIDEO_ID,
    sharpen,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

AUDIO_ID = 7
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 4, 2, 8, 4
_EXPERTS, _CHOSEN, _WINDOW = 4, 2, 12

_TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "additional_vocab_size": 8,
    "vocab_size_per_layer_input": 120,
    "hidden_size_per_layer_input": 4,
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "intermediate_size_mlp"), 2 * HIDDEN),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size"), HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), HIDDEN // 2),
    **dict.fromkeys(("share_expert_dim", "moe_hidden_size"), HIDDEN // 2),
    **dict.fromkeys(("num_hidden_layers", "layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "swa_num_attention_heads"), HEADS),
    "num_sliding_attention_heads": HEADS,
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim"), HEAD_DIM),
    "qk_rope_head_dim": HEAD_DIM // 2,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), HIDDEN // 2),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), _EXPERTS),
    "moe_num_experts": _EXPERTS,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), _CHOSEN),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    **dict.fromkeys(("sliding_window", "sliding_window_size"), _WINDOW),
    "attention_chunk_size": _WINDOW,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD_DIM),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("index_head_dim",), HEAD_DIM),
    "index_n_heads": 2,
    "index_topk": _WINDOW,
    "max_position_embeddings": 512,
    "query_pre_attn_scalar": HEAD_DIM,
    # A random model whose output is tied to its input repeats the last token.
    "tie_word_embeddings": False,
    # Only what the model looks at would be drawn from it: nothing is dropped.
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "layerdrop"), 0.0),
}

_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "patch_embed_hidden_size"), HIDDEN // 2),
    "intermediate_size": HIDDEN,
    "mlp_dim": HIDDEN,
    **dict.fromkeys(("num_hidden_layers", "depth", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 2),
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "image_size": 24,
    "patch_size": 4,
    "window_size": 16,
    "num_position_embeddings": 64,
    "num_patches": 36,
    "projection_dim": HIDDEN // 2,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size"), HIDDEN),
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "vision_use_head": False,
}

_TOP: dict[str, Any] = {
    **dict.fromkeys(("projector_hidden_size", "projection_hidden_size"), HIDDEN),
    "alignment_intermediate_size": 2 * HIDDEN,
    "tie_word_embeddings": False,
}

_IDS: dict[str, int] = {
    "pad_token_id": PAD_ID,
    "_pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    **dict.fromkeys(("image_token_id", "image_token_index", "image_patch_id"), IMAGE_ID),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO_ID),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), AUDIO_ID),
    **dict.fromkeys(("boa_token_id", "audio_start_token_id", "user_token_id"), AUDIO_ID + 1),
    **dict.fromkeys(("eoa_token_id", "eoa_token_index", "audio_end_token_id"), AUDIO_ID + 2),
    **dict.fromkeys(("boi_token_id", "boi_token_index", "im_start_id"), IMAGE_START_ID),
    **dict.fromkeys(("eoi_token_id", "eoi_token_index", "im_end_id"), IMAGE_END_ID),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id"), IMAGE_START_ID),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id"), IMAGE_END_ID),
    **dict.fromkeys(("video_start_token_id", "video_end_token_id"), AUDIO_ID + 2),
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TEXT_PARTS = ("text_config", "decoder")
_VISION_PARTS = ("vision_config", "high_res_vision_config", "vq_config", "sam_config")


def shrunk_config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model of this architecture.

    Args:
        model_type: A key of transformers' CONFIG_MAPPING.
    """
    kind = CONFIG_MAPPING[model_type]
    small = _shrink(kind(), "top")
    return kind(**_merge(small, family_of(model_type).config))


def class_of(config: PreTrainedConfig) -> Any:
    """The class a config's model has: the one that reads images where there is one."""
    sees = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return sees or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def shrunk_model(model_type: str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A tiny random model of this architecture, sharp, in eval mode, that writes to the end.

    Args:
        model_type: A key of MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or MODEL_FOR_CAUSAL_LM_MAPPING.
        dtype: Type of all weights (default float32).
    """
    config = shrunk_config(model_type)
    kind = class_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind._from_config(config, dtype=torch.float32)
    sharpen(model, family_of(model_type).std, torch.Generator().manual_seed(0))
    for part in model.modules():  # some call the generate of their text model
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.pad_token_id = PAD_ID
            part.generation_config.eos_token_id = None
    return model.to(dtype or torch.float32).eval()


def _shrink(config: PreTrainedConfig, role: str) -> dict[str, Any]:
    """Small values for the sizes of a config, by name, and for those of its parts."""
    parts = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]
    has_text = any(name in _TEXT_PARTS for name in parts)
    table = {"vision": _VISION, "text": _TEXT}.get(role, _TOP if has_text else _TEXT | _TOP)
    known = config.to_dict()
    small: dict[str, Any] = {}
    for name, value in (table | _IDS).items():
        if name in known and (known[name] is not None or name in _IDS):
            small[name] = min(value, known[name]) if name == "num_key_value_heads" else value
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        small["rope_parameters"] = dict(_MROPE)
    for name in parts:
        part = getattr(config, name)
        vision = role == "vision" or name in _VISION_PARTS
        small[name] = _shrink(part, "vision" if vision else "text")
        small[name]["model_type"] = part.model_type
    return small


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, dictionaries entry by entry."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        both = both and name != "rope_parameters"  # a set of rules that is given whole
        merged[name] = _merge(merged[name], value) if both else value
    return merged
