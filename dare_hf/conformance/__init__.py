"""Does every architecture keep the laws? Tiny random models, one row each."""

from dare_hf.conformance.runner import Kind, Row, architectures, run_all, run_row

__all__ = ["Kind", "Row", "architectures", "run_all", "run_row"]
