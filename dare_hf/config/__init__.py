"""What a user asks of routing, checked when it is said."""

from dare_hf.config.dare_config import DareConfig

__all__ = ["DareConfig"]
