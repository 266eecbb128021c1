"""Tools for testing: tiny models with sharp weights, their inputs, the masked oracle."""

from dare_hf.testing.hop_oracle import HopRules, HopRun, hop_forward, token_hops
from dare_hf.testing.inputs import TINY_TEXT_TOKENS, collate, tiny_inputs, tiny_rows
from dare_hf.testing.models import TINY_MODELS, tiny_model
from dare_hf.testing.oracle import (
    OracleRouting,
    OracleRun,
    decoder_layers,
    masked_forward,
    modality_of,
    oracle_forward,
    written_inputs,
)

__all__ = [
    "TINY_MODELS",
    "TINY_TEXT_TOKENS",
    "HopRules",
    "HopRun",
    "OracleRouting",
    "OracleRun",
    "collate",
    "decoder_layers",
    "hop_forward",
    "masked_forward",
    "modality_of",
    "oracle_forward",
    "tiny_inputs",
    "tiny_model",
    "tiny_rows",
    "token_hops",
    "written_inputs",
]
