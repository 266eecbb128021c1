"""A checkpoint of the user's as the subject: its own picture and prompt, its tower timed too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dare_hf.benchmark.random_llava import CLOCKS
from dare_hf.benchmark.systems import Subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from dare_hf.benchmark.random_llava import Setting

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")


def checkpoint_subject(
    name: str, model: Any, encode: Callable[[int], dict[str, Any]], setting: Setting
) -> Subject:
    """A loaded model with its prompt; the attention scorer, which needs no training.

    Args:
        name: What the JSON calls it.
        model: Where and how it is to run. Its generate will not stop before its last token.
        encode: From a number of rows to the arguments of generate, pixels included.
        setting: Says which clock.
    """
    model.generation_config.eos_token_id = None
    ids = {getattr(model.config, field, None) for field in _PLACEHOLDERS}
    return Subject(
        model=model,
        inputs=lambda setting: encode(setting.batch),
        options={"suppress_tokens": sorted(one for one in ids if one is not None) or None},
        scorer="attention",
        score=None,
        facts={"model": name, "parameters": sum(p.numel() for p in model.parameters())},
        clock=CLOCKS[setting.clock],
    )


def setting_of(model: Any, setting: Setting) -> Setting:
    """The setting with the sizes that the model has."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    return replace(
        setting,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        attn=text._attn_implementation,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 0),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        kv_heads=getattr(text, "num_key_value_heads", heads),
        vocab=text.vocab_size,
    )
