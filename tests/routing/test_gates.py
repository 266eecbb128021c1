"""Gates: the soft selection's sums, limits and gradients, and the hard one's values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_hf.routing import gates
from dare_hf.routing.selection import keep_mask

T = 0.05
SUM_TOLERANCE = 1e-4
"""Of a sum of float32 gates against k."""

EXAMPLES = settings(max_examples=30)


def case(seed: int, batch: int = 2, tokens: int = 12, dtype=torch.float64):
    """Scores, candidates and forced columns of one competition per row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, tokens, generator=generator, dtype=dtype)
    candidates = torch.rand(batch, tokens, generator=generator) < 0.8
    forced = torch.rand(batch, tokens, generator=generator) < 0.2
    candidates[:, :4], forced[:, :2] = True, True
    return scores, candidates, forced


def middle(candidates, forced, share: float = 0.4):
    """A k that leaves that share of the free candidates open."""
    must = (candidates & forced).sum(-1)
    return must + share * (candidates & ~forced).sum(-1)


@EXAMPLES
@given(seed=st.integers(0, 10_000), share=st.floats(0.01, 0.99))
def test_soft_gates_sum_to_k(seed, share):
    scores, candidates, forced = case(seed, dtype=torch.float32)
    k = middle(candidates, forced, share)
    soft = gates.soft_topk(scores, k, candidates, forced, T)
    torch.testing.assert_close(soft.sum(-1), k, atol=SUM_TOLERANCE, rtol=0)
    assert (soft[candidates & forced] == 1).all()
    assert (soft[~candidates] == 0).all()
    assert ((soft >= 0) & (soft <= 1)).all()


@EXAMPLES
@given(seed=st.integers(0, 10_000))
def test_soft_gates_of_a_small_temperature_are_the_hard_selection(seed):
    scores, candidates, forced = case(seed)
    k = torch.full((2,), 6)
    hard = keep_mask(
        scores,
        torch.zeros_like(candidates, dtype=torch.int8),
        candidates,
        forced,
        torch.stack([k, torch.zeros_like(k)], dim=1),
        (6, 0),
    )
    gaps = scores.sort(-1).values.diff(dim=-1).min()
    soft = gates.soft_topk(scores, k.double(), candidates, forced, float(gaps) / 50)
    torch.testing.assert_close(soft, hard.double(), atol=1e-6, rtol=0)


@EXAMPLES
@given(seed=st.integers(0, 10_000))
def test_every_gate_rises_with_k(seed):
    scores, candidates, forced = case(seed)
    free = (candidates & ~forced).sum(-1).double()
    for select in (gates.soft_topk, gates.gumbel):
        before = torch.zeros_like(scores)
        for share in torch.linspace(-0.2, 1.2, 15):
            k = (candidates & forced).sum(-1) + float(share) * free
            now = select(scores, k, candidates, forced, T)
            assert (now >= before - 1e-9).all(), select.__name__
            before = now
        torch.testing.assert_close(before, candidates.double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("select", [gates.soft_topk, gates.gumbel])
def test_a_budget_that_leaves_nothing_or_everything_has_no_gradient(select):
    scores, candidates, forced = case(0)
    must = (candidates & forced).sum(-1).double()
    for k, value in ((must - 0.5, 0.0), (must, 0.0), (must + 50, 1.0)):
        scores.requires_grad_(True).grad = None
        k = k.requires_grad_(True)
        soft = select(scores, k, candidates, forced, T)
        soft.square().sum().backward()
        assert (soft[candidates & ~forced] == value).all()
        assert scores.grad.abs().max() == 0
        assert k.grad.abs().max() == 0


@pytest.mark.parametrize("seed", range(4))
def test_gradients_to_scores_and_k_are_finite_differences(seed):
    scores, candidates, forced = case(seed)
    k = middle(candidates, forced).double()
    scores.requires_grad_(True)
    k.requires_grad_(True)
    for select, temperature in ((gates.soft_topk, T), (gates.soft_topk, 0.5), (gates.gumbel, 0.7)):
        torch.autograd.gradcheck(
            lambda s, n, f=select, t=temperature: f(s, n, candidates, forced, t),
            (scores, k),
            atol=1e-5,
        )


def test_the_sum_moves_with_k_alone():
    """d sum / d scores is 0 and d sum / d k is 1: the implicit gradient."""
    scores, candidates, forced = case(3)
    k = middle(candidates, forced).double().requires_grad_(True)
    scores.requires_grad_(True)
    gates.soft_topk(scores, k, candidates, forced, T).sum().backward()
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-9, rtol=0)
    torch.testing.assert_close(k.grad, torch.ones_like(k))


@EXAMPLES
@given(seed=st.integers(0, 10_000))
def test_soft_gates_move_with_their_tokens(seed):
    scores, candidates, forced = case(seed)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    k = middle(candidates, forced).double()
    soft = gates.soft_topk(scores, k, candidates, forced, T)
    moved = gates.soft_topk(scores[:, order], k, candidates[:, order], forced[:, order], T)
    torch.testing.assert_close(moved, soft[:, order])


def test_competitions_do_not_see_each_other():
    scores, candidates, forced = case(1, batch=3)
    k = middle(candidates, forced).double()
    together = gates.soft_topk(scores, k, candidates, forced, T)
    for row in range(3):
        one = slice(row, row + 1)
        alone = gates.soft_topk(scores[one], k[one], candidates[one], forced[one], T)
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_straight_through_gate_is_exactly_hard(dtype):
    soft = torch.rand(50).to(dtype).requires_grad_(True)
    hard = torch.arange(50) % 3 == 0
    gate = gates.straight_through(hard, soft)
    assert gate.tolist() == hard.to(dtype).tolist()
    gate.sum().backward()
    assert (soft.grad == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_of_a_gate_is_exact_and_its_gradient_finite(dtype):
    soft = torch.tensor([0.2, 0.7], dtype=dtype, requires_grad=True)
    logs = gates.log_gates(gates.straight_through(torch.tensor([False, True]), soft))
    assert logs[1] == 0
    assert logs[0].exp().item() == pytest.approx(gates.FLOOR, rel=1e-4, abs=0)
    logs.sum().backward()
    assert soft.grad.isfinite().all()
    assert soft.grad[0].item() == pytest.approx(1 / gates.FLOOR)


def test_noise_is_seeded_and_gumbel():
    like = torch.zeros(200, 500)
    first = gates.gumbel_noise(like, torch.Generator().manual_seed(7))
    assert torch.equal(first, gates.gumbel_noise(like, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, gates.gumbel_noise(like, torch.Generator().manual_seed(8)))
    # of 1e5 draws: the mean is Euler's constant, the deviation pi / sqrt(6), each to 4 sigma
    assert first.mean() == pytest.approx(0.5772, abs=0.017)
    assert first.std() == pytest.approx(1.2825, abs=0.02)
