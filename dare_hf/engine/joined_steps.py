"""Decode steps in which nothing is decided, counted together."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dare_hf.cache import DareCache
    from dare_hf.engine.compact_run import CompactRun
    from dare_hf.forward.facts import ForwardContext


@dataclass
class Steps:
    """Steps that follow one another over a cache to which nothing else happens.

    Attributes:
        cache: The cache.
        changes: Its count of other changes.
        past: Logical columns before the first step.
        head_rows: Hidden states that reach the lm_head in each.
        kept: [rows] real tokens before the first step, by the index of each layer that runs.
        count: How many.
    """

    cache: weakref.ref[DareCache]
    changes: int
    past: int
    head_rows: int
    kept: dict[int, list[int]]
    count: int = 0

    @classmethod
    def begun(cls, context: ForwardContext) -> Steps:
        """None yet; `context` is that of the first, whose layers have run."""
        cache, past = context.cache, context.past
        assert cache is not None
        ran = {i: slot for i, slot in enumerate(cache.stored) if slot.seen > past}
        kept = {i: [n - 1 for n in slot.kept_host] for i, slot in ran.items()}
        return cls(weakref.ref(cache), cache.changes, past, context.head_rows, kept)

    def goes_on(self, context: ForwardContext) -> bool:
        """Whether the next step is that of `context`."""
        cache = context.cache
        if cache is None or self.cache() is not cache or self.changes != cache.changes:
            return False
        return self.past + self.count == context.past and self.head_rows == context.head_rows


def plan_quick_layers(run: CompactRun) -> None:
    """Say of layers that needed no plan in a step in which others did what they ran."""
    context = run.context
    stored = [] if context.cache is None else context.cache.stored
    for i, slot in enumerate(stored):
        if i not in run.plans and slot.seen > context.past:
            run.plans[i] = run.keep_all
            run.cached_before[i] = [n - 1 for n in slot.kept_host]
