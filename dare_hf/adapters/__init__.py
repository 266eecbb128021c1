"""Which models can be routed, and where their decoder layers are: architectures as data."""

from dare_hf.adapters.architectures import REFUSED
from dare_hf.adapters.registry import SPECS, Anatomy, attention_of, describe, find_spec, locate
from dare_hf.adapters.spec import ModelSpec

__all__ = [
    "REFUSED",
    "SPECS",
    "Anatomy",
    "ModelSpec",
    "attention_of",
    "describe",
    "find_spec",
    "locate",
]
