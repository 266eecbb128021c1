"""A running generate, and who counts it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dare_hf.forward.generation_call import GenerationCall

if TYPE_CHECKING:
    from dare_hf.engine.recorder import Recorder


@dataclass
class CountedCall(GenerationCall):
    """One running `generate` with its bookkeeping.

    Attributes:
        recorder: Who counts this call; made by its first forward.
        other: Who counted the newest forward of another sequence inside it.
        started: When it began, by time.perf_counter.
    """

    recorder: Recorder | None = None
    other: Recorder | None = None
    started: float = field(default_factory=time.perf_counter)
