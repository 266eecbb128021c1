"""A user's own rows: what pruning costs on them, and the smallest budget that keeps the answers."""

from dare_hf.tuning.answers import Metric
from dare_hf.tuning.checking import Check, check
from dare_hf.tuning.result import TuneResult
from dare_hf.tuning.row_eval import evaluate_rows
from dare_hf.tuning.rows import Row, read_rows
from dare_hf.tuning.tuner import tune

__all__ = ["Check", "Metric", "Row", "TuneResult", "check", "evaluate_rows", "read_rows", "tune"]
