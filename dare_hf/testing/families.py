"""What names cannot tell of an architecture's toy size: a few lines of data each.

An architecture without an entry has flat patches and a grid, and needs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.testing import pictures
from dare_hf.testing.models import IMAGE_END_ID, IMAGE_ID, IMAGE_START_ID, VIDEO_ID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dare_hf.testing.pictures import Draw


@dataclass(frozen=True)
class Family:
    """How to build and feed the tiny model of one architecture.

    Attributes:
        picture: Draws the pixels of one picture; None where the tower cannot be built here, so that
            random features take the place of its output.
        config: Fields of the config that names do not tell, laid over the shrunk ones.
        sees: Whether prompts have pictures at all.
        images: Pictures of each row of the batch.
        encoded: Run the tower picture by picture, and give the model its features.
        flat: The features of a batch are one tensor, not one a picture.
        per_row: Pictures are stacked by row, and rows with fewer are filled with zeros.
        joins: At which dimension a tensor of several pictures is joined, where it is not 0.
        type_ids: Arguments that take 1 for image tokens, where the model's forward knows them.
        zeros: Further arguments that are zero for every token.
    """

    picture: Draw | None = pictures.patches
    config: Mapping[str, Any] = field(default_factory=dict)
    sees: bool = True
    images: tuple[int, ...] = (0, 1, 2)
    encoded: bool = False
    flat: bool = False
    per_row: bool = False
    joins: Mapping[str, int] = field(default_factory=dict)
    type_ids: tuple[str, ...] = ("mm_token_type_ids", "token_type_ids")
    zeros: tuple[str, ...] = ()


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
_HALF_ROPE = {"head_dim": 16, "rope_parameters": {**_MROPE, "partial_rotary_factor": 0.5}}
_LINEAR = {
    **_HALF_ROPE,
    "num_hidden_layers": 5,
    "layer_types": [*["linear_attention", "full_attention"] * 2, "full_attention"],
}
_TWO_ROPES = dict.fromkeys(("sliding_attention", "full_attention"), _ROPE)
_ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": _TWO_ROPES,
}
_SAM = {
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
_QUERY_FORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_hidden_size": 16,
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
_LLAVA = {"vision_config": {"image_size": 12}, "image_seq_length": 9}
_TILED = {**_LLAVA, "image_grid_pinpoints": [[12, 24], [24, 12]]}
_PIXTRAL = {"vision_config": {"image_size": 24, "head_dim": 8}}
_GEMMA3 = {"mm_tokens_per_image": 9, "text_config": _ALTERNATING}
_GEMMA4 = {**_ALTERNATING, "per_layer_config": {}}
_PAIRS = {"vision_config": {"image_size": [24, 24], "patch_size": [4, 4]}}
_AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": 32,
    "num_mel_bins": 8,
}
_OMNI = {
    "audio_config": _AUDIO,
    "vision_start_token_id": IMAGE_START_ID,
    "vision_end_token_id": IMAGE_END_ID,
    "audio_start_token_id": 8,
    "audio_end_token_id": 9,
}
_MINICPM = {
    "text_config": _LINEAR,
    "insert_layer_id": 0,
    "vision_config": {"insert_layer_id": 0},
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
}
_GRID_POSITIONS = {"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}}
_VQ_CODES = 32
_FIRST_CODE = 84
_CHAMELEON_NAMES = {
    "<image>": IMAGE_ID,
    "<racm3:break>": IMAGE_START_ID,
    "<eoss>": IMAGE_END_ID,
    # digits as letters, the way the vocabulary of the released model has them
    **{
        "IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z": _FIRST_CODE + code
        for code in range(_VQ_CODES)
    },
}
_EMU3_NAMES = {
    "<image>": IMAGE_ID,
    "<|extra_200|>": IMAGE_START_ID,
    **{f"<|visual token {code:06d}|>": _FIRST_CODE + code for code in range(_VQ_CODES)},
}

_STRIP = Family(pictures.strip, _MINICPM, joins={"pixel_values": -1})

FAMILIES: dict[str, Family] = {
    "aria": Family(
        pictures.square,
        {"projector_patch_to_query_dict": {36: 9}, "text_config": {"intermediate_size": 32}},
    ),
    "aya_vision": Family(pictures.square),
    "chameleon": Family(
        pictures.fixed(12),
        {
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": _VQ_CODES,
                "latent_channels": 16,
                "resolution": 12,
                "base_channels": 32,  # GroupNorm wants multiples of 32
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
            },
            "vocabulary_map": _CHAMELEON_NAMES,
        },
    ),
    "cohere2_vision": Family(pictures.square),
    "cohere_compass": Family(
        config={"text_config": {"rope_parameters": {"full_attention": _MROPE}}}
    ),
    "deepseek_ocr2": Family(
        pictures.fixed(64),
        {
            "vision_config": {
                "sam_config": {**_SAM, "downsample_channels": [8, 16]},
                "encoder_config": {
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                },
            },
            "text_config": {
                "num_experts_per_tok": 2,
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                "n_group": 1,
                "topk_group": 1,
            },
        },
    ),
    "deepseek_vl": Family(pictures.square),
    "deepseek_vl_hybrid": Family(
        pictures.pair(96), {"high_res_vision_config": {**_SAM, "image_size": 96}}
    ),
    "emu3": Family(
        pictures.fixed(8, image_sizes=torch.tensor([[8, 8]])),
        {
            "vq_config": {
                "codebook_size": _VQ_CODES,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
                "num_attention_heads": 1,
            },
            "vocabulary_map": _EMU3_NAMES,
        },
    ),
    "ernie4_5_vl_moe": Family(
        pictures.flat_patches,
        {
            "text_config": {
                "moe_intermediate_size": [16, 8],
                "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
                "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            }
        },
        type_ids=("mm_token_type_ids", "moe_mm_token_type_ids"),
    ),
    "fast_vlm": Family(None, {"vision_config": _CLIP}, flat=True),
    "fuyu": Family(pictures.line(9, 48), {"patch_size": 4}),
    "gemma3": Family(pictures.square, _GEMMA3),
    "gemma4": Family(
        pictures.placed(4),
        {
            "vision_config": {
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
            },
            "text_config": _GEMMA4,
        },
    ),
    "gemma4_unified": Family(
        pictures.placed(4),
        {
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 64,
                "output_proj_dims": 32,
            },
            "text_config": _GEMMA4,
        },
    ),
    "glm4v_moe": Family(config={"text_config": _HALF_ROPE}),
    "got_ocr2": Family(pictures.fixed(32), {"vision_config": _SAM}),
    "granite4_vision": Family(
        pictures.tiles,
        {
            "image_grid_pinpoints": [[16, 32], [32, 16]],
            "deepstack_layer_map": [[-1, 0], [-2, 1]],
            "downsample_rate": "1/2",
            "spatial_target_layers": [2, 3],
            "qformer_config": {**_QUERY_FORMER, "hidden_size": 64, "encoder_hidden_size": 64},
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
                "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]},
            }
        },
        images=(2, 0, 0),  # transformers numbers the images over the whole batch
    ),
    "idefics": Family(sees=False),
    "idefics2": Family(
        pictures.stack,
        {
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 6,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            }
        },
        per_row=True,
    ),
    "idefics3": Family(pictures.stack, per_row=True),
    "internvl": Family(pictures.square, _PAIRS),
    "janus": Family(
        pictures.square,
        {
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
                "num_patches": 4,
            },
            "vision_config": {"image_size": 12, "num_image_tokens": 9, "projection_dim": 32},
        },
    ),
    "kimi_k25": Family(
        pictures.square_patches,
        {
            **_GRID_POSITIONS,
            "projection_hidden_size": 16,
            "text_config": {"num_key_value_heads": 4},
        },
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
    "lighton_ocr": Family(pictures.sized, _PIXTRAL),
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
    "llava": Family(pictures.square, _LLAVA),
    "llava_next": Family(pictures.tiles, _TILED),
    "llava_next_video": Family(pictures.tiles, _TILED),
    "llava_onevision": Family(pictures.tiles, _TILED),
    "minicpm_ocr": _STRIP,
    "minicpmv4_6": _STRIP,
    "minicpmv4_7": _STRIP,
    "mistral3": Family(pictures.sized, _PIXTRAL),
    "mistral4": Family(config={"rope_parameters": _ROPE, "num_key_value_heads": 4}, sees=False),
    "mllama": Family(sees=False),
    "molmo2": Family(
        pictures.pooled,
        {
            "vision_config": {"image_size": [24, 24], "num_position_embeddings": 36},
            "adapter_config": {
                "vision_feature_layer": [-1, -2],
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 32,
                "text_hidden_size": 32,
            },
            "text_config": {"rope_scaling_layers": [0, 1, 2]},
        },
        encoded=True,
    ),
    "muse_glimmer": Family(pictures.deep_patches, _GRID_POSITIONS),
    "muse_spark": Family(
        pictures.deep_patches,
        {
            **_GRID_POSITIONS,
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
            "text_config": {
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
            },
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
    "paddleocr_vl": Family(pictures.square_patches, {"text_config": {"rope_parameters": _MROPE}}),
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
        None, {"vision_config": {**_CLIP, "model_args": {"embed_dim": 16}}}, flat=True
    ),
    "pp_chart2table": Family(pictures.fixed(32), {"vision_config": _SAM}),
    "qianfan_ocr": Family(pictures.square, _PAIRS),
    "qwen2_5_omni_thinker": Family(config=_OMNI),
    "qwen2_vl": Family(config={"vision_config": {"hidden_size": 32, "embed_dim": 16}}),
    "qwen3_5": Family(config={"text_config": _LINEAR}),
    "qwen3_5_moe": Family(config={"text_config": _LINEAR}),
    "qwen3_omni_moe_thinker": Family(config=_OMNI),
    "shieldgemma2": Family(pictures.square, _GEMMA3),
    "smolvlm": Family(pictures.stack, per_row=True),
    "step3p7": Family(
        pictures.square,
        {
            "text_config": {
                "layer_types": ["full_attention", "sliding_attention"] * 2,
                "sliding_window": 12,
                "rope_parameters": _TWO_ROPES,
            }
        },
    ),
    "video_llama_3": Family(pictures.merged_patches),
    "video_llava": Family(pictures.square, {"vision_config": {"image_size": 12}}),
    "vipllava": Family(pictures.square, {**_LLAVA, "vision_feature_layer": [-1, -2]}),
}

_PLAIN = Family()


def family_of(model_type: str) -> Family:
    """The data of an architecture; the default where it needs none."""
    return FAMILIES.get(model_type, _PLAIN)
