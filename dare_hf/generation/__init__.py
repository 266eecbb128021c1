"""Generation beyond plain text: interleaved images and injected thoughts."""

from dare_hf.generation.box_refocus import BoxRefocus, RefocusCounts
from dare_hf.generation.boxes import crop_pixels
from dare_hf.generation.hop_loop import HopLoop
from dare_hf.generation.hop_types import HopInput, HopPrompt, HopState

__all__ = [
    "BoxRefocus",
    "HopInput",
    "HopLoop",
    "HopPrompt",
    "HopState",
    "RefocusCounts",
    "crop_pixels",
]
