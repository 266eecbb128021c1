"""Opening a training forward: when one is simulated, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache import TokenLog
from dare_hf.compat import CACHE
from dare_hf.errors import DareInputError
from dare_hf.forward.facts import ForwardContext
from dare_hf.forward.inputs import padding_of
from dare_hf.forward.modality import resolve_span
from dare_hf.forward.token_rules import forced_of
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.selection import isin_ids
from dare_hf.simulation.layout import Layout, read_layout
from dare_hf.simulation.simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dare_hf.forward.token_rules import TokenRules
    from dare_hf.simulation.setup import Setup


def open_simulation(arguments: Mapping[str, Any], setup: Setup) -> Simulation | None:
    """A training forward; None where the compact path serves.

    A forward with labels or hop ids is a simulation where routers are active. Without routers the
    compact path computes the same values faster, but for hop ids and injected spans.

    Args:
        arguments: The model forward's keyword arguments by name.
        setup: What it would be simulated by.

    Raises:
        DareInputError: The arguments cannot be simulated.
    """
    labels, hop_ids = arguments.get("labels"), arguments.get("hop_ids")
    if labels is None and hop_ids is None:
        return None
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    source = ids if ids is not None else embeds
    if source is None:
        raise DareInputError("expected input_ids or inputs_embeds; got neither")
    cache = arguments.get(CACHE)
    if cache is not None and cache.get_seq_length():
        if setup.routers is None and hop_ids is None:
            return None
        raise DareInputError(
            f"{CACHE}: expected none beside labels or hop_ids, which describe whole "
            f"sequences; got a cache of {cache.get_seq_length()} tokens. Leave it out"
        )
    batch, length = source.shape[:2]
    valid = padding_of(arguments, batch, length, 0, source.device)
    real = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
    layout = read_layout(ids, labels, hop_ids, real, setup.rules)
    compact = setup.routers is None and hop_ids is None and not layout.injects
    _check_length(setup, length, layout, compact=compact)
    if compact:
        return None
    _check(setup, batch)
    context = _context(arguments, source, valid, layout, setup.rules)
    log = TokenLog()
    log.append(context.modality, context.token_hop, context.always)
    return Simulation(context, log, setup, _noise(setup))


def _check_length(setup: Setup, length: int, layout: Layout, *, compact: bool) -> None:
    """Refuse a length from which on layers keep everything, which only step-by-step runs know.

    One forward over a whole sequence cannot tell what its prompt alone would have been: only where
    that is as long does the compact path do the same.
    """
    least = min((n for n in setup.exempt.values() if n), default=length + 1)
    prompts = (~layout.sampled).int().cumprod(1).sum(1)
    if length < least or (compact and int(prompts.min()) >= least):
        return
    raise DareInputError(
        f"labels, hop_ids: expected fewer than {least} tokens a row, since from there on layers of "
        "this model keep everything (their attention scales a query by its place among those it is "
        f"given), which one forward over all hops does not follow; got {length}. Shorten the rows, "
        "or run this forward inside `with dare_disabled(model)`"
    )


def _check(setup: Setup, batch: int) -> None:
    config, implementation = setup.config, setup.implementation
    if setup.scorer.stepwise:
        raise DareInputError(
            f"scorer: expected another one than {config.scorer!r} for hop_ids, and for labels with "
            "-100 after the first supervised token (injected spans): its scores come from "
            "step-by-step attention. Use scorer='router' with an adapter, or 'key_norm'; or run "
            "this forward inside `with dare_disabled(model)`"
        )
    if config.resolved_hop_score == "observed":
        raise DareInputError(
            "hop_score: expected 'stored' in a training forward, whose scores have gradients; got "
            "'observed'. Set hop_score='stored'"
        )
    if config.batch_budget == "equal" and batch > 1:
        raise DareInputError(
            "batch_budget: expected 'row' in a training forward of several rows; got 'equal', "
            "under which a row depends on its batch. Set batch_budget='row'"
        )
    if not implementation.endswith(("sdpa", "eager")):
        raise DareInputError(
            "attn_implementation: expected 'sdpa' or 'eager' in a training forward, whose mask "
            f"carries gradients; got {implementation!r}. Load the model with "
            "attn_implementation='sdpa'"
        )


def _context(
    arguments: Mapping[str, Any],
    source: Tensor,
    valid: Tensor | None,
    layout: Layout,
    rules: TokenRules,
) -> ForwardContext:
    ids: Any = arguments.get("input_ids")
    batch, length = source.shape[:2]
    device = source.device
    sampled, hop = layout.sampled.to(device), layout.hop.to(device)
    vision = resolve_span(arguments, rules.vision_ids, rules.type_ids, length)
    if ids is not None:  # sampled tokens are what their ids say, as in generate
        vision = torch.where(sampled, isin_ids(ids, rules.vision_ids), vision.to(device))
    modality = torch.where(vision, VISION, TEXT).to(torch.int8)
    if valid is not None:
        modality = modality.masked_fill(~valid, PAD)
    span = (modality != PAD) & ~sampled
    forced = torch.zeros_like(span)
    for index in range(int(layout.hop.max()) + 1):
        forced = forced | forced_of(modality, span & (hop == index), ids, rules)
    always = isin_ids(ids, rules.keep_ids) if ids is not None and rules.keep_ids else None
    nothing = [[0, 0] for _ in range(batch)]
    return ForwardContext(
        batch=batch,
        length=length,
        past=0,
        cache=None,
        modality=modality,
        token_hop=hop,
        valid=valid,
        span=span,
        forced=forced,
        always=always,
        span_hop=[0] * batch,
        counts=nothing,
        forced_counts=nothing,
        sampled=layout.sampled.sum(1).tolist(),
        closing=[[] for _ in range(batch)],
        head_rows=batch * length,
    )


def _noise(setup: Setup) -> torch.Generator | None:
    """A generator for the Gumbel selector in training, seeded by torch's own CPU generator."""
    gumbel = setup.config.selector == "gumbel" and setup.training
    if setup.routers is None or not gumbel:
        return None
    return torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
