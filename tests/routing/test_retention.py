"""Laws of the budget and of the retention table."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_hf.errors import DareConfigError
from dare_hf.routing import TEXT, VISION, reference
from dare_hf.routing.retention import (
    MIN_RATE,
    RetentionTable,
    budget,
    build_table,
    learned_table,
    resolve_cut_layer,
    whole_layers,
)

# Sums of at most 64 floats of size 1.
MEAN_TOLERANCE = 1e-12

rates = st.floats(min_value=1e-3, max_value=1.0)
counts = st.integers(0, 5000)
depths = st.integers(1, 64)


def table(num_layers: int, schedule: object = "two_stage", **changes: object) -> RetentionTable:
    settings = {"vision_retention": 0.4, "text_retention": 0.7} | changes
    return build_table(num_layers, schedule=schedule, **settings)


@given(rates, counts)
def test_budget_equals_the_reference(rate: float, count: int) -> None:
    assert budget(rate, count) == reference.budget(rate, count)


@given(rates, rates, counts)
def test_budget_rises_with_the_rate(one: float, other: float, count: int) -> None:
    low, high = sorted((one, other))
    assert budget(low, count) <= budget(high, count)


@given(counts)
def test_budget_bounds(count: int) -> None:
    assert budget(1.0, count) == count
    assert budget(MIN_RATE, count) == min(1, count)


@pytest.mark.parametrize(
    ("rate", "count", "kept"),
    [(0.07, 100, 7), (0.55, 100, 55), (0.4, 576, 231), (0.5, 3, 2), (0.25, 4, 1), (0.3, 0, 0)],
)
def test_budget_is_not_off_by_float_noise(rate: float, count: int, kept: int) -> None:
    assert budget(rate, count) == kept


def hold_mean(made: RetentionTable, target: float, runs: list[int] | None = None) -> None:
    """The mean over the layers of a model is the target, or the nearest that is left."""
    runs = [1] * len(made.plan_layers) if runs is None else runs
    whole = sum(n for n, free in zip(runs, made.free_layers, strict=True) if not free)
    for row in (made.vision[0], made.text[0]):
        assert all(0 < rate <= 1 for rate in row)
        mean = sum(n * rate for n, rate in zip(runs, row, strict=True)) / sum(runs)
        nearest = max(target, whole / sum(runs))
        # a rate that is clamped from 0 to MIN_RATE adds as much
        assert mean == pytest.approx(nearest, abs=MIN_RATE + MEAN_TOLERANCE)
        if MIN_RATE not in row:
            assert mean == pytest.approx(nearest, abs=MEAN_TOLERANCE)


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=40),
    rates,
    st.floats(0.01, 0.99),
    st.sampled_from(["two_stage", "safe", "ramp", "constant"]),
    st.booleans(),
    st.sets(st.integers(0, 39), max_size=4),
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_the_mean_is_what_was_named(
    runs: list[int],
    target: float,
    cut: float,
    schedule: str,
    history: bool,
    whole: set[int],
    every: int,
    first: int,
) -> None:
    fields = {"cut_layer": cut, "runs": runs, "vision_retention": target, "text_retention": target}
    depth = len(runs)
    fields["first_whole"] = first = min(first, depth - 1)
    made = table(
        depth, schedule, scorer_needs_history=history, whole=whole, plan_every=every, **fields
    )
    assert all(not made.free_layers[layer] for layer in {*whole, *range(first)} if layer < depth)
    if schedule == "constant" and first == 0:
        expected = tuple(target if free else 1.0 for free in made.free_layers)
        assert made.vision[0] == made.text[0] == expected
    elif schedule != "constant" or not whole:
        hold_mean(made, target, runs)
    shared = table(depth, "two_stage", plan_every=every, shares_rates=True, **fields)
    pairs = [list(zip(shared.text[0], shared.vision[0], strict=True))]
    learned = learned_table(pairs, plan_every=every, first_whole=first)
    assert learned.text[0][:first] == learned.vision[0][:first] == (1.0,) * first
    hold_mean(learned, target, runs)


@given(depths, st.floats(0.01, 0.99), st.booleans())
def test_target_one_keeps_everything(num_layers: int, cut: float, history: bool) -> None:
    made = table(
        num_layers,
        vision_retention=1.0,
        text_retention=1.0,
        cut_layer=cut,
        scorer_needs_history=history,
    )
    assert made.vision == made.text == ((1.0,) * num_layers,)
    assert made.plan_layers == tuple(range(num_layers)), "plan_every is 1"


@given(depths, rates, rates, st.booleans())
def test_two_stage_rises_with_the_target(
    num_layers: int, one: float, other: float, history: bool
) -> None:
    low, high = (
        table(num_layers, vision_retention=target, scorer_needs_history=history).vision[0]
        for target in sorted((one, other))
    )
    assert all(a <= b + MEAN_TOLERANCE for a, b in zip(low, high, strict=True))


def test_two_stage_late_layers_have_a_quarter() -> None:
    made = table(12)
    assert len(set(made.vision[0][:7])) == len(set(made.vision[0][7:])) == 1, "cut is L // 2 = 6"
    assert made.vision[0][7] == made.vision[0][6] / 4
    assert made.text[0] == (pytest.approx(0.7),) * 12


def test_attention_keeps_the_first_two_layers() -> None:
    made = table(12, scorer_needs_history=True)
    assert made.free_layers == (False, False) + (True,) * 10
    assert made.vision[0][:2] == made.text[0][:2] == (1.0, 1.0)
    early, late = made.vision[0][2], made.vision[0][7]
    assert late == early / 4
    assert 2 + 5 * early + 5 * late == pytest.approx(0.4 * 12)


def test_two_stage_clamps_without_an_error() -> None:
    made = table(4, vision_retention=0.1, scorer_needs_history=True)
    assert made.vision[0] == (1.0, 1.0, MIN_RATE, MIN_RATE)
    assert made.mean(VISION) == pytest.approx(0.5, abs=1e-5)


def test_two_stage_moves_what_the_first_stage_cannot_hold() -> None:
    made = table(12, vision_retention=0.8)
    assert made.vision[0][:7] == (1.0,) * 7
    assert made.vision[0][7:] == (pytest.approx(0.52),) * 5


@pytest.mark.parametrize("num_layers", [3, 9, 12, 27, 30])
@pytest.mark.parametrize("history", [False, True])
def test_safe_at_its_default_is_thirds(num_layers: int, history: bool) -> None:
    fields = {"vision_retention": 7 / 12, "text_retention": 1.0}
    made = table(num_layers, "safe", scorer_needs_history=history and num_layers > 3, **fields)
    third = num_layers // 3
    assert made.text == ((1.0,) * num_layers,)
    assert made.vision[0] == pytest.approx([1.0] * third + [0.5] * third + [0.25] * third)
    assert made.vision[0][:third] == (1.0,) * third, "a layer of rate 1 is left alone"


@given(depths, rates)
def test_safe_keeps_its_shape(num_layers: int, target: float) -> None:
    row = table(num_layers, "safe", vision_retention=target).vision[0]
    first, second, third = row[0], row[math.ceil(num_layers / 3) :], row[-1]
    assert list(row) == sorted(row, reverse=True)
    if first < 1 and num_layers > 2:
        assert second[0] == pytest.approx(first / 2)
        assert third == pytest.approx(first / 4)


@given(st.integers(1, 64), rates, st.integers(0, 5), st.sets(st.integers(0, 63)), st.integers(1, 9))
def test_ramp_is_linear_and_as_steep_as_it_can_be(
    depth: int, target: float, first: int, whole: set[int], every: int
) -> None:
    first = min(first, depth - 1)
    fields = {"vision_retention": target, "text_retention": target, "first_whole": first}
    made = table(depth, "ramp", whole=whole, plan_every=every, **fields)
    assert made.vision == made.text
    row, free = made.text[0], [layer for layer, own in enumerate(made.free_layers) if own]
    points = [(max(layer - layer % every, first), row[layer]) for layer in free]
    if len({at for at, _ in points}) < 2 or MIN_RATE in row:
        return
    (start, high), (end, low) = points[0], points[-1]
    for at, rate in points:  # on the line from the first to the last
        assert rate == pytest.approx(high + (low - high) * (at - start) / (end - start), abs=1e-9)
    assert high == pytest.approx(1.0) or low == pytest.approx(0.3 * high)
    assert low >= 0.3 * high - 1e-9


def test_ramp_by_hand() -> None:
    fields = {"vision_retention": 0.55, "text_retention": 0.75, "first_whole": 2}
    made = table(12, "ramp", **fields)
    assert made.free_layers == (False, False) + (True,) * 10
    assert made.text[0] == pytest.approx([1, 1] + [1 - 0.6 * place / 9 for place in range(10)])
    steep = [0.46 * 2 / 1.3 * (1 - 0.7 * place / 9) for place in range(10)]
    assert made.vision[0] == pytest.approx([1, 1, *steep])
    assert made.plan_layers == tuple(range(12)), "each layer has a rate of its own"
    shared = table(12, "ramp", plan_every=4, **fields)
    assert shared.plan_layers == (0, 0, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8)
    assert shared.mean(TEXT) == pytest.approx(0.75)


def test_a_learned_plan_begins_behind_the_whole_layers() -> None:
    made = learned_table([[(0.5, 0.25)] * 7], plan_every=4, first_whole=2)
    assert made.plan_layers == (0, 0, 2, 2, 4, 4, 4)
    assert made.text == ((1.0, 1.0) + (0.5,) * 5,)
    assert made.free_layers == (False,) * 2 + (True,) * 5


@pytest.mark.parametrize("schedule", ["safe", "two_stage", "ramp", "learned", "constant", [(1, 1)]])
@pytest.mark.parametrize("depth", [1, 7, 8, 30])
def test_whole_layers_of_a_schedule(schedule: object, depth: int) -> None:
    literal = schedule == "constant" or not isinstance(schedule, str)
    assert whole_layers("auto", schedule, depth) == (0 if literal or depth < 8 else 2)
    assert [whole_layers(named, schedule, depth) for named in (0, 3)] == [0, 3]


def test_first_layers_of_constant_and_lists_are_whole_where_that_is_named() -> None:
    made = table(5, "constant", first_whole=1)
    assert made.text[0] == (1.0, *[pytest.approx((0.7 * 5 - 1) / 4)] * 4)
    made = table(3, ((0.2, 0.5), (0.5, 0.25), (0.1, 1.0)), first_whole=1)
    assert made.vision == ((1.0, 0.5, 0.1),)
    assert made.text == ((1.0, 0.25, 1.0),)


def test_constant_leaves_no_layer_out() -> None:
    made = table(5, "constant", scorer_needs_history=True)
    assert made.vision == ((0.4,) * 5,)
    assert made.text == ((0.7,) * 5,)
    assert all(made.free_layers)


def test_list_is_taken_as_given() -> None:
    made = table(3, ((1.0, 0.5), (0.5, 0.25), (0.1, 1.0)), scorer_needs_history=True)
    assert made.vision == ((1.0, 0.5, 0.1),)
    assert made.text == ((0.5, 0.25, 1.0),)


def test_schedule_refusals() -> None:
    with pytest.raises(DareConfigError, match=r"4 layers, got 3 pairs"):
        table(4, ((1.0, 1.0),) * 3)
    with pytest.raises(DareConfigError, match="adapter"):
        table(4, "learned")
    with pytest.raises(DareConfigError, match="got 'other'"):
        table(4, "other")


def test_decay_begins_after_hop_one_and_only_for_vision() -> None:
    made = table(6, "constant", hop_decay=0.5, max_hops=4)
    assert [made.rate(hop, 0, VISION) for hop in range(6)] == [0.4, 0.4, 0.2, 0.1, 0.1, 0.1]
    assert [made.rate(hop, 0, TEXT) for hop in range(6)] == [0.7] * 6
    assert made.mean(VISION, hop=2) == pytest.approx(0.2)


def test_decay_leaves_fixed_layers_alone() -> None:
    made = table(6, "safe", hop_decay=0.5, max_hops=3, scorer_needs_history=True, plan_every=3)
    assert made.vision[2][:2] == (1.0, 1.0)
    made = table(9, "safe", hop_decay=0.5, max_hops=3, scorer_needs_history=True, plan_every=9)
    assert made.plan_layers[:3] == (0, 0, 2), "layer 2 decays at hop 2, layer 1 does not"


def test_decay_never_reaches_zero() -> None:
    made = table(2, "constant", hop_decay=1e-9, max_hops=60)
    assert made.rate(59, 0, VISION) == MIN_RATE


@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from(["two_stage", "safe", "ramp", "constant"]),
    st.booleans(),
    st.sampled_from([0.5, 1.0]),
)
def test_a_reused_plan_has_the_rates_of_its_layer(
    num_layers: int, every: int, schedule: str, history: bool, decay: float
) -> None:
    made = table(
        num_layers,
        schedule,
        plan_every=every,
        scorer_needs_history=history,
        hop_decay=decay,
        max_hops=4,
    )
    for layer, plan in enumerate(made.plan_layers):
        assert plan <= layer
        assert made.plan_layers[plan] == plan
        assert layer % every != 0 or plan == layer
        for hop in range(4):
            for modality in (TEXT, VISION):
                assert made.rate(hop, layer, modality) == made.rate(hop, plan, modality)


def test_plan_every_starts_anew_at_each_stage() -> None:
    made = table(12, plan_every=4)
    assert made.plan_layers == (0, 0, 0, 0, 4, 4, 4, 7, 8, 8, 8, 8)
    assert table(12, "safe", plan_every=4).plan_layers == (0,) * 4 + (4,) * 4 + (8,) * 4


@pytest.mark.parametrize(
    ("given_cut", "num_layers", "cut"),
    [
        ("auto", 12, 6),
        ("auto", 1, 0),
        ("auto", 5, 2),
        (0.5, 12, 6),
        (0.99, 3, 2),
        (0, 4, 0),
        (3, 4, 3),
    ],
)
def test_cut_layer(given_cut: object, num_layers: int, cut: int) -> None:
    assert resolve_cut_layer(given_cut, num_layers) == cut


@pytest.mark.parametrize("cut", [4, -1, 1.0, 0.0, True, "half"])
def test_cut_layer_outside_the_model(cut: object) -> None:
    with pytest.raises(DareConfigError, match=r"cut_layer .*\[0, 3\].*4 layers"):
        resolve_cut_layer(cut, 4)
