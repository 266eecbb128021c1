"""Scores: how much a token matters to a layer. The higher, the better; fp32 (fp64 of fp64)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize as unit_vectors

from dare_hf.routing.kinds import TEXT, VISION

RMS_EPS = 1e-6
_WORD = 0xFFFFFFFF

HeadMean = Callable[[Tensor, int], Tensor]
"""Makes the mean over all heads of a sum over this process's heads and their number."""


def local_mean(total: Tensor, heads: int) -> Tensor:
    """The mean where this process holds all heads."""
    return total / heads


class Softmax(NamedTuple):
    """How the queries and keys of one attention become probabilities.

    Attributes:
        scaling: Factor on the logits.
        mean: Over all heads, where this process holds some.
        softcap: Bound c of the scaled logits, ``c tanh(x / c)``; None for none.
        sinks: Float[H], for each head the logit of a key that nobody has: probabilities of the
            others sum to less than 1. None for none.
    """

    scaling: float
    mean: HeadMean = local_mean
    softcap: float | None = None
    sinks: Tensor | None = None

    def probabilities(self, products: Tensor, mask: Tensor) -> Tensor:
        """What each query gives each key.

        Args:
            products: Float[B, H, Q, C], queries times keys; overwritten.
            mask: Added to the logits, or Bool with True for what is seen.
        """
        logits = products.mul_(self.scaling)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask.dtype == torch.bool:
            logits = logits.masked_fill_(~mask, -torch.inf)
        else:
            logits = logits.add_(mask)
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]


def router_scores(
    hidden: Float[Tensor, "batch tokens dim"],
    weight: Float[Tensor, "2 dim"],
    bias: Float[Tensor, " 2"],
    modality: Int[Tensor, "batch tokens"],
    normalize: bool,
) -> Float[Tensor, "batch tokens"]:
    """``sigmoid(w^m . x + b^m)`` of the hidden state x that enters the layer, m its modality.

    Args:
        hidden: x; made RMS-normal without parameters first where `normalize` is set.
        weight: one row per modality, [TEXT, VISION].
        bias: same order.
        modality: TEXT, VISION or PAD (pads take the text row: nobody reads them).
        normalize: False is the paper's literal form.

    Source: the paper's routing score; docs/method.md, section 2.
    """
    x = _wide(hidden)
    if normalize:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = x @ weight.to(x.dtype).T + bias.to(x.dtype)
    chosen = logits.gather(-1, modality.clamp(min=0).long()[..., None])
    return chosen.squeeze(-1).sigmoid()


def random_scores(
    seed: int, layer: int, local_index: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """A hash of seed, layer and row-local index in [0, 1): equal on every device, no generator.

    Source: docs/method.md, section 2.
    """
    key = _mix(seed & _WORD)
    key = _mix(key ^ ((seed >> 32) & _WORD))
    key = _mix(key ^ layer)
    return (_mix((local_index.long() & _WORD) ^ key) >> 8).float() / 2**24


def position_scores(local_index: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """``1 / (1 + i)`` of the row-local index i: keeps the first k (a baseline).

    Source: docs/method.md, section 2.
    """
    return 1.0 / (1.0 + local_index.clamp(min=0).float())


def recent_scores(local_index: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """``i / 2**24`` of the row-local index i, exact: keeps the last k (a baseline).

    Source: docs/method.md, section 2.
    """
    return local_index.clamp(0, 2**24 - 1).float() / 2**24


def key_norm_scores(
    keys: Float[Tensor, "batch heads tokens dim"], mean: HeadMean = local_mean
) -> Float[Tensor, "batch tokens"]:
    """``1 / (1 + mean over heads of |k|)``: keys of a low norm draw attention.

    Args:
        keys: this process's heads.
        mean: over all heads.

    Source: docs/method.md, section 2; Devoto et al. 2024, "A Simple and Effective L2 Norm-Based
    Strategy for KV Cache Compression".
    """
    return 1.0 / (1.0 + mean(_wide(keys).norm(dim=-1).sum(1), keys.shape[1]))


def attention_scores(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads stored dim"],
    value: Float[Tensor, "batch kv_heads stored value_dim"],
    visible: Bool[Tensor, "batch _ queries stored"],
    query_valid: Bool[Tensor, "batch queries"],
    span: Bool[Tensor, "batch stored"],
    scaling: float,
    mean: HeadMean = local_mean,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch stored"]:
    """Attention mass times value norm (mean over heads and queries), over its mean in the span.

    Each query head weighs with the value norm of its own kv head. The mean that divides is over the
    span's keys that a valid query sees. 0 outside the span. Peak memory: heads x queries x stored.

    Args:
        query: post-rotary queries, heads grouped by kv head as in grouped-query attention.
        key: post-rotary keys.
        value: values.
        visible: which key each query sees; one head for all, or all.
        query_valid: queries that count.
        span: keys that get a score.
        scaling: factor on the logits.
        mean: over all heads, where this process holds some.
        softcap: see :class:`Softmax`.
        sinks: see :class:`Softmax`; what a sink takes is nobody's score.

    Source: docs/method.md, section 2 (attention).
    """
    batch, heads, queries, _ = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    seen = visible & query_valid[:, None, :, None]
    mass = _shares(query, key, seen, Softmax(scaling, mean, softcap, sinks))
    mass = mass.view(batch, kv_heads, heads // kv_heads, queries, stored).sum((2, 3))
    raw = mean((mass * _wide(value).norm(dim=-1)).sum(1), heads)
    raw = raw / query_valid.sum(1, keepdim=True).clamp(min=1)
    counted = span & seen.any(2).any(1)
    # Not a product: an unused slot of a cache may hold NaN.
    raw = raw.masked_fill(~span, 0.0)
    usual = (raw * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    return raw / usual.clamp(min=torch.finfo(raw.dtype).tiny)


def text_raters(
    hidden: Float[Tensor, "batch tokens dim"],
    modality: Int[Tensor, "batch tokens"],
    span: Bool[Tensor, "batch tokens"],
) -> Bool[Tensor, "batch tokens"]:
    """The text behind a row's first vision token that its vision tokens match best.

    ``softmax over that text of (V T^t)``, mean over the vision rows: what is above the mean of
    these rates; where nothing is (a single token), all of it.

    Args:
        hidden: Input embeddings.
        modality: TEXT, VISION or PAD.
        span: Tokens that count.

    Source: SparseVLM (arXiv 2410.04417), section 3.2.
    """
    vision = (modality == VISION) & span
    text = (modality == TEXT) & span & (vision.cumsum(1) > 0)
    wide = _wide(hidden)
    logits = (wide @ wide.transpose(1, 2)).masked_fill(~text[:, None], -torch.inf)
    shares = logits.softmax(-1).masked_fill(~(vision[:, :, None] & text[:, None]), 0.0)
    share = shares.sum(1) / vision.sum(1, keepdim=True).clamp(min=1)
    mean = share.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
    above = text & (share > mean)
    return torch.where(above.any(1, keepdim=True), above, text)


def diverse_scores(
    features: Float[Tensor, "batch tokens dim"],
    eligible: Bool[Tensor, "batch tokens"],
    hop: Int[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """``1 - rank / n`` in the greedy order of the tokens of one row and hop; 0 of others.

    First the token whose nearest neighbour is farthest by cosine distance, then always the one
    whose nearest among those taken is. One step a token, with host syncs.

    Args:
        features: Of each token.
        eligible: Tokens that are ranked.
        hop: Hop of each token; those of different hops are ranked apart.

    Source: DivPrune (arXiv 2503.02175).
    """
    scores = features.new_zeros(eligible.shape, dtype=torch.float32)
    for row in range(eligible.shape[0]):
        for own in hop[row][eligible[row]].unique().tolist():
            columns = (eligible[row] & (hop[row] == own)).nonzero()[:, 0]
            unit = unit_vectors(_wide(features[row, columns]), dim=-1)
            order = _farthest_first(1 - unit @ unit.T)
            scores[row, columns[order]] = 1 - torch.arange(
                len(order), dtype=torch.float32, device=scores.device
            ) / len(order)
    return scores


def _farthest_first(distance: Float[Tensor, "points points"]) -> Int[Tensor, " points"]:
    """The greedy max-min order of points."""
    count = distance.shape[0]
    alone = torch.eye(count, dtype=torch.bool, device=distance.device)
    nearest = distance.masked_fill(alone, torch.inf).min(1).values
    taken: list[Tensor] = []
    open_ = torch.ones(count, dtype=torch.bool, device=distance.device)
    for step in range(count):
        place = nearest.masked_fill(~open_, -torch.inf).argmax()
        taken.append(place)
        open_[place] = False
        nearest = distance[place] if step == 0 else torch.minimum(nearest, distance[place])
    return torch.stack(taken)


def squared_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads stored dim"],
    visible: Bool[Tensor, "batch _ queries stored"],
    query_valid: Bool[Tensor, "batch queries"],
    rules: Softmax,
) -> Float[Tensor, "batch heads stored"]:
    """``sum over queries of p^2``, p the share of attention a key gets from a query, by head.

    0 for a key that no valid query sees. Peak memory: heads x queries x stored.

    Args:
        query: post-rotary queries, heads grouped by kv head as in grouped-query attention.
        key: post-rotary keys.
        visible: which key each query sees; one head for all, or all.
        query_valid: queries that count.
        rules: what becomes of queries and keys.

    Source: docs/method.md, section 5 (reconstruction).
    """
    seen = visible & query_valid[:, None, :, None]
    return _shares(query, key, seen, rules).square_().sum(2)


def spread(
    stored: Float[Tensor, "batch kv_heads stored dim"], real: Bool[Tensor, "batch stored"]
) -> Float[Tensor, "batch stored"]:
    """How far keys (or values) point away from their mean direction, over the mean of that.

    ``1 - cos(k_i, mean of k / |k|)``, mean over heads; means over the real tokens. 0 outside.
    What many tokens share tells little of any of them (the idea of KeyDiff, Park et al. 2025).

    Args:
        stored: post-rotary keys, or values.
        real: tokens that count.

    Source: docs/method.md, section 5 (reconstruction).
    """
    # Not a product with 0: an unused slot may hold NaN.
    unit = unit_vectors(_wide(stored), dim=-1).masked_fill(~real[:, None, :, None], 0.0)
    middle = unit_vectors(unit.sum(2, keepdim=True), dim=-1)
    away = (1 - (unit * middle).sum(-1)).mean(1).masked_fill(~real, 0.0)
    usual = away.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    return away / usual.clamp(min=torch.finfo(away.dtype).tiny)


def _shares(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads stored dim"],
    seen: Bool[Tensor, "batch _ queries stored"],
    rules: Softmax,
) -> Float[Tensor, "batch heads queries stored"]:
    """The share of attention a key gets from a query, by head; 0 where it is not seen."""
    batch, heads, queries, dim = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        grouped = _wide(query).reshape(batch, kv_heads, -1, dim)
        products = (grouped @ _wide(key).transpose(-1, -2)).view(batch, heads, queries, stored)
    # A query that sees nothing has only -inf: softmax gives NaN there, and no share.
    return rules.probabilities(products, seen).masked_fill_(~seen, 0.0)


def _wide(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mix(x: Any) -> Any:
    """A bijection of 32-bit words, of an int or of an int64 tensor.

    Both factors are under 2**31, so that no product leaves 63 bits. Source: C. Wellons,
    hash-prospector, "lowbias32" family.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)
