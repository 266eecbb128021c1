"""Checkpoints of the papers' models, written anew as folders that transformers loads."""

from dare_hf.convert.anole import convert_anole
from dare_hf.convert.volcano import convert_volcano

__all__ = ["convert_anole", "convert_volcano"]
