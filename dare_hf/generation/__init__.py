"""Generation beyond plain text: interleaved images and injected thoughts."""

from dare_hf.generation.hop_loop import HopLoop
from dare_hf.generation.hop_types import HopInput, HopState

__all__ = ["HopInput", "HopLoop", "HopState"]
