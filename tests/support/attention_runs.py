"""Text models under a given attention implementation."""

import contextlib

import pytest
from torch.nn.attention import flex_attention as torch_flex
from transformers import masking_utils
from transformers.integrations import flex_attention as flex_glue


@contextlib.contextmanager
def text_attention(model, implementation: str):
    """Let the text model alone use another attention."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        yield model
    finally:
        config._attn_implementation = before


@pytest.fixture
def flex(monkeypatch):
    """Let flex attention run uncompiled: its block masks as they are, without a compiler."""

    class Uncompiled:
        def __init__(self, training):
            pass

        def __call__(self):
            return torch_flex.flex_attention

    def block_mask(*args, _compile=False, **kwargs):
        return torch_flex.create_block_mask(*args, **kwargs)

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_glue, "WrappedFlexAttention", Uncompiled)
    monkeypatch.setattr(masking_utils, "create_block_mask", block_mask)
