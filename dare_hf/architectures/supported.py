"""The architectures of transformers, one line of data each: supported ones and refused ones."""

from __future__ import annotations

from typing import Any

from dare_hf.architectures.spec import ModelSpec

_TEXT_MODEL = "model.text_model.layers"
_PLAIN = "model.layers"
_MOE = "mixture of experts"
_MROPE = "multimodal RoPE: kept tokens keep their 3-D positions"
_DEEPSTACK = f"{_MROPE}; deepstack features reach every layer at full size"
_SLIDING = "sliding-window layers, windows over logical positions"

_LINEAR_LAYERS = "the vision tower, linear-attention layers"
_ATTENTION = "the self-attention layers"
_TEXT_ONLY = "text in the self-attention layers; images are no tokens there"
_LINEAR = ("linear_attn",)
_CONV = ("conv",)
_CONVOLUTION = "the vision tower, convolution layers"
_AUDIO = "the towers, audio tokens"
_AS_IMAGES = "its processor turns frames into images"
_SHARED = "layers that share another's keys run what that one runs, and store nothing"
_COUNTS_PADS = (
    "held to the laws in batches of equally long rows: in transformers itself the positions of "
    "written tokens count padding"
)

_OPT: dict[str, Any] = {
    "layers": "language_model.model.decoder.layers",
    "pre_attention_norm": "self_attn_layer_norm",
    "generates_inside": True,
    "note": "with a decoder-only text model (OPT)",
}
SUPPORTED: tuple[ModelSpec, ...] = (
    ModelSpec(
        "apertus1p5",
        since="5.24",
        pre_attention_norm="attention_layernorm",
        whole="the image tokenizer, audio tokens",
        note="images are embedded as ids of the vocabulary",
    ),
    ModelSpec("aria", note=_MOE),
    ModelSpec("aya_vision", note=_SLIDING),
    ModelSpec("blip-2", **_OPT),
    ModelSpec(
        "chameleon",
        layers=_PLAIN,
        vocabulary_images=True,
        whole="the image tokenizer",
        note="images are ids of the vocabulary",
    ),
    ModelSpec("cohere2_vision", note=_SLIDING),
    ModelSpec("cohere_compass", since="5.16", note=_DEEPSTACK),
    ModelSpec("cosmos3_edge", since="5.15", note=_MROPE),
    ModelSpec("cosmos3_omni", since="5.11", note=_DEEPSTACK),
    ModelSpec("deepseek_ocr2", since="5.10", note=_MOE),
    ModelSpec("deepseek_vl", note="any Llama-like text model"),
    ModelSpec("deepseek_vl_hybrid", note="two towers, one text model"),
    ModelSpec(
        "dots3_note",
        since="5.23",
        unrouted=("self_attn.indexer",),
        pruned="the sliding-window layers",
        whole="the towers, audio tokens, sparse layers (an indexer picks keys)",
        note=f"latent attention; {_MOE}",
    ),
    ModelSpec(
        "emu3",
        layers=_TEXT_MODEL,
        vocabulary_images=True,
        whole="the image tokenizer",
        note="images are ids",
    ),
    ModelSpec(
        "ernie4_5_vl_moe",
        since="5.3",
        token_kwargs=(("moe_mm_token_type_ids", -1),),
        note=f"{_MROPE}; {_MOE}",
    ),
    ModelSpec("exaone4_5", since="5.8", pre_attention_norm=None, note=_SLIDING),
    ModelSpec("fast_vlm", note="its tower needs timm"),
    ModelSpec("fuyu", whole="the projection of patches", note="patches without a tower"),
    ModelSpec("gemma3", note="sliding-window layers, bidirectional image blocks"),
    ModelSpec(
        "gemma3n",
        token_kwargs=(("per_layer_input", -2),),
        streams=True,
        whole=_AUDIO,
        note=f"four streams of hidden states (AltUp), kept or skipped together; {_SHARED}; "
        "per-layer inputs; its tower needs timm",
    ),
    ModelSpec(
        "gemma4",
        since="5.5",
        token_kwargs=(("per_layer_input", -2),),
        whole=_AUDIO,
        note=f"per-layer inputs; {_SHARED}",
    ),
    ModelSpec(
        "gemma4_unified",
        since="5.10",
        whole="the projection of patches, audio tokens",
        note=f"images without a tower; {_SHARED}",
    ),
    ModelSpec("glm46v", note=_MROPE),
    ModelSpec("glm4v", note=_MROPE),
    ModelSpec("glm4v_moe", note=f"{_MROPE}; {_MOE}"),
    ModelSpec("glm_ocr", since="5.1", note=_MROPE),
    ModelSpec("glmga", since="5.10", note=_MROPE),
    ModelSpec("got_ocr2", note="SAM tower"),
    ModelSpec("granite4_vision", since="5.8", note="deepstack features at full size"),
    ModelSpec(
        "granite_docling", since="5.23", layers=_TEXT_MODEL, note="deepstack features at full size"
    ),
    ModelSpec(
        "hunyuan_vl",
        since="5.13",
        note=f"{_MROPE}; in transformers itself they number the images over the whole batch",
    ),
    ModelSpec("hyperclovax_vision_v2", since="5.18", note="Qwen2.5-VL tower"),
    ModelSpec(
        "idefics",
        layers=_PLAIN,
        pruned=_TEXT_ONLY,
        whole="the vision tower, gated cross-attention blocks, which see the image",
    ),
    ModelSpec("idefics2", layers=_TEXT_MODEL, note="perceiver: few tokens an image"),
    ModelSpec("idefics3", layers=_TEXT_MODEL, note="image tiles"),
    ModelSpec("instructblip", **_OPT),
    ModelSpec("instructblipvideo", **_OPT),
    ModelSpec("internvl", note=f"pixel shuffle; {_AS_IMAGES}"),
    ModelSpec("janus", whole="the vision tower, drawing", note="understanding is routed"),
    ModelSpec(
        "kosmos-2",
        layers="text_model.model.layers",
        pre_attention_norm="self_attn_layer_norm",
        type_ids=("image_embeds_position_mask",),
        note=_COUNTS_PADS,
    ),
    ModelSpec(
        "kosmos-2.5",
        layers="text_model.model.layers",
        pre_attention_norm="self_attn_layer_norm",
        type_ids=("image_embeds_position_mask",),
        note=_COUNTS_PADS,
    ),
    ModelSpec("kimi_k25", since="5.13", note=f"latent attention; {_MOE}"),
    ModelSpec(
        "lfm2_vl",
        pre_attention_norm="operator_norm",
        unrouted=_CONV,
        pruned=_ATTENTION,
        whole=_CONVOLUTION,
    ),
    ModelSpec(
        "lfm3_vl",
        since="5.23",
        pre_attention_norm="operator_norm",
        unrouted=_CONV,
        pruned=_ATTENTION,
        whole=_CONVOLUTION,
    ),
    ModelSpec("lighton_ocr", note="Pixtral tower"),
    ModelSpec(
        "llama4",
        layers="language_model.model.layers",
        note=f"{_MOE}; not with transformers 5.24.0, whose own forward of it fails",
    ),
    ModelSpec("llava", note="any Llama-like text model behind the projector"),
    ModelSpec("llava_next", note="image tiles and newlines are vision"),
    ModelSpec("llava_next_video", note="image tiles and newlines are vision"),
    ModelSpec("llava_onevision", note="image tiles and newlines are vision"),
    ModelSpec(
        "minimax_m3_vl",
        since="5.12",
        unrouted=("self_attn.indexer",),
        pruned="the layers of full attention",
        whole="the vision tower, sparse layers (an indexer picks blocks of keys)",
        note=f"{_MOE}; held to the laws in batches of equally long rows: in transformers itself "
        "sparse layers see padding",
    ),
    ModelSpec(
        "minicpm_ocr", since="5.21", unrouted=_LINEAR, pruned=_ATTENTION, whole=_LINEAR_LAYERS
    ),
    ModelSpec(
        "minicpmv4_6", since="5.7", unrouted=_LINEAR, pruned=_ATTENTION, whole=_LINEAR_LAYERS
    ),
    ModelSpec(
        "minicpmv4_7", since="5.18", unrouted=_LINEAR, pruned=_ATTENTION, whole=_LINEAR_LAYERS
    ),
    ModelSpec("mistral3", note="Pixtral tower"),
    ModelSpec("mistral4", since="5.4", layers=_PLAIN, whole="-", note="text only"),
    ModelSpec(
        "mllama",
        unrouted=("cross_attn",),
        pruned=_TEXT_ONLY,
        whole="the vision tower, cross-attention layers, which see the image",
        note="in transformers itself a row without an image sees the blank ones of its batch",
    ),
    ModelSpec("molmo2", since="5.20", note="pooled patches"),
    ModelSpec("muse_glimmer", since="5.15", note=_SLIDING),
    ModelSpec("muse_spark", since="5.20", whole=_AUDIO, note=_SLIDING),
    ModelSpec(
        "nemotron_h_omni",
        since="5.18",
        layers="language_model.model.layers",
        pre_attention_norm="norm",
        key_projection="mixer.k_proj",
        unrouted=("mixer.conv1d", "mixer.experts", "mixer.up_proj"),
        pruned=_ATTENTION,
        whole="the towers, audio tokens, Mamba, expert and MLP layers",
        note="a video's features are given to it: its own forward cannot join them",
    ),
    ModelSpec("ovis2", note="visual words; indicator tokens count as text"),
    ModelSpec("paddleocr_vl", note=_MROPE),
    ModelSpec("paligemma", type_ids=(), note="the prompt sees itself in both directions"),
    ModelSpec("perception_lm", note="its tower needs timm"),
    ModelSpec("pp_chart2table", since="5.4", note="SAM tower"),
    ModelSpec("qianfan_ocr", since="5.6", note="pixel shuffle before the projector"),
    ModelSpec("qwen2_5_omni_thinker", since="5.6", whole=_AUDIO, note=_MROPE),
    ModelSpec("qwen2_5_vl", note=_MROPE),
    ModelSpec("qwen2_vl", note=_MROPE),
    ModelSpec(
        "qwen3_5",
        since="5.2",
        unrouted=_LINEAR,
        pruned=_ATTENTION,
        whole=_LINEAR_LAYERS,
        note=_MROPE,
    ),
    ModelSpec(
        "qwen3_5_moe",
        since="5.2",
        unrouted=_LINEAR,
        pruned=_ATTENTION,
        whole=_LINEAR_LAYERS,
        note=f"{_MROPE}; {_MOE}",
    ),
    ModelSpec("qwen3_omni_moe_thinker", since="5.6", whole=_AUDIO, note=f"{_DEEPSTACK}; {_MOE}"),
    ModelSpec("qwen3_vl", note=_DEEPSTACK),
    ModelSpec("qwen3_vl_moe", note=f"{_DEEPSTACK}; {_MOE}"),
    ModelSpec("shieldgemma2", note="as gemma3"),
    ModelSpec("smolvlm", layers=_TEXT_MODEL, note=f"image tiles; {_AS_IMAGES}"),
    ModelSpec("step3p7", since="5.16", note=_SLIDING),
    ModelSpec("video_llama_3", note="any resolution"),
    ModelSpec("video_llava", note="two towers, one text model"),
    ModelSpec("vipllava", note="features of several tower layers"),
)

_CROSS = "its decoder sees the image through cross-attention from an encoder"
INDEXER = (
    "in every layer a learned indexer, its own or an earlier layer's, picks the keys of each "
    "query, by index keys that DARE does not prune"
)
POOLED_INDEX = (
    "every layer is linear attention, or picks the keys of each query by a learned indexer that "
    "pools neighbouring tokens, whose blocks a pruned token would shift"
)
SHORT_CONVOLUTION = (
    "every layer mixes neighbouring tokens by short convolutions, which a pruned token would shift"
)
REFUSED: dict[str, str] = {
    "blip": _CROSS,
    "diffusion_gemma": "it rewrites a whole canvas by diffusion instead of decoding tokens",
    "evolla": "it reads proteins and no images, through cross-attention adapters in its layers",
    "florence2": _CROSS,
    "git": "its vision tokens are joined in front of the text inside its forward, without ids",
    "glm5_next": POOLED_INDEX,
    "hy_v4_vl": INDEXER,
    "inkling2": SHORT_CONVOLUTION,
    "inkling2_loop": SHORT_CONVOLUTION,
    "inkling_mm_model": SHORT_CONVOLUTION,
    "mistral_large4": INDEXER,
    "pi0": "it generates robot actions by flow matching and no tokens",
    "pix2struct": _CROSS,
    "pp_formulanet": _CROSS,
    "qwen4_exp": POOLED_INDEX,
    "t5gemma2": _CROSS,
    "udop": _CROSS,
    "unlimited_ocr": "its layers keep a cache of their own, a ring over generated tokens",
    "vision-encoder-decoder": _CROSS,
}
"""model_type -> why it cannot be routed."""
