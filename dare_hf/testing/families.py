"""What names cannot tell of an architecture's toy size: a few lines of data each.

An architecture without an entry has flat patches and a grid, and needs nothing more.
"""

from __future__ import annotations

import torch

from dare_hf.testing import family_parts as parts
from dare_hf.testing import pictures
from dare_hf.testing.family import Family
from dare_hf.testing.models import IMAGE_ID, VIDEO_ID
from dare_hf.testing.no_tower import NoTowerConfig
from dare_hf.testing.text_families import TEXT_FAMILIES

_STRIP = Family(
    pictures.strip, parts.MINICPM, joins={"pixel_values": -1, "pixel_values_videos": -1}
)

FAMILIES: dict[str, Family] = {
    "apertus1p5": Family(
        pictures.fixed(8, image_sizes=torch.tensor([[8, 8]])),
        {
            "vision_config": parts.APERTUS_VQ,
            "audio_config": parts.APERTUS_AUDIO,
            "image_token_offset": parts.FIRST_CODE,
            "audio_token_offset": parts.FIRST_CODE + parts.VQ_CODES,
        },
    ),
    "aria": Family(
        pictures.square,
        {"projector_patch_to_query_dict": {36: 9}, "text_config": {"intermediate_size": 32}},
    ),
    "aya_vision": Family(pictures.square),
    "blip-2": Family(
        pictures.square,
        {**parts.QUERIES, "image_token_index": IMAGE_ID},
        needs_picture=True,
        positions=False,
    ),
    "chameleon": Family(
        pictures.fixed(12),
        {
            "vq_config": parts.CHAMELEON_VQ,
            "vocabulary_map": parts.CHAMELEON_NAMES,
        },
    ),
    "cohere2_vision": Family(pictures.square),
    "cohere_compass": Family(
        config={"text_config": {"rope_parameters": {"full_attention": parts.MROPE}}}
    ),
    "deepseek_ocr2": Family(
        pictures.fixed(64),
        {
            "vision_config": parts.DEEPSEEK_OCR2_VISION,
            "text_config": parts.DEEPSEEK_OCR2_TEXT,
        },
    ),
    "deepseek_vl": Family(pictures.square),
    "deepseek_vl_hybrid": Family(
        pictures.pair(96), {"high_res_vision_config": {**parts.SAM, "image_size": 96}}
    ),
    "dots3_note": Family(
        pictures.flat_patches,
        {
            "vision_config": {
                "mlp_layer_types": ["dense", "dense"],
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
            "audio_config": parts.DOTS_AUDIO,
            "text_config": parts.DOTS,
        },
    ),
    "emu3": Family(
        pictures.fixed(8, image_sizes=torch.tensor([[8, 8]])),
        {
            "vq_config": parts.EMU3_VQ,
            "vocabulary_map": parts.EMU3_NAMES,
        },
    ),
    "ernie4_5_vl_moe": Family(
        pictures.flat_patches,
        {
            "text_config": {
                "moe_intermediate_size": [16, 8],
                "rope_parameters": {**parts.ROPE, "mrope_section": [1, 1, 2]},
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            }
        },
        type_ids=("mm_token_type_ids", "moe_mm_token_type_ids"),
    ),
    "fast_vlm": Family(None, {"vision_config": parts.CLIP}, flat=True),
    "fuyu": Family(pictures.line(9, 48), {"patch_size": 4}),
    "gemma3": Family(pictures.square, parts.GEMMA3),
    "gemma3n": Family(
        None,
        {
            "vision_config": NoTowerConfig(hidden_size=16, vocab_offset=100, vocab_size=8),
            "audio_config": {**parts.GEMMA3N_AUDIO, "vocab_offset": 108, "vocab_size": 8},
            "text_config": {**parts.SHARING, "laurel_rank": 4},
        },
        flat=True,
    ),
    "gemma4": Family(
        pictures.placed(4),
        {
            "vision_config": parts.GEMMA4_VISION,
            "text_config": parts.GEMMA4,
        },
    ),
    "gemma4_unified": Family(
        pictures.placed(4),
        {
            "vision_config": parts.GEMMA4_UNIFIED_VISION,
            "text_config": parts.GEMMA4,
        },
    ),
    "glm4v_moe": Family(config={"text_config": parts.HALF_ROPE}),
    "got_ocr2": Family(pictures.fixed(32), {"vision_config": parts.SAM}),
    "granite4_vision": Family(
        pictures.tiles,
        {
            "image_grid_pinpoints": [[16, 32], [32, 16]],
            "deepstack_layer_map": [[-1, 0], [-2, 1]],
            "downsample_rate": "1/2",
            "spatial_target_layers": [2, 3],
            "qformer_config": {**parts.QUERY_FORMER, "hidden_size": 64, "encoder_hidden_size": 64},
            "vision_config": {"image_size": 16, "hidden_size": 64},
        },
    ),
    "granite_docling": Family(
        pictures.masked_stack, {"vision_config": {"scale_factor": 2}}, per_row=True
    ),
    "hunyuan_vl": Family(
        config={
            "text_config": {
                "head_dim": 8,
                "rope_parameters": {**parts.ROPE, "mrope_section": [1, 1, 1, 1]},
            }
        },
        separate=(2, 0, 0),  # its positions number the images over the whole batch
    ),
    "idefics": Family(
        pictures.stack, tokens=0, per_row=True, blank=True, watched={"image_attention_mask": ()}
    ),
    "idefics2": Family(
        pictures.stack,
        {"perceiver_config": parts.IDEFICS2_PERCEIVER},
        per_row=True,
    ),
    "idefics3": Family(pictures.stack, per_row=True),
    "instructblip": Family(
        pictures.asked(()),
        {**parts.QUERIES, "image_token_index": IMAGE_ID},
        needs_picture=True,
        positions=False,
        std=0.32,
    ),
    "instructblipvideo": Family(
        pictures.asked((2,)),
        {**parts.QUERIES, "video_token_index": IMAGE_ID},
        needs_picture=True,
        tokens=18,
        positions=False,
    ),
    "internvl": Family(pictures.square, parts.PAIRS),
    "janus": Family(
        pictures.square,
        {
            "vq_config": parts.JANUS_VQ,
            "vision_config": {"image_size": 12, "num_image_tokens": 9, "projection_dim": 32},
        },
    ),
    "kimi_k25": Family(
        pictures.square_patches,
        {
            **parts.GRID_POSITIONS,
            "projection_hidden_size": 16,
            "text_config": {"num_key_value_heads": 4, "head_dim": 4},
        },
    ),
    "kosmos-2": Family(
        pictures.square,
        {"latent_query_num": 9},
        even=True,
        needs_picture=True,
        tokens=9,
        positions=False,
        type_ids=("image_embeds_position_mask",),
    ),
    "kosmos-2.5": Family(
        pictures.marked_patches,
        {"latent_query_num": 9, "vision_config": {"max_num_patches": 36}},
        even=True,
        needs_picture=True,
        tokens=9,
        positions=False,
        type_ids=("image_embeds_position_mask",),
    ),
    "lfm2_vl": Family(
        pictures.ragged,
        {
            "text_config": {
                "num_hidden_layers": 5,
                "layer_types": [*["conv", "full_attention"] * 2, "full_attention"],
            }
        },
    ),
    "lfm3_vl": Family(
        config={
            "text_config": {
                "num_hidden_layers": 5,
                "layer_types": [
                    *["conv", "full_attention", "conv"],
                    *["sliding_attention", "full_attention"],
                ],
            }
        }
    ),
    "lighton_ocr": Family(pictures.sized, parts.PIXTRAL),
    "llama4": Family(
        pictures.square,
        {
            "vision_config": {
                "intermediate_size": 64,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "text_config": {"num_experts_per_tok": 1},
        },
    ),
    "llava": Family(pictures.square, parts.LLAVA),
    "llava_next": Family(pictures.tiles, parts.TILED),
    "llava_next_video": Family(pictures.tiles, parts.TILED),
    "llava_onevision": Family(pictures.tiles, parts.TILED),
    "minicpm_ocr": _STRIP,
    "minicpmv4_6": _STRIP,
    "minicpmv4_7": _STRIP,
    "minimax_m3_vl": Family(
        pictures.even_patches,
        {
            "text_config": {
                "num_hidden_layers": 5,
                "layer_types": [
                    *["minimax_m3_sparse", "full_attention"] * 2,
                    "full_attention",
                ],
                "index_n_heads": 2,
                "index_block_size": 4,
                "index_topk_blocks": 3,
            }
        },
        even=True,
        tokens=9,
    ),
    "mistral3": Family(pictures.sized, parts.PIXTRAL),
    "mistral4": Family(
        config={
            "rope_parameters": {
                **parts.ROPE,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 8,
            },
            "num_key_value_heads": 4,
            "head_dim": 4,
        },
        sees=False,
        images=(0, 0, 0),
    ),
    "mllama": Family(
        pictures.ratio_tiles,
        {
            "vision_config": {
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
            "text_config": {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]},
        },
        tokens=0,
        per_row=True,
        separate=(1, 3, 1),  # a row without pictures looks evenly at the blank ones of its batch
        watched={"cross_attention_mask": (4,)},
    ),
    "molmo2": Family(
        pictures.pooled,
        {
            "vision_config": {"image_size": [24, 24], "num_position_embeddings": 36},
            "adapter_config": parts.MOLMO2_ADAPTER,
            "text_config": {"rope_scaling_layers": [0, 1, 2]},
        },
        encoded=True,
    ),
    "muse_glimmer": Family(pictures.deep_patches, {**parts.GRID_POSITIONS, "out_hidden_size": 64}),
    "muse_spark": Family(
        pictures.deep_patches,
        {
            **parts.GRID_POSITIONS,
            "out_hidden_size": 64,
            "audio_config": {
                "out_hidden_size": 32,
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1, 1, 1, 1],
            },
        },
    ),
    "nemotron_h_omni": Family(
        pictures.cut_patches,
        {
            "vision_config": {
                "video_temporal_patch_size": 2,
                "patch_dim": 48,
                "video_patch_dim": 96,
            },
            "image_token_id": IMAGE_ID,
            "video_token_id": VIDEO_ID,
            "audio_token_id": 7,
            "vision_hidden_size": 16,
            "text_config": parts.NEMOTRON_H,
        },
    ),
    "ovis2": Family(
        pictures.square,
        {
            "vision_config": {"vocab_size": 20},
            "vocab_size": 120,
            "hidden_size": 32,
            "visual_indicator_token_ids": [81, 82, 83, 84, 85],
        },
    ),
    "paddleocr_vl": Family(
        pictures.square_patches, {"text_config": {"rope_parameters": parts.MROPE}}
    ),
    "paligemma": Family(
        pictures.square,
        {
            "projection_dim": 32,
            "hidden_size": 32,
            "vocab_size": 120,
            "vision_config": {"projection_dim": 32, "image_size": 12},
            "text_config": {"num_image_tokens": 9},
        },
        type_ids=(),
        zeros=("token_type_ids",),
    ),
    "perception_lm": Family(
        None, {"vision_config": {**parts.CLIP, "model_args": {"embed_dim": 16}}}, flat=True
    ),
    "pp_chart2table": Family(pictures.fixed(32), {"vision_config": parts.SAM}),
    "qianfan_ocr": Family(pictures.square, parts.PAIRS),
    "qwen2_5_omni_thinker": Family(config=parts.OMNI),
    "qwen2_vl": Family(config={"vision_config": {"hidden_size": 32, "embed_dim": 16}}),
    "qwen3_5": Family(config={"text_config": parts.LINEAR}),
    "qwen3_5_moe": Family(config={"text_config": parts.LINEAR}),
    "qwen3_omni_moe_thinker": Family(config=parts.OMNI),
    "shieldgemma2": Family(pictures.square, parts.GEMMA3),
    "smolvlm": Family(pictures.stack, per_row=True),
    "step3p7": Family(
        pictures.square,
        {
            "text_config": {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "sliding_window": 12,
                "rope_parameters": parts.TWO_ROPES,
            }
        },
    ),
    "video_llama_3": Family(pictures.merged_patches),
    "video_llava": Family(pictures.square, {"vision_config": {"image_size": 12}}),
    "vipllava": Family(pictures.square, {**parts.LLAVA, "vision_feature_layer": [-1, -2]}),
}

_PLAIN = Family()


def family_of(model_type: str) -> Family:
    """The data of an architecture; the default where it needs none."""
    return FAMILIES.get(model_type) or TEXT_FAMILIES.get(model_type, _PLAIN)
