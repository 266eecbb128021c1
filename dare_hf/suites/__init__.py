"""Published benchmarks as rows: read from the files they come in, asked and scored as they say."""

from dare_hf.suites.base import Item, Scoring, Suite
from dare_hf.suites.evaluate import SUITES, evaluate_suite, named_suite

__all__ = ["SUITES", "Item", "Scoring", "Suite", "evaluate_suite", "named_suite"]
