"""How many tokens a layer keeps, from rates and counts alone: no score has a say in it."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import CEIL_SLACK, RetentionTable, budget
from dare_hf.routing.selection import equalise

Counts = Sequence[int]
"""[text, vision]"""


def kept_counts(budgets: Counts, forced: Counts, available: Counts) -> list[int]:
    """What a selection keeps of each modality: the forced ones and others up to the budget.

    Law: ``min(max(k, forced), available)``; `forced` are some of the available.

    Source: docs/method.md, section 4.
    """
    triples = zip(budgets, forced, available, strict=True)
    return [min(max(k, must), count) for k, must, count in triples]


def span_budgets(
    table: RetentionTable,
    layer: int,
    hops: Sequence[int],
    counts: Sequence[Counts],
    *,
    equal: bool = False,
) -> list[list[int]]:
    """Budgets of a forward's spans at one layer, [rows][text, vision].

    Args:
        table: The rates.
        layer: The layer.
        hops: Per row the hop of its span.
        counts: Per row the real tokens of its span, pruned ones counted under "drop" too.
        equal: ``batch_budget="equal"``.

    Source: docs/method.md, section 4.
    """
    rows = [
        [budget(table.rate(hop, layer, m), own[m]) for m in (TEXT, VISION)]
        for hop, own in zip(hops, counts, strict=True)
    ]
    return equalise(rows, counts) if equal else rows


def by_hop(counts: Sequence[Counts]) -> Int[Tensor, "hops 2"]:
    """Counts of each hop as a tensor on the host, [TEXT, VISION]."""
    return torch.tensor(counts, dtype=torch.long).view(-1, 2)


def closed_groups(
    counts: Int[Tensor, "*rows hops 2"], begun: int, *, pooled: bool
) -> Int[Tensor, "*rows groups 2"]:
    """Tokens that compete with each other when hop `begun` begins.

    Args:
        counts: Of each hop [TEXT, VISION]; of missing hops there are none.
        begun: The hop that begins; those before it are closed.
        pooled: One group of all closed hops, else one of each.

    Source: docs/method.md, section 5.
    """
    closed = counts[..., :begun, :]
    if pooled:
        return closed.sum(-2, keepdim=True)
    return torch.nn.functional.pad(closed, (0, 0, 0, begun - closed.shape[-2]))


def closed_budgets(
    table: RetentionTable,
    layers: Sequence[int],
    begun: Sequence[int],
    groups: Int[Tensor, "rows groups 2"],
    summary: int | None = None,
) -> Int[Tensor, "layers rows groups 2"]:
    """Budgets of the groups when hops begin; from hop 0 to hop 1 nothing goes.

    Law: `budget` of each rate and count.

    With a `summary` the hops after the prompt keep so many tokens instead, text before vision.

    Args:
        table: The rates.
        layers: The layers.
        begun: Per row the hop that begins.
        groups: All real tokens of each group (`closed_groups`), on the host; one group of each hop
            with a summary.
        summary: `hop_summary`.

    Source: docs/method.md, section 5.
    """
    rates = [
        [[table.rate(hop, layer, m) if hop > 1 else 1.0 for m in (TEXT, VISION)] for hop in begun]
        for layer in layers
    ]
    # Python's floats, so that the ceiling is that of `budget` to the bit
    exact = torch.tensor(rates, dtype=torch.float64)[:, :, None]
    budgets = (exact * groups - CEIL_SLACK).ceil().long().clamp(min=1).minimum(groups)
    if summary is not None:
        later = groups[:, 1:]
        text = later[..., TEXT].clamp(max=summary)
        vision = (summary - text).minimum(later[..., VISION])
        budgets[:, :, 1:] = torch.stack([text, vision], dim=-1)
    return budgets


def counted(
    group: Int[Tensor, "*rows columns"], tokens: Bool[Tensor, "*rows columns"], groups: int
) -> Int[Tensor, "*rows groups 2"]:
    """How many `tokens` each group has of each modality.

    Args:
        group: ``2 * group + modality`` of each column; beyond the groups nothing is counted.
        tokens: the columns that count.
        groups: how many groups there are.
    """
    group = group.masked_fill(~tokens | (group >= 2 * groups), 2 * groups)
    none = group.new_zeros(*group.shape[:-1], 2 * groups + 1)
    found = none.scatter_add(-1, group, torch.ones_like(group))
    return found[..., :-1].unflatten(-1, (groups, 2))
