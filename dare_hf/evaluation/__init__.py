"""Comparing runs over the same items."""

from dare_hf.evaluation.paired import Paired, compare_paired

__all__ = ["Paired", "compare_paired"]
