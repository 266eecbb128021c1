"""How many tokens a layer keeps, from rates and counts alone: no score has a say in it."""

from collections.abc import Sequence

from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.retention import RetentionTable, budget
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


def closed_groups(counts: Sequence[Counts], begun: int, *, pooled: bool) -> list[list[int]]:
    """Tokens that compete with each other when hop `begun` begins, [groups][text, vision].

    Args:
        counts: [hops][text, vision] of one row; of missing hops there are none.
        begun: The hop that begins; those before it are closed.
        pooled: One group of all closed hops, else one of each.

    Source: docs/method.md, section 5.
    """
    closed = [list(hop) for hop in counts[:begun]]
    closed += [[0, 0] for _ in range(begun - len(closed))]
    if not pooled:
        return closed
    return [[sum(hop[m] for hop in closed) for m in (TEXT, VISION)]]


def closed_budgets(
    table: RetentionTable, layer: int, begun: int, groups: Sequence[Counts]
) -> list[list[int]]:
    """Budgets of the groups when hop `begun` begins; from hop 0 to hop 1 nothing goes.

    Args:
        table: The rates.
        layer: The layer.
        begun: The hop that begins.
        groups: All real tokens of each group (`closed_groups`).

    Source: docs/method.md, section 5.
    """
    rates = [table.rate(begun, layer, m) if begun > 1 else 1.0 for m in (TEXT, VISION)]
    return [[budget(rates[m], group[m]) for m in (TEXT, VISION)] for group in groups]
