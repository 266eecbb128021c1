"""The architectures of transformers, one line of data each: supported ones and refused ones."""

from __future__ import annotations

from dare_hf.adapters.spec import ModelSpec

_TEXT_MODEL = "model.text_model.layers"
_PLAIN = "model.layers"
_MOE = "mixture of experts"
_MROPE = "multimodal RoPE: kept tokens keep their 3-D positions"
_DEEPSTACK = f"{_MROPE}; deepstack features reach every layer at full size"
_SLIDING = "sliding-window layers, windows over logical positions"

_HYBRID = "linear-attention layers run every token, attention layers are routed"
_LINEAR = ("linear_attn",)
_CONV = ("conv",)

SUPPORTED: tuple[ModelSpec, ...] = (
    ModelSpec("aria", note=_MOE),
    ModelSpec("aya_vision", note=_SLIDING),
    ModelSpec(
        "chameleon",
        layers=_PLAIN,
        vocabulary_images=True,
        note="images are ids of the vocabulary",
    ),
    ModelSpec("cohere2_vision", note=_SLIDING),
    ModelSpec("cohere_compass", note=_DEEPSTACK),
    ModelSpec("cosmos3_edge", note=_MROPE),
    ModelSpec("cosmos3_omni", note=_DEEPSTACK),
    ModelSpec("deepseek_ocr2", note=_MOE),
    ModelSpec("deepseek_vl", note="any Llama-like text model"),
    ModelSpec("deepseek_vl_hybrid", note="two towers, one text model"),
    ModelSpec("emu3", layers=_TEXT_MODEL, vocabulary_images=True, note="images are ids"),
    ModelSpec(
        "ernie4_5_vl_moe", token_kwargs=(("moe_mm_token_type_ids", -1),), note=f"{_MROPE}; {_MOE}"
    ),
    ModelSpec("exaone4_5", pre_attention_norm=None, note=_SLIDING),
    ModelSpec("fast_vlm", note="a convolutional tower (timm)"),
    ModelSpec("fuyu", key_projection="self_attn.query_key_value", note="patches without a tower"),
    ModelSpec("gemma3", note="sliding-window layers, bidirectional image blocks"),
    ModelSpec("gemma4", token_kwargs=(("per_layer_input", -2),), note="per-layer inputs"),
    ModelSpec("gemma4_unified", note="images without a tower"),
    ModelSpec("glm46v", note=_MROPE),
    ModelSpec("glm4v", note=_MROPE),
    ModelSpec("glm4v_moe", note=f"{_MROPE}; {_MOE}"),
    ModelSpec("glm_ocr", note=_MROPE),
    ModelSpec("glmga", note=_MROPE),
    ModelSpec("got_ocr2", note=""),
    ModelSpec("granite4_vision", note="deepstack features at full size"),
    ModelSpec("granite_docling", layers=_TEXT_MODEL, note="deepstack features at full size"),
    ModelSpec("hunyuan_vl", note=_MROPE),
    ModelSpec("hyperclovax_vision_v2"),
    ModelSpec("idefics2", layers=_TEXT_MODEL),
    ModelSpec("idefics3", layers=_TEXT_MODEL),
    ModelSpec("internvl"),
    ModelSpec("janus", note="understanding; drawing is not routed"),
    ModelSpec("kimi_k25", key_projection="self_attn.kv_b_proj", note=f"latent attention; {_MOE}"),
    ModelSpec(
        "lfm2_vl",
        pre_attention_norm="operator_norm",
        unrouted=_CONV,
        note="convolution layers run every token",
    ),
    ModelSpec(
        "lfm3_vl",
        pre_attention_norm="operator_norm",
        unrouted=_CONV,
        note="convolution layers run every token",
    ),
    ModelSpec("lighton_ocr"),
    ModelSpec("llama4", layers="language_model.model.layers", note=_MOE),
    ModelSpec("llava", note="any Llama-like text model behind the projector"),
    ModelSpec("llava_next"),
    ModelSpec("llava_next_video"),
    ModelSpec("llava_onevision"),
    ModelSpec("minimax_m3_vl", note=_MOE),
    ModelSpec("minicpm_ocr", unrouted=_LINEAR, note=_HYBRID),
    ModelSpec("minicpmv4_6", unrouted=_LINEAR, note=_HYBRID),
    ModelSpec("minicpmv4_7", unrouted=_LINEAR, note=_HYBRID),
    ModelSpec("mistral3"),
    ModelSpec("mistral4", layers=_PLAIN, key_projection="self_attn.kv_b_proj", note="text only"),
    ModelSpec(
        "mllama",
        unrouted=("cross_attn",),
        note="images stay in the cross-attention layers; text is routed",
    ),
    ModelSpec("molmo2"),
    ModelSpec("muse_glimmer", note=_SLIDING),
    ModelSpec("muse_spark", note=_SLIDING),
    ModelSpec("ovis2"),
    ModelSpec("paddleocr_vl", note=_MROPE),
    ModelSpec("paligemma", type_ids=(), note="the prompt sees itself in both directions"),
    ModelSpec("perception_lm", note="a timm tower"),
    ModelSpec("pp_chart2table"),
    ModelSpec("qianfan_ocr"),
    ModelSpec("qwen2_5_omni_thinker", note=_MROPE),
    ModelSpec("qwen2_5_vl", note="multimodal RoPE; images and videos"),
    ModelSpec("qwen2_vl", note=_MROPE),
    ModelSpec("qwen3_5", unrouted=_LINEAR, note=f"{_MROPE}; {_HYBRID}"),
    ModelSpec("qwen3_5_moe", unrouted=_LINEAR, note=f"{_MROPE}; {_HYBRID}; {_MOE}"),
    ModelSpec("qwen3_omni_moe_thinker", note=f"{_DEEPSTACK}; {_MOE}"),
    ModelSpec("qwen3_vl", note=_DEEPSTACK),
    ModelSpec("qwen3_vl_moe", note=f"{_DEEPSTACK}; {_MOE}"),
    ModelSpec("shieldgemma2", note="as gemma3"),
    ModelSpec("smolvlm", layers=_TEXT_MODEL),
    ModelSpec("step3p7", note=_SLIDING),
    ModelSpec("video_llama_3"),
    ModelSpec("video_llava"),
    ModelSpec("vipllava"),
)

_CROSS = "an encoder-decoder: the decoder sees the image through cross-attention"
_INDEXER = "a learned indexer picks the keys of each query, and its own cache cannot hold gaps"
REFUSED: dict[str, str] = {
    "blip": f"{_CROSS} only, there are no vision tokens to prune",
    "florence2": f"{_CROSS} only, there are no vision tokens to prune",
    "pix2struct": _CROSS,
    "udop": _CROSS,
    "t5gemma2": _CROSS,
    "pp_formulanet": _CROSS,
    "vision-encoder-decoder": _CROSS,
    "evolla": "a protein model: it sees no images, and every layer has a cross-attention adapter",
    "git": "its generate passes no vision tokens by id, they are joined in front of the text",
    "diffusion_gemma": "a diffusion model: it rewrites a whole canvas instead of decoding tokens",
    "pi0": "a flow model of robot actions: it generates no tokens",
}
