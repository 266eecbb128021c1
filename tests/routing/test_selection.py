"""Laws of selection, of the gather index and of the even grid, over random ragged batches."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dare_hf.routing import PAD, TEXT, VISION, reference
from dare_hf.routing.even_grid import even_grid
from dare_hf.routing.first import newest_text, taken_first
from dare_hf.routing.selection import (
    capped_keep,
    compaction_keep,
    equalise,
    forced_tokens,
    gather_index,
    hop_prefix_mask,
    image_borders,
    isin_ids,
    keep_mask,
    kept_columns,
    last_valid,
    newest,
)

MAX_BATCH, MAX_TOKENS, MAX_BUDGET = 3, 18, 20
# Few values, so that ties are common.
TIED_SCORES = [0.0, -0.0, 0.25, 0.5, 1.0, float("nan"), float("inf"), float("-inf")]


@dataclass(frozen=True)
class Case:
    scores: Tensor
    modality: Tensor
    candidates: Tensor
    forced: Tensor
    budgets: Tensor
    first: Tensor | None = None

    def keep(self) -> Tensor:
        most = tuple(self.budgets.amax(0).tolist())
        return keep_mask(
            self.scores,
            self.modality,
            self.candidates,
            self.forced,
            self.budgets,
            most,
            self.first,
        )

    def columns(self, index: Tensor) -> "Case":
        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, index]

        return replace(
            self,
            scores=self.scores[:, index],
            modality=self.modality[:, index],
            candidates=self.candidates[:, index],
            forced=self.forced[:, index],
            first=take(self.first),
        )

    def row(self, index: int) -> "Case":
        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index : index + 1]

        return Case(*(take(getattr(self, name)) for name in Case.__dataclass_fields__))


def matrix(draw: st.DrawFn, values: Sequence, batch: int, tokens: int) -> list[list]:
    """Rows of `values`, each drawn as the digits of one integer: a draw per cell is slow."""
    base = len(values)
    numbers = [draw(st.integers(0, base**tokens - 1)) for _ in range(batch)]
    return [[values[n // base**place % base] for place in range(tokens)] for n in numbers]


def booleans(draw: st.DrawFn, batch: int, tokens: int) -> Tensor:
    rows = matrix(draw, [False, True], batch, tokens)
    return torch.tensor(rows, dtype=torch.bool).view(batch, tokens)


def modalities(draw: st.DrawFn, batch: int, tokens: int) -> Tensor:
    rows = matrix(draw, [PAD, TEXT, VISION, VISION], batch, tokens)
    return torch.tensor(rows, dtype=torch.int8).view(batch, tokens)


@st.composite
def cases(draw: st.DrawFn, *, distinct: bool = False, min_tokens: int = 0) -> Case:
    batch, tokens = draw(st.integers(1, MAX_BATCH)), draw(st.integers(min_tokens, MAX_TOKENS))
    if distinct:
        values = [draw(st.permutations(range(tokens))) for _ in range(batch)]
    else:
        values = matrix(draw, TIED_SCORES, batch, tokens)
    modality = modalities(draw, batch, tokens)
    budget = matrix(draw, range(MAX_BUDGET + 1), batch, 2)
    return Case(
        scores=torch.tensor(values, dtype=torch.float32).view(batch, tokens),
        modality=modality,
        candidates=booleans(draw, batch, tokens) & (modality != PAD),
        forced=booleans(draw, batch, tokens),
        budgets=torch.tensor(budget),
        first=booleans(draw, batch, tokens) if draw(st.booleans()) else None,
    )


@given(cases())
def test_keep_equals_the_reference(case: Case) -> None:
    expected = reference.keep_mask(
        case.scores, case.modality, case.candidates, case.forced, case.budgets, None, case.first
    )
    # what is first has the score +inf in the fast path, whatever its own is: a score is in [0, 1]
    assume(case.first is None or not (case.scores.isposinf() | case.scores.isnan()).any())
    assert torch.equal(case.keep(), expected)


@given(cases())
def test_budget_is_exact(case: Case) -> None:
    kept = case.keep()
    assert not (kept & ~case.candidates).any(), "kept a column that was no candidate"
    for kind in (TEXT, VISION):
        able = case.candidates & (case.modality == kind)
        must = (able & case.forced).sum(1)
        wanted = case.budgets[:, kind].minimum(able.sum(1)).maximum(must)
        assert torch.equal((kept & (case.modality == kind)).sum(1), wanted)
    assert not (case.candidates & case.forced & ~kept).any(), "lost a forced token"


@given(cases(), st.integers(0, MAX_BUDGET))
def test_more_budget_keeps_a_superset(case: Case, more: int) -> None:
    wider = replace(case, budgets=case.budgets + more)
    assert not (case.keep() & ~wider.keep()).any()


@given(cases(distinct=True, min_tokens=1), st.data())
def test_permuting_columns_permutes_the_result(case: Case, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(case.scores.shape[1]))))
    case = replace(case, first=None)
    assert torch.equal(case.columns(order).keep(), case.keep()[:, order])


@given(cases())
def test_equal_scores_keep_the_earliest(case: Case) -> None:
    case = replace(case, scores=torch.zeros_like(case.scores), first=None)
    for kind in (TEXT, VISION):
        others = case.candidates & (case.modality == kind) & ~case.forced
        kept = (case.keep() & others).int()
        gained_after_a_loss = (~kept.bool() & others).cumsum(1).bool() & kept.bool()
        assert not gained_after_a_loss.any()


@given(cases(), st.integers(0, 5))
def test_padding_and_other_rows_change_nothing(case: Case, pads: int) -> None:
    def widen(tensor: Tensor | None, value: float) -> Tensor | None:
        return None if tensor is None else torch.nn.functional.pad(tensor, (pads, 0), value=value)

    padded = Case(
        widen(case.scores, 9.0),
        widen(case.modality, PAD),
        widen(case.candidates, False),
        widen(case.forced, True),
        case.budgets,
        widen(case.first, True),
    )
    kept = case.keep()
    assert torch.equal(padded.keep()[:, pads:], kept)
    assert not padded.keep()[:, :pads].any()
    for index in range(len(kept)):
        assert torch.equal(case.row(index).keep(), kept[index : index + 1])


def test_nan_is_the_lowest_score() -> None:
    scores = torch.tensor([[float("nan"), 0.0, float("nan"), float("-inf"), 0.1]])
    text = torch.zeros(1, 5, dtype=torch.int8)
    every, none = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool)
    kept = [
        keep_mask(scores, text, every, none, torch.tensor([[k, 0]]), (k, 0))[0].nonzero().flatten()
        for k in range(6)
    ]
    assert [columns.tolist() for columns in kept] == [
        [],
        [4],
        [1, 4],
        [0, 1, 4],
        [0, 1, 2, 4],
        [0, 1, 2, 3, 4],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    scores = torch.rand(2, 40).to(dtype)
    modality = torch.arange(40).remainder(2).expand(2, 40).to(torch.int8)
    every, budgets = torch.ones(2, 40, dtype=torch.bool), torch.tensor([[3, 5], [7, 2]])
    arguments = (scores, modality, every, ~every, budgets)
    assert torch.equal(keep_mask(*arguments, (7, 5)), reference.keep_mask(*arguments))


@given(cases(), st.integers(1, 4), st.data())
def test_compaction_equals_the_reference(case: Case, hops: int, data: st.DataObject) -> None:
    batch, tokens = case.scores.shape
    hop = torch.tensor(matrix(data.draw, range(hops + 1), batch, tokens)).view(batch, tokens).long()
    limits = matrix(data.draw, range(MAX_BUDGET + 1), batch, hops * 2)
    budgets = torch.tensor(limits).view(batch, hops, 2)
    arguments = (case.scores, case.modality, hop, case.candidates, case.forced, budgets)
    kept = compaction_keep(*arguments)
    assert torch.equal(kept, reference.compaction_keep(*arguments))
    if hops > 1:
        assert not (kept & (hop == hops)).any(), "a hop without a budget is not a closed one"


@given(cases(), st.integers(1, MAX_TOKENS), st.data())
def test_a_cap_equals_the_reference_and_binds_forced_tokens(
    case: Case, cap: int, data: st.DataObject
) -> None:
    batch, tokens = case.scores.shape
    tiers = [booleans(data.draw, batch, tokens) for _ in range(data.draw(st.integers(0, 3)))]
    kept = capped_keep(case.scores, case.candidates, tiers, cap)
    assert torch.equal(kept, reference.capped_keep(case.scores, case.candidates, tiers, cap))
    assert torch.equal(kept.sum(1), case.candidates.sum(1).clamp(max=cap))
    for row in range(batch):
        alone = [tier[row : row + 1] for tier in tiers]
        one = case.row(row)
        assert torch.equal(capped_keep(one.scores, one.candidates, alone, cap)[0], kept[row])


@given(st.data())
def test_gather_index(data: st.DataObject) -> None:
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    keep = booleans(data.draw, batch, tokens)
    width = data.draw(st.integers(int(keep.sum(1).max()), tokens))
    index, live = gather_index(keep, width)
    expected = reference.gather_index(keep, width)
    assert torch.equal(index, expected[0])
    assert torch.equal(live, expected[1])
    for row in range(batch):
        assert len(set(index[row].tolist())) == width, "a column occurs twice"
        assert index[row][live[row]].tolist() == keep[row].nonzero().flatten().tolist()


@given(st.data())
def test_kept_columns_are_the_gather_index_of_even_rows(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 12))
    order = torch.tensor([data.draw(st.permutations(range(tokens))) for _ in range(2)])
    width = data.draw(st.integers(1, tokens))
    keep = order < width
    assert torch.equal(kept_columns(keep, width), reference.gather_index(keep, width)[0])


@given(st.data())
def test_scatter_of_the_gathered_is_the_identity(data: st.DataObject) -> None:
    keep = booleans(data.draw, 2, 10)
    index, _ = gather_index(keep, int(keep.sum(1).max()))
    values = torch.rand(2, 10)
    assert torch.equal(values.scatter(1, index, values.gather(1, index)), values)


@given(st.data())
def test_equalise(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    counts = matrix(data.draw, range(13), rows, 2)
    budgets = [[data.draw(st.integers(min(1, n), n)) for n in row] for row in counts]
    result = equalise(budgets, counts)
    total = max(sum(row) for row in result)
    assert total >= max(sum(row) for row in budgets)
    for row, budget, count in zip(result, budgets, counts, strict=True):
        assert all(b <= k <= n for b, k, n in zip(budget, row, count, strict=True))
        assert sum(row) == min(total, sum(count)), "a row with enough tokens is short"
    if len({tuple(row) for row in counts}) == 1 and len({tuple(row) for row in budgets}) == 1:
        assert result == budgets


def test_equalise_gives_the_rest_to_the_modality_that_has_more() -> None:
    # [TEXT, VISION]: the second row has no image, the third a small one.
    assert equalise([[3, 10], [4, 0], [2, 1]], [[5, 20], [20, 0], [5, 4]]) == [
        [4, 10],
        [14, 0],
        [5, 4],
    ]


@st.composite
def spans(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A span with gaps, and hops that never fall along it but mean nothing elsewhere."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    span = booleans(draw, batch, tokens)
    steps = torch.tensor(matrix(draw, [0, 0, 0, 1, 2], batch, tokens))
    hop = steps.view(batch, tokens).long().cumsum(1)
    noise = torch.tensor(matrix(draw, range(-1, 31), batch, tokens)).view(batch, tokens)
    return span.bool(), torch.where(span, hop, noise.long())


@given(spans(), st.integers(0, 3), st.data())
def test_forced_tokens_equal_the_reference(
    span_and_hop: tuple[Tensor, Tensor], prefix: int, data: st.DataObject
) -> None:
    span, hop = span_and_hop
    batch, tokens = span.shape
    options: dict = {"prefix_tokens": prefix}
    if data.draw(st.booleans()):
        options["already"] = torch.tensor(data.draw(st.tuples(*[st.integers(0, 4)] * batch)))
    if data.draw(st.booleans()):
        options["always"] = booleans(data.draw, batch, tokens)
    assert torch.equal(forced_tokens(span, **options), reference.forced_tokens(span, **options))
    found = hop_prefix_mask(span, hop, prefix)
    assert torch.equal(found, reference.hop_prefix_mask(span, hop, prefix))


def test_prefix_of_every_hop() -> None:
    valid = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    hop = torch.tensor([[7, 0, 0, 0, 0, 1, 1, 1, 3]])
    assert hop_prefix_mask(valid, hop, 2).int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 0, 1]]


def test_last_valid() -> None:
    valid = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool()
    assert last_valid(valid).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert last_valid(valid[:, :0]).shape == (3, 0)


@given(st.data())
def test_borders_and_newest_equal_the_reference(data: st.DataObject) -> None:
    modality = modalities(data.draw, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12)))
    assert torch.equal(image_borders(modality), reference.image_borders(modality))
    text, count = modality == TEXT, data.draw(st.integers(0, 14))
    assert torch.equal(newest(text, count), reference.newest(text, count))
    counts = torch.tensor([data.draw(st.integers(0, 14)) for _ in modality])[:, None]
    assert torch.equal(newest(text, counts), reference.newest(text, counts))


def test_newest_and_borders_by_hand() -> None:
    modality = torch.tensor(
        [
            [PAD, TEXT, TEXT, VISION, VISION, TEXT, TEXT],
            [TEXT, TEXT, VISION, TEXT, PAD, VISION, PAD],
            [PAD, PAD, VISION, VISION, VISION, VISION, VISION],
        ],
        dtype=torch.int8,
    )
    text = modality == TEXT
    assert newest(text, 3).int().tolist() == [
        [0, 0, 1, 0, 0, 1, 1],
        [1, 1, 0, 1, 0, 0, 0],
        [0] * 7,
    ]
    assert newest(text, 0).int().tolist() == [[0] * 7] * 3
    assert image_borders(modality).int().tolist() == [
        [0, 0, 1, 0, 0, 1, 0],
        [0, 1, 0, 1, 0, 0, 0],
        [0] * 7,
    ]


@given(st.lists(st.integers(0, 60), max_size=40))
def test_isin_ids(wanted: list[int]) -> None:
    ids = torch.arange(-2, 64).view(2, 33)
    expected = [[value in wanted for value in row] for row in ids.tolist()]
    assert isin_ids(ids, tuple(wanted)).tolist() == expected


def grid_case(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(0, 24))
    modality = modalities(draw, batch, tokens)
    candidates = (modality != PAD) & booleans(draw, batch, tokens)
    forced = booleans(draw, batch, tokens) & booleans(draw, batch, tokens)
    budget = torch.tensor([draw(st.integers(0, 24)) for _ in range(batch)])
    return modality, candidates, forced, budget


@given(st.data(), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 2 / 3, 1.0]))
def test_grid_equals_the_reference_and_stays_in_the_budget(
    data: st.DataObject, share: float
) -> None:
    modality, candidates, forced, budget = case = grid_case(data.draw)
    grid = even_grid(*case, share)
    assert torch.equal(grid, reference.even_grid(*case, share))
    able = candidates & (modality == VISION)
    assert not (grid & ~able).any()
    k = budget.minimum(able.sum(1))
    wanted = (round(share * 1e6) * k // 1_000_000).minimum(
        (k - (able & forced).sum(1)).clamp(min=0)
    )
    assert torch.equal(grid.sum(1), wanted)
    budgets = torch.stack([torch.zeros_like(budget), budget], 1)
    kept = keep_mask(
        torch.rand(modality.shape),
        modality,
        able,
        forced,
        budgets,
        (0, int(budget.max())),
        first=grid,
    )
    assert not (grid & ~kept).any(), "a grid column was not kept"
    assert torch.equal(kept.sum(1), k.maximum((able & forced).sum(1)))


@given(st.data(), st.sampled_from([0.0, 0.1, 0.3, 0.5, 2 / 3, 1.0]))
def test_the_newest_text_equals_the_reference_and_stays_in_the_budget(
    data: st.DataObject, share: float
) -> None:
    modality, candidates, forced, budget = case = grid_case(data.draw)
    found = newest_text(*case, share)
    assert torch.equal(found, reference.newest_text(*case, share))
    able = candidates & (modality == TEXT)
    k = budget.minimum(able.sum(1))
    budgets = torch.stack([budget, torch.zeros_like(budget)], 1)
    scores, most = torch.rand(modality.shape), (int(budget.max()), 0)
    kept = keep_mask(scores, modality, able, forced, budgets, most, first=found)
    assert not (found & ~kept).any(), "a new token was not kept"
    assert torch.equal(kept.sum(1), k.maximum((able & forced).sum(1)))
    quota = (round(share * 1e6) * k // 1_000_000)[:, None]
    assert not (found & ~newest(able, quota)).any(), "more than the share"
    if share == 1.0:  # then no score decides: what the scorer "recent" keeps
        order = torch.arange(modality.shape[1]).expand(modality.shape).float()
        assert torch.equal(kept, keep_mask(order, modality, able, forced, budgets, most))


def test_forced_tokens_count_in_the_share_of_the_newest() -> None:
    modality = torch.zeros(1, 12, dtype=torch.int8)
    every, places = torch.ones(1, 12, dtype=torch.bool), torch.arange(12)[None]
    for forced, k, share, wanted in [
        (places >= 9, 6, 0.5, []),  # the three newest are forced: nothing is to be added
        (places >= 9, 8, 0.5, [8]),
        (places < 3, 6, 0.5, [9, 10, 11]),
        (places < 3, 6, 1.0, [9, 10, 11]),  # forced ones leave room for three
        (places < 5, 6, 0.5, [11]),
        (places < 7, 6, 0.5, []),
    ]:
        found = newest_text(modality, every, forced, torch.tensor([k]), share)
        assert found[0].nonzero().flatten().tolist() == wanted


def test_forced_tokens_leave_the_grid_what_remains() -> None:
    modality = torch.ones(1, 12, dtype=torch.int8)
    every, forced = torch.ones(1, 12, dtype=torch.bool), torch.arange(12)[None] < 3
    sizes = [
        even_grid(modality, every, forced, torch.tensor([k]), share).sum().item()
        for k, share in [(6, 1.0), (6, 0.5), (6, 0.2), (3, 1.0), (2, 0.5), (12, 1.0), (20, 1.0)]
    ]
    assert sizes == [3, 3, 1, 0, 0, 9, 9]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 200))
def test_grid_is_even_and_in_proportion(images: list[int], k: int) -> None:
    kinds = [kind for size in images for kind in [TEXT] + [VISION] * size]
    modality = torch.tensor([kinds], dtype=torch.int8)
    every = torch.ones_like(modality, dtype=torch.bool)
    grid = even_grid(modality, every, ~every, torch.tensor([k]), 1.0)[0]
    k, begin = min(k, sum(images)), 1
    for size in images:
        columns = grid[begin : begin + size].nonzero().flatten().tolist()
        begin += size + 1
        assert abs(len(columns) - k * size / sum(images)) < 1
        gaps = [b - a for a, b in itertools.pairwise(columns)]
        assert all(abs(gap - size / len(columns)) < 1 for gap in gaps)
        if columns:
            edges = (columns[0] + 0.5, size - columns[-1] - 0.5)
            half = size / len(columns) / 2
            assert all(abs(edge - half) <= 1 for edge in edges), "the grid is not centred"


def test_nothing_here_waits_for_the_device() -> None:
    """A fake tensor refuses .item(), nonzero and boolean indexing, which are host syncs."""
    with FakeTensorMode():
        scores = torch.rand(2, 30)
        modality = torch.zeros(2, 30, dtype=torch.int8)
        every = torch.ones(2, 30, dtype=torch.bool)
        budgets, hop = torch.ones(2, 2).long(), torch.zeros(2, 30).long()
        grid = taken_first(modality, every, every, budgets, 0.25, 0.5)
        forced = forced_tokens(
            every, prefix_tokens=2, already=budgets[:, 0], always=isin_ids(hop, (1, 2))
        )
        forced = forced | newest(modality == 0, 3) | image_borders(modality)
        forced = forced | hop_prefix_mask(every, hop, 3)
        keep = keep_mask(scores, modality, every, forced, budgets, (5, 5), grid)
        index, live = gather_index(keep, 12)
        both = budgets[:, None].expand(2, 2, 2)
        kept = compaction_keep(scores, modality, hop, every, forced, both)
        kept = capped_keep(scores, kept, [forced, every], 7)
    assert index.shape == live.shape == (2, 12)
    assert kept.shape == (2, 30)
