"""What a run computed and stored, beside what it would have without pruning."""

from dare_hf.report.report import DareReport

__all__ = ["DareReport"]
