"""A forward of the compact path: by which settings its layers run, and what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from dare_hf.forward.plan import Plan
from dare_hf.forward.run import Run

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from torch import Tensor

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.engine.configured import InUse
    from dare_hf.forward.generation_call import GenerationCall
    from dare_hf.hops.in_forward import InnerHops
    from dare_hf.routing.selection import Competitors

_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class KeyView:
    """The keys one layer attends to, for the layers that read them too.

    Attributes:
        columns: Long[B|1, C] logical position of each key, -1 for holes; the new ones last.
        cached: How many of them were stored before this forward.
        holes: Whether some are -1.
        gathered: Whether HF's logical mask does not fit them.
    """

    columns: Tensor
    cached: int
    holes: bool
    gathered: bool


@dataclass(eq=False, kw_only=True)
class CompactRun(Run):
    """One forward in which only those tokens run a layer that its plan names.

    Attributes:
        routing: The settings it runs by, whatever becomes of the model's meanwhile.
        anatomy: Where the model's layers are.
        exempt: Layers that keep everything, and from how many columns on.
        call: The generate it is a step of, None for a bare forward.
        whole: Whether every layer keeps everything, whatever its rate.
        inner_hops: The hops that begin inside it, None where none does.
        keys: What other layers read of a layer's keys, by its index.
        cached_before: Per layer the real tokens per row its cache held before.
        competitors: Who takes part in the selections of the span, once a layer has selected.
        never_skips: Bool[B, S] tokens that skip no layer, once a layer has asked (routed decode).
        step: Whether it only brings every row's next token, and nothing is decided in it.
        hides_pads_only: Of a step, whether its mask is known to hide nothing but pads.
    """

    routing: InUse
    anatomy: Anatomy
    exempt: Mapping[int, int]
    call: GenerationCall | None = None
    whole: bool = False
    inner_hops: InnerHops | None = None
    keys: dict[int, KeyView] = field(default_factory=dict)
    cached_before: dict[int, list[int]] = field(default_factory=dict)
    competitors: Competitors | None = None
    never_skips: Tensor | None = None
    step: bool = False
    hides_pads_only: bool = False

    def __post_init__(self) -> None:
        self.config, self.table = self.routing.settings.config, self.routing.settings.table
        self.scorer, self.planner = self.routing.settings.scorer, self.routing.planner
        self.multiplies, self.freezes = self.config.multiplies, self.config.freezes

    @cached_property
    def keep_all(self) -> Plan:
        """The plan under which every real token runs; one for all layers."""
        context = self.context
        counts = [list(c) for c in context.counts]
        return Plan(kept=counts, width=context.length, live=context.valid)

    @cached_property
    def budgets(self) -> list[list[list[int]]]:
        """[layers][rows][text, vision] tokens of the span, before forced ones and survivors."""
        layers = range(len(self.table.plan_layers))
        return [self.planner.budgets(self.context, layer) for layer in layers]

    # What outlives the forward, for hops that close later

    @cached_property
    def hops_may_close(self) -> bool:
        """Whether a hop may close after it, or a cap take tokens."""
        later = self.routing.settings.rules.closes_hops or self.call is None or self.call.continues
        return later or self.config.max_kv_tokens is not None

    @cached_property
    def stores_scores(self) -> Set[int]:
        """Layers whose scores of the span are stored."""
        return self.routing.stores_scores if self.hops_may_close else _NONE

    @cached_property
    def keeps_queries(self) -> Set[int]:
        """Layers that remember their last queries."""
        return self.routing.keeps_queries if self.hops_may_close else _NONE

    @cached_property
    def scores_later(self) -> Set[int]:
        """Layers whose sampled tokens get a score when their hop closes."""
        return self.routing.scores_later if self.hops_may_close else _NONE

    # What a layer asks

    @cached_property
    def keeps_all(self) -> Set[int]:
        """Layers that keep everything whatever their rates, at the length reached so far."""
        if self.whole:
            return set(range(len(self.anatomy.layers)))
        length = self.context.past + self.context.length
        return {layer for layer, least in self.exempt.items() if length >= least}

    @cached_property
    def skippable(self) -> Set[int]:
        """Layers that sampled tokens may skip; the last layer none does."""
        if not self.routing.skips or not any(self.context.sampled):
            return _NONE
        return set(range(len(self.anatomy.layers) - 1)) - set(self.keeps_all)

    def plan_before(self, layer: int) -> Plan | None:
        """The last plan before `layer` of one that could choose: others bring nothing back."""
        while layer - 1 in self.keeps_all:
            layer -= 1
        return self.plans.get(layer - 1)

    def captures(self, layer: int) -> bool:
        """Whether the attention of `layer` is needed to score the layer after it."""
        after = layer + 1
        if not self.scorer.needs_attention or self.context.span is None or self.whole:
            return False
        if after >= len(self.anatomy.layers) or self.table.plan_layers[after] != after:
            return False
        if after in self.stores_scores:
            return True
        return bool(self.planner.prunes(self, after, self.plan_before(after)))
