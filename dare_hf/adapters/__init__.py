"""Which models can be routed, and where their decoder layers are: architectures as data."""

from dare_hf.adapters.registry import SPECS, Anatomy, describe, find_spec, locate
from dare_hf.adapters.spec import ModelSpec

__all__ = ["SPECS", "Anatomy", "ModelSpec", "describe", "find_spec", "locate"]
