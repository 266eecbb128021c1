"""A running generate, as the forwards inside it see it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.engine.recorder import Recorder


@dataclass
class GenerationCall:
    """One running `generate`: what tells sampled tokens from the prompt.

    Attributes:
        prompt_length: Logical columns before the first sampled token, carried ones included.
        start: Logical columns the cache held when generate began (a carried chat turn).
        modality_mask: The caller's explicit mask over the prompt, or None.
        continues: Whether the caller can go on with the cache afterwards.
        recorder: Who counts this call; made by its first forward.
        started: When it began, by time.perf_counter.
        injecting: Whether the running forward brings injected columns: a span, whatever follows.
    """

    prompt_length: int
    start: int
    modality_mask: Tensor | None = None
    continues: bool = False
    recorder: Recorder | None = None
    started: float = field(default_factory=time.perf_counter)
    injecting: bool = False
