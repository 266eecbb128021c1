"""Decoder-only language models (AutoModelForCausalLM): supported ones and refused ones, as data."""

from __future__ import annotations

from typing import Any

from dare_hf.architectures.spec import ModelSpec
from dare_hf.architectures.supported import INDEXER, POOLED_INDEX, SHORT_CONVOLUTION

_MOE = "mixture of experts"
_LATENT = f"latent attention; {_MOE}"
_SLIDING = "sliding-window layers"
_SINKS = f"{_SLIDING}; attention sinks count in what scores read"
_NOPE = "some layers without RoPE"
_SOFTCAP = "attention soft-capped under eager, which scores follow"
_SHARED = "layers that share another's keys run what that one runs, and store nothing"
_OTHERS = "the self-attention layers"
_MAMBA = "Mamba layers"


def _text(model_type: str, **fields: Any) -> ModelSpec:
    """The spec of a model that sees no images: its type ids, if any, number sentences."""
    usual: dict[str, Any] = {"layers": "model.layers", "type_ids": (), "whole": "-"}
    return ModelSpec(model_type, **usual | fields)


_POST_NORM: dict[str, Any] = {"pre_attention_norm": None}
_LINEAR: dict[str, Any] = {
    "unrouted": ("linear_attn",),
    "pruned": _OTHERS,
    "whole": "linear-attention layers",
}
_DELTA: dict[str, Any] = {**_LINEAR, "unrouted": ("self_attn.conv1d",)}
_HYBRID_MAMBA: dict[str, Any] = {"unrouted": ("mamba",), "pruned": _OTHERS, "whole": _MAMBA}
_CONV: dict[str, Any] = {
    "pre_attention_norm": "operator_norm",
    "unrouted": ("conv",),
    "pruned": _OTHERS,
    "whole": "convolution layers",
}
_GPT2: dict[str, Any] = {
    "layers": "transformer.h",
    "pre_attention_norm": "ln_1",
    "key_projection": "attn.c_attn",
    "note": "learned positions",
}
_FUSED: dict[str, Any] = {"key_projection": "self_attn.qkv_proj"}
_LEARNED: dict[str, Any] = {
    "pre_attention_norm": "self_attn_layer_norm",
    "note": "learned positions",
}

TEXT_SUPPORTED: tuple[ModelSpec, ...] = (
    _text("afmoe", note=f"{_SLIDING}; {_MOE}"),
    _text("apertus", pre_attention_norm="attention_layernorm"),
    _text("apertus1p5_text", since="5.24", pre_attention_norm="attention_layernorm"),
    _text("arcee"),
    _text("aria_text", note=_MOE),
    _text("axk1", since="5.15", note=_LATENT),
    _text("bailing_hybrid", since="5.20", **_DELTA, note=_LATENT),
    _text("bamba", **_HYBRID_MAMBA),
    _text("biogpt", layers="biogpt.layers", **_LEARNED),
    _text("bitnet"),
    _text("cohere", note="attention and MLP side by side"),
    _text("cohere2", note=f"attention and MLP side by side; {_SLIDING}; {_NOPE}"),
    _text("cohere2_moe", since="5.9", note=f"{_SLIDING}; {_MOE}"),
    _text("cohere_compass_text", since="5.16", note=_SLIDING),
    _text("cwm", note=_SLIDING),
    _text("deepseek_v2", note=_LATENT),
    _text("deepseek_v3", note=_LATENT),
    _text("dots1", note=_MOE),
    _text(
        "dots3_note_text",
        since="5.23",
        unrouted=("self_attn.indexer",),
        pruned="the sliding-window layers",
        whole="sparse layers (an indexer picks keys)",
        note=_LATENT,
    ),
    _text("ernie4_5"),
    _text("ernie4_5_moe", note=_MOE),
    _text("exaone", since="5.24"),
    _text("exaone4", **_POST_NORM, note=f"{_SLIDING}; {_NOPE}"),
    _text("exaone_moe", since="5.1", note=f"{_SLIDING}; {_MOE}"),
    _text("flex_olmo", **_POST_NORM, note=_MOE),
    _text("flint", since="5.21", note=_SINKS),
    _text("gemma"),
    _text("gemma2", note=f"{_SLIDING}; {_SOFTCAP}"),
    _text("gemma3_text", note=_SLIDING),
    _text(
        "gemma3n_text",
        token_kwargs=(("per_layer_input", -2),),
        streams=True,
        note=f"four streams of hidden states (AltUp), kept or skipped together; {_SHARED}",
    ),
    _text(
        "gemma4_text",
        since="5.5",
        token_kwargs=(("per_layer_input", -2),),
        note=f"per-layer inputs; {_SHARED}",
    ),
    _text("gemma4_unified_text", since="5.10", note=_SHARED),
    _text("glm"),
    _text("glm4", note="norms before and after attention and MLP"),
    _text("glm4_moe", note=_MOE),
    _text("glm4_moe_lite", note=_LATENT),
    _text("gpt-sw3", **_GPT2),
    _text("gpt2", **_GPT2),
    _text("gpt_oss", note=f"{_SINKS}; {_MOE}"),
    _text("granite", note="multipliers on embeddings, attention, residuals and logits"),
    _text("granite_swa", since="5.15", note=_SINKS),
    _text("granitemoe", note=_MOE),
    _text("granitemoe_swa", since="5.15", note=f"{_SINKS}; {_MOE}"),
    _text("granitemoehybrid", **_HYBRID_MAMBA, note=_MOE),
    _text("granitemoeshared", note=_MOE),
    _text("helium"),
    _text("hunyuan_v1_dense"),
    _text("hunyuan_v1_moe", note=_MOE),
    _text("hy_v3", since="5.6", note=_MOE),
    _text("hyperclovax", since="5.9"),
    _text("internlm3", since="5.23"),
    _text("iquestcoder", since="5.23"),
    _text("jais2"),
    _text("jamba", **_HYBRID_MAMBA, note=_MOE),
    _text(
        "jetmoe",
        key_projection="self_attention.kv_proj",
        note="experts in attention as in the MLP",
    ),
    _text("kimi_linear", since="5.17", **_DELTA, note=_LATENT),
    _text("kolibri1", since="5.20", note=f"{_SLIDING}; {_MOE}"),
    _text("laguna", since="5.7", note=f"{_SLIDING}; {_MOE}"),
    _text("lara_mini", since="5.24", **_LINEAR, note=f"{_SLIDING}; {_MOE}"),
    _text("lfm2", **_CONV),
    _text("lfm2_moe", **_CONV, note=_MOE),
    _text("lfm3", since="5.23", **_CONV, note=_SLIDING),
    _text("llama"),
    _text("llama4_text", note=f"chunked attention; {_NOPE}; {_MOE}"),
    _text("mellum", since="5.11", note=f"{_SLIDING}; {_MOE}"),
    _text("mimo_v2_flash", since="5.13", note=f"{_SINKS}, with key heads of their own; {_MOE}"),
    _text("minicpm3", since="5.13", note="latent attention"),
    _text("minimax_m2", note=_MOE),
    _text(
        "minimax_m3_vl_text",
        since="5.12",
        unrouted=("self_attn.indexer",),
        pruned="the layers of full attention",
        whole="sparse layers (an indexer picks blocks of keys)",
        note=f"{_MOE}; held to the laws in batches of equally long rows: in transformers itself "
        "sparse layers see padding",
    ),
    _text("ministral", note=_SLIDING),
    _text("ministral3", note="query scale by position"),
    _text("mistral", note=_SLIDING),
    _text("mixtral", note=f"{_SLIDING}; {_MOE}"),
    _text(
        "modernbert-decoder",
        pre_attention_norm="attn_norm",
        key_projection="attn.k_proj",
        note=_SLIDING,
    ),
    _text("nanochat"),
    _text("nemotron"),
    _text(
        "nemotron_h",
        since="5.3",
        pre_attention_norm="norm",
        key_projection="mixer.k_proj",
        unrouted=("mixer.conv1d", "mixer.experts", "mixer.up_proj"),
        pruned=_OTHERS,
        whole="Mamba, expert and MLP layers",
    ),
    _text("olmo"),
    _text("olmo2", **_POST_NORM),
    _text("olmo3", **_POST_NORM, note=_SLIDING),
    _text("olmo_hybrid", since="5.3", **_LINEAR, **_POST_NORM),
    _text("olmoe", note=_MOE),
    _text("opt", layers="model.decoder.layers", **_LEARNED),
    _text("persimmon"),
    _text("phi", note="attention and MLP side by side"),
    _text("phi3", **_FUSED, note=_SLIDING),
    _text("phimoe", note=_MOE),
    _text("qwen2", note=_SLIDING),
    _text("qwen2_moe", note=_MOE),
    _text("qwen3", note=_SLIDING),
    _text("qwen3_5_moe_text", since="5.2", **_LINEAR, note=_MOE),
    _text("qwen3_5_text", since="5.2", **_LINEAR),
    _text("qwen3_moe", note=_MOE),
    _text("qwen3_next", **_LINEAR, note=_MOE),
    _text("sarvam_mla", since="5.24", note=_LATENT),
    _text("sarvam_moe", since="5.24", note=_MOE),
    _text("seed_oss"),
    _text("smollm3", note=_NOPE),
    _text("solar_open", note=_MOE),
    _text("stablelm", note="attention and MLP side by side"),
    _text("starcoder2", note=_SLIDING),
    _text("vaultgemma", note=f"{_SLIDING}; {_SOFTCAP}"),
    _text("youtu", since="5.1", note="latent attention"),
)

_REFUSED: tuple[tuple[str, str], ...] = (
    (INDEXER, "axk2 deepseek_v32 glm_moe_dsa hy_v4"),
    (POOLED_INDEX, "qwen4_exp_text"),
    (SHORT_CONVOLUTION, "inkling2_loop_text inkling2_text inkling_text zaya"),
    (
        "it is an encoder with a language-model head, and no decoder-only model",
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
        "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
    ),
    (
        "it is the decoder of an encoder-decoder model, with cross-attention in its layers, and no "
        "decoder-only model",
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
        "prophetnet trocr whisper",
    ),
    (
        "its layers have no self-attention, so there are no keys to leave out",
        "falcon_mamba mamba mamba2 rwkv xlstm",
    ),
    (
        "its attention is a function of its own, not transformers' attention interface, so that "
        "scores cannot read it",
        "codegen cpmant falcon gpt_neo gptj xglm xlm",
    ),
    ("it keeps no cache of transformers' kind", "openai-gpt reformer xlnet"),
    (
        "its layers take the cache by a name of their own (layer_past)",
        "ctrl gpt_bigcode gpt_neox gpt_neox_japanese",
    ),
    (
        "its position bias (ALiBi) is made for all columns at once, outside its layers",
        "bloom mpt",
    ),
    (
        "it writes or reads audio beside text, with a model of its own",
        "moshi moss_transcribe_diarize musicgen musicgen_melody",
    ),
    ("it runs the same layers several times in one forward", "dory hrm_text"),
    (
        "it drafts for another model and reads that one's keys",
        "gemma4_assistant gemma4_unified_assistant",
    ),
    ("one attention block is shared by several of its layers", "zamba zamba2"),
    ("its layers take a scale of the queries by position in a form that is not gathered", "beam"),
    ("it groups bytes to patches and runs three stacks of layers over them", "blt"),
    ("its attention stands in a block of its own together with the norms around it", "dbrx"),
    ("its attention reads keys that are compressed over blocks of tokens", "deepseek_v4"),
    ("its layers attend twice and subtract: scores would read every query twice", "diffllama"),
    (
        "its attention picks the best keys among those it sees: other ones where some are gone",
        "doge",
    ),
    (
        "every layer runs attention and a state-space model side by side, whose state a pruned "
        "token would miss",
        "falcon_h1",
    ),
    ("every layer has two self-attentions", "longcat_flash"),
    ("it keeps a cache of its own and refuses every other", "minimax"),
    (
        "its images and sounds are joined in its embedding, and it was not held to the laws with "
        "them",
        "phi4_multimodal",
    ),
    ("its recurrent layers keep their state in themselves, not in the cache", "recurrent_gemma"),
)
TEXT_REFUSED: dict[str, str] = {name: why for why, names in _REFUSED for name in names.split()}
"""model_type -> why it cannot be routed."""
