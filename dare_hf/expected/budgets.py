"""Rates at which a configuration costs a given share of the plain model: equal budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from dare_hf.config import DareConfig
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.expected.outlook import outlook_of
from dare_hf.expected.tokens import HopTokens, rows_of
from dare_hf.policies import POLICIES
from dare_hf.routing.retention import NAMED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

TOLERANCE = 0.01
_HALVINGS = 30
_MOVES = {policy.name: policy.moves for policy in POLICIES}


def match_budget(
    model: nn.Module,
    config: DareConfig | str,
    hops: Sequence[HopTokens],
    *,
    target: float,
    of: Literal["flops", "kv"] = "flops",
    moves: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
) -> DareConfig:
    """The configuration at rates that cost `target` of the plain model, from counts alone.

    Args:
        model: The model, weights or not.
        config: What to set the rates of: a DareConfig, or a preset's name.
        hops: The token counts of a prompt and its hops; those of a mean row, say.
        target: Share of the plain model's cost, in (0, 1].
        of: "flops" of the prefill, or "kv", the bytes at the end of the last hop.
        moves: Rates that are set, all to one number; None: what the policy names, else
            ``("vision_retention",)``.
        tolerance: How far from the target the cost may be, as a share of it.

    Returns:
        A copy with those rates; costs are step functions of them, the nearest step is taken.

    Raises:
        DareConfigError: No rate costs that, or the configuration has no rates to set.
        DareInputError: A target outside its range, or no such cost.

    Examples:
        >>> from dare_hf import DareConfig, HopTokens
        >>> from dare_hf.expected import match_budget
        >>> from dare_hf.testing import tiny_model
        >>> prompt = HopTokens(vision=576, text=64)
        >>> model = tiny_model("llava", layers=12)
        >>> config = match_budget(model, DareConfig(), [prompt], target=0.6, of="kv")
        >>> 0.4 < config.vision_retention < 0.7
        True
    """
    if of not in ("flops", "kv") or not 0 < target <= 1:
        raise DareInputError(
            f"target, of: expected a share in (0, 1] of 'flops' or 'kv'; got {target!r} of {of!r}"
        )
    if moves is None:
        moves = _MOVES.get(config, ("vision_retention",)) if isinstance(config, str) else None
    moves = ("vision_retention",) if moves is None else tuple(moves)
    made = DareConfig.preset(config) if isinstance(config, str) else config
    if not moves or made.schedule not in NAMED:
        raise DareConfigError(
            "config: expected one whose cost a rate sets; got "
            f"{config if isinstance(config, str) else f'schedule={made.schedule!r}'}. Choose a "
            "schedule that spreads a rate"
        )
    (row,) = rows_of(hops)[:1]
    row = row if made.image_token_ids != () else [_all_text(hop) for hop in row]

    def cost(rate: float) -> float:
        found = outlook_of(model, replace(made, **dict.fromkeys(moves, rate)), row)
        if of == "flops":
            return found.flops.prefill / found.flops.plain_prefill
        return found.kv[-1][0] / found.kv[-1][1]

    rate, share = _nearest(cost, target)
    if abs(share - target) > tolerance * target:
        raise DareConfigError(
            f"target: expected a share of {of} that this configuration can cost on this model, to "
            f"{tolerance:.2%}; got {target}, and the nearest is {share:.4f}, at {moves[0]}="
            f"{rate:.4g}"
        )
    return replace(made, **dict.fromkeys(moves, rate))


def _nearest(cost: Callable[[float], float], target: float) -> tuple[float, float]:
    """The rate in (0, 1] whose cost, which never falls with it, is nearest to the target."""
    low, high, tried = 0.0, 1.0, [(1.0, cost(1.0))]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried.append((middle, cost(middle)))
        low, high = (middle, high) if tried[-1][1] < target else (low, middle)
        if tried[-1][1] == target:
            break
    return min(tried, key=lambda pair: abs(pair[1] - target))


def _all_text(hop: HopTokens) -> HopTokens:
    """The counts where no token is vision to the configuration."""
    parts = {"forced": None, "pinned": None}
    for name in parts:
        values = [getattr(hop, f"{name}_{kind}") for kind in ("text", "vision")]
        known = [value for value in values if value is not None]
        parts[name] = sum(known) if len(known) == 2 else None
    return replace(
        hop,
        text=hop.text + hop.vision,
        vision=0,
        sampled_text=hop.sampled_text + hop.sampled_vision,
        sampled_vision=0,
        forced_text=parts["forced"],
        forced_vision=None,
        pinned_text=parts["pinned"],
        pinned_vision=None,
    )
