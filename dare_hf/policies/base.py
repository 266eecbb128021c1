"""What a policy is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Policy:
    """A way to prune that others have published, said in fields of DareConfig.

    Attributes:
        name: Its name as a preset.
        fields: What of DareConfig makes it; the rates are those of its paper where it names any.
        moves: The rates that a budget is met by; the others stay as they are.
        simplified: How it differs from what it is named for.
    """

    name: str
    fields: dict[str, Any]
    simplified: str
    moves: tuple[str, ...] = ("vision_retention",)


# One decision for a whole stage, on what the stage before has left; forced tokens and shares that
# this library adds are left out.
ONE_CUT: dict[str, Any] = {
    "pruned": "drop",
    "text_retention": 1.0,
    "plan_every": 1024,
    "prefix_tokens": 0,
    "uniform_share": 0.0,
}
# Hops, which these have none of, are thinned by what their last queries attend to.
OBSERVED: dict[str, Any] = {"hop_score": "observed", "hop_budget": "per_hop"}
