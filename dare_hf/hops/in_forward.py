"""Hops that begin inside one forward: later tokens see the compacted set through a mask.

A speculative step verifies several tokens at once. When a delimiter stands among them, the tokens
after it must see what a step-by-step run would have left in the cache. Nothing is removed yet: the
step may be cropped; memory goes at the start of the next forward (`compaction`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache.ring import QueryRing
from dare_hf.errors import DareInputError
from dare_hf.hops.compaction import renewed
from dare_hf.hops.eviction import HopPruner, StoredTokens
from dare_hf.scoring.observe import RING, ring_scores

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import TokenLog
    from dare_hf.config import DareConfig
    from dare_hf.forward.facts import ForwardContext
    from dare_hf.forward.run import Run
    from dare_hf.routing.retention import RetentionTable
    from dare_hf.scoring.observe import AttentionCall


class InnerHops:
    """The hops that begin inside one forward, in order.

    Args:
        context: The forward.
        log: The log of the tokens before it.
        config: Budgets and scores.
        table: Rates.
    """

    def __init__(
        self, context: ForwardContext, log: TokenLog, config: DareConfig, table: RetentionTable
    ) -> None:
        inner = _inner_ends(context, config)
        capped = _capped_prompt(context, config)
        opened = [max(hop, 0 if capped else 1) for hop in context.span_hop]
        extended = log.snapshot()
        extended.append(context.modality, context.token_hop, context.always)
        self.observed = config.resolved_hop_score == "observed"
        self.steps: list[tuple[HopPruner, list[int]]] = []
        self._kept: dict[int, list[Tensor]] = {}
        for step in range(max(len(ends) for ends in inner)):
            rows = [len(ends) > step for ends in inner]
            due = [h + step + 1 if row else 0 for h, row in zip(opened, rows, strict=True)]
            ends = [row[step] if row_due else -1 for row, row_due in zip(inner, rows, strict=True)]
            self.steps.append((HopPruner(extended, config, table, due), ends))

    @staticmethod
    def inside(context: ForwardContext, config: DareConfig) -> bool:
        """Whether a hop closes, and prunes, before the last token of this forward."""
        return any(_inner_ends(context, config))

    def allowed(
        self,
        run: Run,
        layer: int,
        tensors: tuple[Tensor, Tensor, Tensor],
        call: AttentionCall,
        source: int,
    ) -> Tensor:
        """Bool[B, K, C]: which keys each running token may see, by its hop alone.

        Args:
            run: The forward, with the layer's columns and their scores.
            layer: The layer.
            tensors: query [B, H, K, d], key and value [B, Hkv, C, d] as attention received them.
            call: How it was called.
            source: The layer whose keys it reads.
        """
        if source == layer:
            self._kept[layer] = self._keep(run, layer, tensors, call)
        plan = run.plans[layer]
        hop = plan.take(run.context.token_hop)
        kept = self._kept[source]
        seen = torch.ones(*hop.shape, kept[0].shape[1], dtype=torch.bool, device=hop.device)
        for (pruner, _), keep in zip(self.steps, kept, strict=True):
            due = torch.tensor(pruner.due).to(hop.device)[:, None]
            after = (due > 0) & (hop >= due)
            seen = seen & (keep[:, None, :] | ~after[:, :, None])
        return seen if plan.live is None else seen | ~plan.live[:, :, None]

    def _keep(
        self,
        run: Run,
        layer: int,
        tensors: tuple[Tensor, Tensor, Tensor],
        call: AttentionCall,
    ) -> list[Tensor]:
        """Bool[B, C] of each hop that begins: the keys it keeps."""
        query, key, value = tensors
        assert run.columns is not None
        where = run.columns.expand(query.shape[0], -1)
        scores = _scores(run, layer, where)
        ring = self._ring(run, layer, query, where, call)
        kept = []
        for pruner, ends in self.steps:
            if ring is not None:
                closed = pruner.closed(where)
                new = ring_scores(ring, (key, value), where, closed, ends)
                scores = renewed(scores, new, closed)
            kept.append(pruner.keep(layer, StoredTokens(where, scores)))
            where = where.masked_fill(~kept[-1], -1)
        return kept

    def _ring(
        self,
        run: Run,
        layer: int,
        query: Tensor,
        where: Tensor,
        call: AttentionCall,
    ) -> QueryRing | None:
        if not self.observed:
            return None
        cache = run.context.cache
        ring = None if cache is None else cache.layer(layer).ring
        ring = ring or QueryRing.empty(query, call.softmax)
        running = run.running_columns(where, query.shape[2])
        return ring.pushed(query, running, RING + query.shape[2])


def _inner_ends(context: ForwardContext, config: DareConfig) -> list[list[int]]:
    """Per row the positions before the last one at which a hop closes and something may go."""
    last = context.past + context.length - 1
    inner = [[end for end in ends if end < last] for ends in context.closing]
    if context.span_ends is None or not _capped_prompt(context, config):
        return inner
    rows = zip(context.span_hop, context.span_ends, inner, strict=True)
    return [[end, *ends] if hop == 0 and end < last else ends for hop, end, ends in rows]


def _capped_prompt(context: ForwardContext, config: DareConfig) -> bool:
    """Whether sampled tokens follow the prompt in this forward under a cap on what is stored."""
    ends, last = context.span_ends, context.past + context.length - 1
    follows = ends is not None and min(ends) < last
    return config.max_kv_tokens is not None and follows


def restrict(mask: Any, allowed: Tensor, columns: Tensor) -> Tensor:
    """An attention mask that also keeps to `allowed`.

    Args:
        mask: None (causal), bool or additive [B|1, H|1, K, C].
        allowed: Bool[B, K, C].
        columns: Long[B|1, C] logical positions of the keys, -1 for holes; the last K run.

    Raises:
        DareInputError: The mask is of a kind that cannot say this (flash, flex).
    """
    if mask is None:
        query = columns[:, columns.shape[1] - allowed.shape[1] :]
        causal = (columns[:, None, :] <= query[:, :, None]) & (columns >= 0)[:, None, :]
        return (allowed & causal)[:, None]
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        raise DareInputError(
            "expected sdpa or eager attention where a hop delimiter can stand inside one "
            "speculative step (prompt lookup, assistant model); got flash or flex attention. "
            "Generate without speculation, or load the model with attn_implementation='sdpa'"
        )
    if mask.dtype == torch.bool:
        return mask & allowed[:, None]
    return mask.masked_fill(~allowed[:, None], torch.finfo(mask.dtype).min)


def _scores(run: Run, layer: int, where: Tensor) -> Tensor:
    """Float32[B, C]: stored scores of the cached columns, then those of this forward's tokens."""
    plan = run.plans[layer]
    scores = torch.zeros(where.shape, device=where.device)
    if run.column_scores is not None:
        scores[:, : run.column_scores.shape[1]] = run.column_scores
    if plan.scores is not None and run.frozen is not None:
        scores[:, where.shape[1] - run.context.length :] = plan.scores
    elif plan.scores is not None:
        scores[:, where.shape[1] - plan.width :] = plan.take(plan.scores)
    return scores
