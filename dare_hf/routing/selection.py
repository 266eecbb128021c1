"""Selection: which columns each row keeps. Deterministic, and without a host sync anywhere."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dare_hf.routing.kinds import TEXT, VISION

# An image vocabulary is one run of ids; up to this many runs comparisons beat a table.
_MAX_COMPARED_RUNS = 16


class Competitors(NamedTuple):
    """Who takes part in a selection, by modality [TEXT, VISION]; no score has a say in it.

    Attributes:
        must: Bool[B, 2, N] forced candidates.
        others: Bool[B, 2, N] candidates that compete.
        forced: Long[B, 2, 1] how many are forced.
    """

    must: Tensor
    others: Tensor
    forced: Tensor


def competitors(
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
) -> Competitors:
    """What `keep_mask` makes of its columns before it looks at scores."""
    kinds = torch.arange(2, device=modality.device, dtype=modality.dtype)
    eligible = candidates[:, None] & (modality[:, None] == kinds[:, None])
    must = eligible & forced[:, None]
    return Competitors(must, eligible ^ must, must.sum(-1, keepdim=True))


def keep_mask(
    scores: Float[Tensor, "batch tokens"],
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
    budgets: Int[Tensor, "batch 2"],
    max_budget: tuple[int, int],
    first: Bool[Tensor, "batch tokens"] | None = None,
    groups: Competitors | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Kept = the forced candidates of each modality plus the best others up to its budget in all.

    Ties go to the earlier column; NaN counts as the lowest score. All forced candidates are kept,
    also where they exceed the budget.

    Args:
        scores: the higher, the better; any float type.
        modality: TEXT, VISION or PAD; a column of another kind is never kept.
        candidates: columns that may be kept.
        forced: columns that must be kept where they are candidates.
        budgets: tokens to keep per row, [TEXT, VISION] in this order, on the scores' device.
        max_budget: the largest of them per modality, on the host.
        first: columns taken before all scored ones, still within the budget (`even_grid`).
        groups: `competitors` of the same columns, where layers share them.

    Source: docs/method.md, section 4.
    """
    must, others, forced_counts = groups or competitors(modality, candidates, forced)
    width = min(max(max_budget), scores.shape[1])
    if width == 0:
        return must.any(1)
    high, low = torch.inf, -torch.inf
    ranked = scores if first is None else scores.masked_fill(first, high)
    ranked = ranked.nan_to_num(low, high, low)[:, None].where(others, low)
    need = budgets[..., None] - forced_counts
    # The values of topk are deterministic, its choice among equal ones is not: only they are used.
    best = ranked.topk(width, dim=-1).values
    threshold = best.gather(-1, (need - 1).clamp(0, width - 1))
    # What is no candidate is above nothing, but may tie with the lowest score.
    above = ranked > threshold
    ties = others & (ranked == threshold)
    room = need - above.sum(-1, keepdim=True)
    return (must | above | (ties & (ties.cumsum(-1) <= room))).any(1)


def compaction_keep(
    scores: Float[Tensor, "batch stored"],
    modality: Int[Tensor, "batch stored"],
    hop: Int[Tensor, "batch stored"],
    candidates: Bool[Tensor, "batch stored"],
    forced: Bool[Tensor, "batch stored"],
    budgets: Int[Tensor, "batch groups 2"],
) -> Bool[Tensor, "batch stored"]:
    """What stays of the closed hops: the law of `keep_mask` in each group of tokens.

    One budget (``groups == 1``) is pooled: tokens of all closed hops compete for it. With more,
    budget h is that of hop h, and the tokens of a hop compete among themselves. All groups are
    ranked by one sort, so that the work does not grow with them.

    Args:
        scores: score of each stored column.
        modality: TEXT, VISION or PAD.
        hop: hop of each stored column.
        candidates: stored columns of closed hops; others are never in the result.
        forced: columns that must stay where they are candidates.
        budgets: per row and group [TEXT, VISION], on the scores' device.

    Source: docs/method.md, section 5.
    """
    groups = budgets.shape[1]
    nowhere = 2 * groups
    group = modality.long() if groups == 1 else 2 * hop.long() + modality
    able = candidates & (modality >= 0) & (group >= 0) & (group < nowhere)
    must = able & forced
    group = group.masked_fill(~able, nowhere)
    own = group.masked_fill(must, nowhere)
    none = group.new_zeros(group.shape[0], nowhere + 1)
    ones = torch.ones_like(group)
    forced_counts = none.scatter_add(1, group.masked_fill(~must, nowhere), ones)
    # Of what competes for nothing, nothing is kept.
    need = torch.nn.functional.pad(budgets.flatten(1) - forced_counts[:, :-1], (0, 1))
    # By score, then by group, both stable: each group's best first, ties to the earlier column.
    # -0.0 and 0.0 tie: a radix sort might tell them apart.
    ranked = scores.masked_fill(scores.isnan(), -torch.inf) + 0.0
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    sorted_group, place = own.gather(1, order).sort(dim=1, stable=True)
    counts = none.scatter_add(1, own, ones)
    last = (counts.cumsum(1) - counts + need).gather(1, sorted_group)
    kept = torch.arange(group.shape[1], device=group.device) < last
    return must | torch.zeros_like(must).scatter(1, order.gather(1, place), kept)


def capped_keep(
    scores: Float[Tensor, "batch stored"],
    keep: Bool[Tensor, "batch stored"],
    tiers: Sequence[Bool[Tensor, "batch stored"]],
    cap: int,
) -> Bool[Tensor, "batch stored"]:
    """At most `cap` columns of `keep` in every row, whatever is forced.

    The columns of the first tier stay first, then those of the next, the earlier before the later;
    what is in no tier competes by score for the rest.

    Args:
        scores: score of each stored column.
        keep: columns that may stay.
        tiers: what goes before any score, most important first.
        cap: columns to keep per row.

    Source: docs/method.md, section 5 (`max_kv_tokens`).
    """
    must = torch.zeros_like(keep)
    for tier in tiers:
        own = tier & keep & ~must
        must = must | (own & (must.sum(1, keepdim=True) + own.cumsum(1) <= cap))
    one_kind = torch.zeros_like(keep, dtype=torch.int8)
    # Not torch.tensor(..., device=...): that copy waits for the device.
    wanted = torch.tensor([[cap, 0]]).to(keep.device, non_blocking=True).expand(keep.shape[0], -1)
    return keep_mask(scores, one_kind, keep, must, wanted, (cap, 0))


def shared_keep(
    scores: Float[Tensor, "batch layers stored"],
    candidates: Bool[Tensor, "batch layers stored"],
    forced: Bool[Tensor, "batch layers stored"],
    budgets: Sequence[int],
) -> Bool[Tensor, "batch layers stored"]:
    """What stays when all layers share one budget: one threshold, unequal counts by layer.

    `keep_mask` over all layers at once; ties go to the lower layer, then to the earlier column.

    Args:
        scores: score of each stored column; those of different layers are compared.
        candidates: columns that may stay.
        forced: columns that must stay where they are candidates.
        budgets: per row, tokens to keep over all layers.

    Source: docs/method.md, section 5 (reconstruction).
    """
    flat = scores.flatten(1)
    kinds = torch.zeros_like(flat, dtype=torch.int8)
    wanted = torch.tensor([[budget, 0] for budget in budgets]).to(flat.device, non_blocking=True)
    able, must = candidates.flatten(1), forced.flatten(1)
    return keep_mask(flat, kinds, able, must, wanted, (max(budgets), 0)).view_as(candidates)


def gather_index(
    keep: Bool[Tensor, "batch tokens"], width: int
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Each row's kept columns, ascending, at the right end of `width` slots, and where those are.

    The left is filled with distinct columns that are not kept, ascending too. `width` is at least
    every row's kept count and at most the number of columns.

    Source: docs/method.md, section 4 ("in position order").
    """
    kept = keep.long()
    fills = width - kept.sum(1, keepdim=True)
    rank = kept.cumsum(1)
    columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    # A kept column goes behind the fills; a fill that has no slot goes to a spare one, cut off.
    slot = torch.where(keep, fills + rank - 1, (columns - rank).clamp(max=width))
    slot = torch.where(keep | (slot < fills), slot, width)
    index = columns.new_zeros(keep.shape[0], width + 1).scatter(1, slot, columns)
    live = torch.arange(width, device=keep.device) >= fills
    return index[:, :width], live


def kept_columns(keep: Bool[Tensor, "batch tokens"], width: int) -> Int[Tensor, "batch width"]:
    """`gather_index` where every row keeps `width` columns: there is nothing to fill."""
    slot = torch.where(keep, keep.cumsum(1) - 1, width)
    columns = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return columns.new_zeros(keep.shape[0], width + 1).scatter(1, slot, columns)[:, :width]


def equalise(budgets: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Row budgets ([TEXT, VISION]) of equal total: the batch's largest k, where tokens suffice.

    Each modality rises to the batch's largest budget or the row's own count; what a row then lacks
    to the largest total goes to vision, then to text. A row of fewer tokens keeps all it has.

    Source: docs/method.md, section 4, ``batch_budget="equal"``.
    """
    most = [max(row[kind] for row in budgets) for kind in (TEXT, VISION)]
    result = [[min(most[kind], row[kind]) for kind in (TEXT, VISION)] for row in counts]
    total = max(sum(row) for row in result)
    for row, available in zip(result, counts, strict=True):
        for kind in (VISION, TEXT):
            row[kind] += min(total - sum(row), available[kind] - row[kind])
    return result


def forced_tokens(
    span: Bool[Tensor, "batch tokens"],
    *,
    prefix_tokens: int,
    already: Int[Tensor, " batch"] | None = None,
    always: Bool[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """The first `prefix_tokens` of the span's hop, the span's last token, and what is in `always`.

    Args:
        span: real tokens of the span, all of one hop in a row.
        prefix_tokens: kappa.
        already: per row, how many real tokens of that hop came in earlier forwards.
        always: columns to keep whatever their score (`isin_ids` of always_keep_token_ids).

    Source: docs/method.md, section 4.
    """
    rank = span.cumsum(1) if already is None else span.cumsum(1) + already[:, None]
    forced = (span & (rank <= prefix_tokens)) | last_valid(span)
    return forced if always is None else forced | (always & span)


def hop_prefix_mask(
    valid: Bool[Tensor, "batch tokens"],
    hop: Int[Tensor, "batch tokens"],
    n: int,
) -> Bool[Tensor, "batch tokens"]:
    """The first `n` valid columns of each hop of each row; along them `hop` never falls."""
    filled = torch.where(valid, hop.long(), -1).cummax(1).values.contiguous()
    count = valid.cumsum(1)
    start = torch.searchsorted(filled, filled)
    before = (count - valid.long()).gather(1, start)
    return valid & (count - before <= n)


def last_valid(valid: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """The last valid column of each row; none where the row has none."""
    return newest(valid, 1)


def newest(valid: Bool[Tensor, "batch tokens"], count: Any) -> Bool[Tensor, "batch tokens"]:
    """The last `count` valid columns of each row, one number for all rows or Int[batch, 1].

    Source: docs/method.md, section 2 (recent_tokens, recent_share).
    """
    rank = valid.cumsum(1)
    return valid & (rank > rank[:, -1:] - count)


def last_columns(
    eligible: Bool[Tensor, "batch tokens"], count: int
) -> tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]]:
    """The columns of each row's last `count` eligible tokens, and which of them there are."""
    order = torch.arange(1, eligible.shape[1] + 1, device=eligible.device) * eligible
    last = order.topk(min(count, eligible.shape[1]), dim=1).values
    return (last - 1).clamp(min=0), last > 0


def image_borders(modality: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Text tokens directly before or after a vision token (pads skipped): image delimiters.

    Source: docs/method.md, section 2.
    """
    after = _neighbour(modality) == VISION
    before = _neighbour(modality.flip(1)).flip(1) == VISION
    return (modality == TEXT) & (before | after)


def isin_ids(ids: Int[Tensor, "*shape"], wanted: Sequence[int]) -> Bool[Tensor, "*shape"]:
    """Where `ids` is one of `wanted`."""
    runs: list[list[int]] = []
    for value in sorted(set(wanted)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    if len(runs) > _MAX_COMPARED_RUNS:
        # Not torch.tensor(..., device=...): that copy waits for the device.
        return torch.isin(ids, torch.tensor(sorted(set(wanted))).to(ids.device, non_blocking=True))
    found = torch.zeros_like(ids, dtype=torch.bool)
    for low, high in runs:
        found = found | ((ids >= low) & (ids <= high))
    return found


def _neighbour(modality: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Modality of the last real token before each column; TEXT where there is none."""
    columns = torch.arange(modality.shape[1], device=modality.device).expand_as(modality)
    last_real = torch.where(modality >= 0, columns, -1).cummax(1).values
    before = torch.nn.functional.pad(last_real, (1, 0), value=-1)[:, :-1]
    return torch.where(before >= 0, modality.gather(1, before.clamp(min=0)), TEXT)
