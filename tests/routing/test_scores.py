"""Laws of the score functions, each against its loop-written reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dare_hf.routing import PAD, TEXT, VISION, reference
from dare_hf.routing.scores import (
    attention_scores,
    key_norm_scores,
    position_scores,
    random_scores,
    recent_scores,
    router_scores,
)

# One fp32 reduction over at most 64 numbers, against Python's float64.
FP32 = {"rtol": 1e-5, "atol": 1e-6}
# The same numbers in another batch shape: the order of a sum may differ, nothing else.
RESHAPED = {"rtol": 1e-6, "atol": 1e-7}

seeds = st.integers(0, 2**32 - 1)


def close(actual: Tensor, expected: Tensor, tolerance: dict[str, float] = FP32) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance)


def kinds(batch: int, tokens: int) -> Tensor:
    return torch.randint(PAD, VISION + 1, (batch, tokens)).to(torch.int8)


@given(seeds, st.integers(1, 3), st.integers(0, 6), st.integers(1, 33), st.booleans())
def test_router_equals_the_reference(
    seed: int, batch: int, tokens: int, dim: int, normalize: bool
) -> None:
    torch.manual_seed(seed)
    arguments = (
        torch.randn(batch, tokens, dim),
        torch.randn(2, dim),
        torch.randn(2),
        kinds(batch, tokens),
        normalize,
    )
    close(router_scores(*arguments), reference.router_scores(*arguments))


def test_router_reads_the_row_of_the_modality() -> None:
    hidden, modality = torch.ones(1, 3, 4), torch.tensor([[TEXT, VISION, PAD]])
    weight = torch.stack([torch.zeros(4), torch.ones(4)])
    scores = router_scores(hidden, weight, torch.tensor([0.0, 1.0]), modality, True)
    close(scores[:, :2], torch.tensor([[0.0, 5.0]]).sigmoid())
    assert scores.isfinite().all()


def test_router_of_a_zero_state_is_the_bias() -> None:
    modality = torch.zeros(1, 2, dtype=torch.int8)
    bias = torch.tensor([0.5, 0.0])
    scores = router_scores(torch.zeros(1, 2, 4), torch.randn(2, 4), bias, modality, True)
    close(scores, bias[:1].sigmoid().expand(1, 2))


def test_router_survives_massive_activations() -> None:
    hidden = torch.randn(1, 8, 64)
    weight, bias = torch.randn(2, 64), torch.zeros(2)
    modality = torch.zeros(1, 8, dtype=torch.int8)
    small = router_scores(hidden, weight, bias, modality, True)
    large = router_scores(hidden * 1000, weight, bias, modality, True)
    close(large, small)
    literal = router_scores(hidden * 1000, weight, bias, modality, False)
    assert ((literal == 0) | (literal == 1)).any(), "the literal form is not normalised"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_router_computes_in_fp32(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 5, 32).to(dtype)
    weight, bias = torch.randn(2, 32), torch.randn(2)
    modality = kinds(2, 5)
    expected = router_scores(hidden.float(), weight, bias, modality, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = router_scores(hidden, weight, bias, modality, True)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_router_passes_gradients() -> None:
    weight = torch.randn(2, 16, requires_grad=True)
    hidden = torch.randn(1, 4, 16, requires_grad=True)
    modality = torch.tensor([[TEXT, VISION, TEXT, VISION]])
    router_scores(hidden, weight, torch.zeros(2), modality, True).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum(1).gt(0).all()
    assert hidden.grad is not None


@given(st.integers(-(2**70), 2**70), st.integers(0, 200), st.integers(1, 40))
def test_random_equals_the_reference(seed: int, layer: int, tokens: int) -> None:
    index = torch.arange(tokens).expand(2, tokens)
    scores = random_scores(seed, layer, index)
    assert torch.equal(scores, reference.random_scores(seed, layer, index))
    assert torch.equal(scores[0], scores[1])
    assert ((scores >= 0) & (scores < 1)).all()


def test_random_is_spread_and_differs_by_seed_and_layer() -> None:
    index = torch.arange(4096)[None]
    draws = [random_scores(seed, layer, index)[0] for seed in (0, 1, 2**40) for layer in (0, 1)]
    for draw in draws:
        # 16 bins of 256 on average, standard deviation 15.5: six of them.
        assert (torch.histc(draw, 16, 0, 1) - 256).abs().max() < 93
        assert draw.unique().numel() > 4090
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.1, "1 / sqrt(4096) is 0.016"


def test_random_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    random_scores(0, 0, torch.arange(9)[None])
    assert torch.equal(torch.get_rng_state(), before)


def test_recent_rises_with_the_index_also_where_floats_are_coarse() -> None:
    index = torch.tensor([[0, 1, 2, 131_071, 131_072, 2**24 - 2, 2**24 - 1]])
    scores = recent_scores(index)
    assert torch.equal(scores, reference.recent_scores(index))
    assert (scores.diff() > 0).all()
    assert 0 <= scores.min() <= scores.max() < 1


def test_position_falls_with_the_index() -> None:
    index = torch.arange(6000)[None]
    scores = position_scores(index)
    assert (scores[0, 1:] < scores[0, :-1]).all()
    close(scores, reference.position_scores(index))


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_key_norm_equals_the_reference(seed: int, batch: int, heads: int, tokens: int) -> None:
    torch.manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, 8)
    close(key_norm_scores(keys), reference.key_norm_scores(keys))


def attention_case(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 3,
    stored: int = 7,
) -> dict[str, Tensor | float]:
    torch.manual_seed(seed)
    heads = kv_heads * group
    return {
        "query": torch.randn(batch, heads, queries, 8),
        "key": torch.randn(batch, kv_heads, stored, 8),
        "value": torch.randn(batch, kv_heads, stored, 5),
        "visible": torch.rand(batch, heads if seed % 2 else 1, queries, stored) > 0.4,
        "query_valid": torch.rand(batch, queries) > 0.3,
        "span": torch.rand(batch, stored) > 0.3,
        "scaling": 0.35,
    }


@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 7),
    st.sampled_from([None, 0.7]),
    st.booleans(),
)
def test_attention_equals_the_reference(
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    stored: int,
    softcap: float | None,
    sinks: bool,
) -> None:
    case = attention_case(
        seed, batch=batch, kv_heads=kv_heads, group=group, queries=queries, stored=stored
    )
    case |= {"softcap": softcap, "sinks": torch.randn(kv_heads * group) if sinks else None}
    scores = attention_scores(**case)
    close(scores, reference.attention_scores(**case))
    assert scores.isfinite().all()
    assert (scores[~case["span"]] == 0).all()


def test_attention_mean_over_the_seen_span_is_one() -> None:
    case = attention_case(3) | {"query_valid": torch.ones(2, 3, dtype=torch.bool)}
    seen = case["span"] & case["visible"].any(2).any(1)
    scores = attention_scores(**case)
    for row in range(2):
        assert seen[row].any()
        close(scores[row][seen[row]].mean(), torch.tensor(1.0))


def test_attention_ignores_padding_and_other_rows() -> None:
    case = attention_case(5)
    scores = attention_scores(**case)
    alone = {
        name: value[1:] if isinstance(value, Tensor) else value for name, value in case.items()
    }
    close(attention_scores(**alone)[0], scores[1], RESHAPED)
    pad = torch.nn.functional.pad
    padded = case | {
        "key": pad(case["key"], (0, 0, 4, 0), value=100.0),
        "value": pad(case["value"], (0, 0, 4, 0), value=100.0),
        "visible": pad(case["visible"], (4, 0)),
        "span": pad(case["span"], (4, 0)),
    }
    close(attention_scores(**padded)[:, 4:], scores, RESHAPED)


def test_attention_of_queries_that_do_not_count() -> None:
    case = attention_case(7)
    nobody = case | {"query_valid": torch.zeros(2, 3, dtype=torch.bool)}
    assert (attention_scores(**nobody) == 0).all()
    blind = case | {"visible": torch.zeros_like(case["visible"])}
    assert (attention_scores(**blind) == 0).all()
    noisy = dict(case)
    noisy["query"] = torch.where(
        case["query_valid"][:, None, :, None], case["query"], torch.full((), float("nan"))
    )
    assert torch.equal(attention_scores(**noisy), attention_scores(**case))


def test_attention_ignores_what_an_unused_slot_holds() -> None:
    case = attention_case(7)
    case["visible"][..., 2], case["span"][:, 2] = False, False
    expected = attention_scores(**case)
    case["key"][:, :, 2], case["value"][:, :, 2] = float("nan"), float("nan")
    assert torch.equal(attention_scores(**case), expected)


def test_attention_uses_each_heads_own_values() -> None:
    case = attention_case(1, batch=1, group=2, queries=1, stored=2) | {
        "key": torch.zeros(1, 2, 2, 8),
        "value": torch.tensor([[[[4.0], [1.0]], [[1.0], [4.0]]]]),
        "query_valid": torch.ones(1, 1, dtype=torch.bool),
        "span": torch.ones(1, 2, dtype=torch.bool),
    }
    # The first kv head's queries see only column 0, the second one's only column 1.
    case["visible"] = torch.tensor([[[[1, 0]], [[1, 0]], [[0, 1]], [[0, 1]]]]).bool()
    close(attention_scores(**case), torch.tensor([[1.0, 1.0]]))
    case["value"] = torch.tensor([[[[4.0], [1.0]], [[1.0], [2.0]]]])
    close(attention_scores(**case), torch.tensor([[4.0, 2.0]]) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_in_other_types(dtype: torch.dtype) -> None:
    case = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in attention_case(2).items()
    }
    scores = attention_scores(**case)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    close(scores, reference.attention_scores(**case))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_scores(**case), scores)


def test_no_score_waits_for_the_device() -> None:
    """A fake tensor refuses .item(), nonzero and boolean indexing, which are host syncs."""
    with FakeTensorMode():
        index, modality = torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.int8)
        query, key = torch.rand(1, 4, 2, 8), torch.rand(1, 2, 6, 8)
        valid, span = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
        visible = torch.ones(1, 1, 2, 6, dtype=torch.bool)
        scores = [
            router_scores(torch.rand(1, 6, 8), torch.rand(2, 8), torch.rand(2), modality, True),
            random_scores(0, 0, index),
            position_scores(index),
            key_norm_scores(key),
            attention_scores(query, key, key, visible, valid, span, 0.5),
        ]
    assert all(score.shape == (1, 6) for score in scores)
