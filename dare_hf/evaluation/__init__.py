"""Measuring runs on tasks, and comparing runs over the same items."""

from dare_hf.evaluation.arm import Arm, trained_arm
from dare_hf.evaluation.measurement import Measurement, measure
from dare_hf.evaluation.paired import Paired, compare_paired

__all__ = ["Arm", "Measurement", "Paired", "compare_paired", "measure", "trained_arm"]
