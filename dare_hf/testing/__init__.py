"""Tools for testing: tiny models with sharp weights, their inputs, the masked oracle."""

from dare_hf.testing.inputs import TINY_TEXT_TOKENS, collate, tiny_inputs, tiny_rows
from dare_hf.testing.models import TINY_MODELS, tiny_model

__all__ = [
    "TINY_MODELS",
    "TINY_TEXT_TOKENS",
    "collate",
    "tiny_inputs",
    "tiny_model",
    "tiny_rows",
]
