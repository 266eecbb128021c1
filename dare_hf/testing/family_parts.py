"""Pieces of toy configs that several architectures share: rotary rules, towers, vocabularies."""

from typing import Any

from dare_hf.testing.models import IMAGE_END_ID, IMAGE_ID, IMAGE_START_ID, VIDEO_ID

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MROPE: dict[str, Any] = {**ROPE, "mrope_section": [2, 1, 1]}
HALF_ROPE: dict[str, Any] = {
    "head_dim": 16,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5},
}
LINEAR: dict[str, Any] = {
    **HALF_ROPE,
    "num_hidden_layers": 5,
    "layer_types": [*["linear_attention", "full_attention"] * 2, "full_attention"],
}
TWO_ROPES = dict.fromkeys(("sliding_attention", "full_attention"), ROPE)
ALTERNATING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": TWO_ROPES,
}
SAM: dict[str, Any] = {
    "hidden_size": 16,
    "output_channels": 8,
    "image_size": 32,
    "patch_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}
QUERY_FORMER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_hidden_size": 16,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
LLAVA: dict[str, Any] = {"vision_config": {"image_size": 12}, "image_seq_length": 9}
TILED: dict[str, Any] = {**LLAVA, "image_grid_pinpoints": [[12, 24], [24, 12]]}
PIXTRAL: dict[str, Any] = {"vision_config": {"image_size": 24, "head_dim": 8}}
GEMMA3: dict[str, Any] = {"mm_tokens_per_image": 9, "text_config": ALTERNATING}
SHARING: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "rope_parameters": TWO_ROPES,
    "num_kv_shared_layers": 2,
}
GEMMA4: dict[str, Any] = {**SHARING, "per_layer_config": {}}
GEMMA3N_AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 1,
    "sscp_conv_channel_size": [4, 4],
}
PAIRS: dict[str, Any] = {"vision_config": {"image_size": [24, 24], "patch_size": [4, 4]}}
AUDIO: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": 32,
    "num_mel_bins": 8,
}
OMNI: dict[str, Any] = {
    "audio_config": AUDIO,
    "vision_start_token_id": IMAGE_START_ID,
    "vision_end_token_id": IMAGE_END_ID,
    "audio_start_token_id": 8,
    "audio_end_token_id": 9,
}
MINICPM: dict[str, Any] = {
    "text_config": LINEAR,
    "insert_layer_id": 0,
    "vision_config": {"insert_layer_id": 0},
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
}
GRID_POSITIONS: dict[str, Any] = {"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}}
VQ_CODES = 32
FIRST_CODE = 84
CHAMELEON_NAMES: dict[str, Any] = {
    "<image>": IMAGE_ID,
    "<racm3:break>": IMAGE_START_ID,
    "<eoss>": IMAGE_END_ID,
    # digits as letters, the way the vocabulary of the released model has them
    **{
        "IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z": FIRST_CODE + code
        for code in range(VQ_CODES)
    },
}
EMU3_NAMES: dict[str, Any] = {
    "<image>": IMAGE_ID,
    "<|extra_200|>": IMAGE_START_ID,
    **{f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(VQ_CODES)},
}

OPT: dict[str, Any] = {"ffn_dim": 64, "activation_function": "gelu"}
QUERIES: dict[str, Any] = {
    "num_query_tokens": 9,
    "qformer_config": QUERY_FORMER,
    "text_config": OPT,
}
CHAMELEON_VQ: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": VQ_CODES,
    "latent_channels": 16,
    "resolution": 12,
    "base_channels": 32,  # GroupNorm wants multiples of 32
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
}
APERTUS_VQ: dict[str, Any] = {
    "codebook_size": VQ_CODES,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}
APERTUS_AUDIO: dict[str, Any] = {
    "num_filters": 2,
    "upsampling_ratios": [2, 2],
    "num_lstm_layers": 1,
    "hidden_size": 8,
    "codebook_dim": 8,
    "codebook_size": 4,
}
DOTS: dict[str, Any] = {
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "layer_types": [*["indexed_attention", "sliding_attention"] * 2, "sliding_attention"],
    "mlp_layer_types": ["dense", *["sparse"] * 4],
    "shared_experts_intermediate_size": 16,
    "index_n_heads": 32,  # with few, many scores are zero, and which of those are picked is chance
    "rope_parameters": dict.fromkeys(("indexed_attention", "sliding_attention"), ROPE),
    "per_layer_config": {},
}
DOTS_AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "feature_size": 8,
    "downsample_hidden_size": 4,
    "adapter_input_size": 16,
    "adapter_out_dim": 32,
}
EMU3_VQ: dict[str, Any] = {
    "codebook_size": VQ_CODES,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
    "num_attention_heads": 1,
}
JANUS_VQ: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
    "num_patches": 4,
}
GEMMA4_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
}
GEMMA4_UNIFIED_VISION: dict[str, Any] = {
    "model_type": "gemma4_unified_vision",
    "patch_size": 2,
    "pooling_kernel_size": 2,
    "mm_embed_dim": 32,
    "mm_posemb_size": 64,
    "output_proj_dims": 32,
}
MOLMO2_ADAPTER: dict[str, Any] = {
    "vision_feature_layer": [-1, -2],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "text_hidden_size": 32,
}
DEEPSEEK_OCR2_VISION: dict[str, Any] = {
    "sam_config": {**SAM, "downsample_channels": [8, 16]},
    "encoder_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
DEEPSEEK_OCR2_TEXT: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "n_group": 1,
    "topk_group": 1,
}
NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": [
        *["linear_attention", "full_attention", "moe"],
        *["full_attention", "full_attention"],
    ],
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 16,
}
IDEFICS2_PERCEIVER: dict[str, Any] = {
    "hidden_size": 32,
    "resampler_n_latents": 6,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}
