"""What a configuration will cost, before any run: bytes and FLOPs from rates and counts alone."""

from dare_hf.expected.budgets import match_budget
from dare_hf.expected.kv_bytes import ExpectedBytes, expected_kv_bytes
from dare_hf.expected.outlook import Outlook, outlook_of
from dare_hf.expected.tokens import HopTokens

__all__ = [
    "ExpectedBytes",
    "HopTokens",
    "Outlook",
    "expected_kv_bytes",
    "match_budget",
    "outlook_of",
]
