"""Pure maths of routing: how many tokens, which ones, by what score."""

from dare_hf.routing.kinds import PAD, TEXT, VISION

__all__ = ["PAD", "TEXT", "VISION"]
