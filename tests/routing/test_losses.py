"""The auxiliary losses against their formulas, written out as loops."""

import pytest
import torch

from dare_hf.routing import losses

LAYERS, BATCH, HOPS = 4, 3, 3
EARLY = torch.tensor([True, True, False, False])


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def case():
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(LAYERS, HOPS, generator=generator, dtype=torch.float64)
    means = torch.rand(LAYERS, BATCH, HOPS, generator=generator, dtype=torch.float64)
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    seen = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
    return rates, means, present, seen


def over(there, values, summed):
    """A mean (or sum) over layers and a row's hops, averaged over rows."""
    rows = ([values(layer, row, hop) for layer, hop in pairs(there[row])] for row in range(BATCH))
    return mean(sum(row) if summed else mean(row) for row in rows)


def pairs(hops):
    return [(layer, hop) for layer in range(LAYERS) for hop in range(HOPS) if hops[hop]]


def gap(rates, means, seen, summed):
    return over(seen, lambda lay, row, hop: (means[lay, row, hop] - rates[lay, hop]) ** 2, summed)


@pytest.mark.parametrize("summed", [False, True])
def test_a_target_for_each_rate_is_its_formula(summed):
    rates, means, present, seen = case()
    expected = over(present, lambda layer, _, hop: (rates[layer, hop] - 0.7) ** 2, summed)
    expected = expected + gap(rates, means, seen, summed)
    ours = losses.rate_loss(rates, means, present, seen, 0.7, per_rate=True, summed=summed)
    assert ours.item() == pytest.approx(float(expected))


@pytest.mark.parametrize("summed", [False, True])
def test_a_target_for_the_mean_rate_is_its_formula(summed):
    rates, means, present, seen = case()
    expected = mean(
        (
            mean(
                rates[layer, hop]
                for layer in range(LAYERS)
                for hop in range(HOPS)
                if present[row, hop]
            )
            - 0.4
        )
        ** 2
        for row in range(BATCH)
    ) + gap(rates, means, seen, summed)
    ours = losses.rate_loss(rates, means, present, seen, 0.4, per_rate=False, summed=summed)
    assert ours.item() == pytest.approx(float(expected))


@pytest.mark.parametrize("summed", [False, True])
def test_the_hard_loss_is_its_formula(summed):
    *_, seen = case()
    excess = torch.rand(LAYERS, BATCH, HOPS, dtype=torch.float64)
    ours = losses.hard_loss(excess, seen, EARLY, 0.1, summed)
    late = excess.masked_fill(EARLY[:, None, None], 0.0)
    expected = 0.1 * over(seen, lambda layer, row, hop: late[layer, row, hop], summed)
    expected = expected if summed else expected * 2  # two of four layers are late
    assert ours.item() == pytest.approx(float(expected))
    assert losses.hard_loss(excess, seen, torch.ones(LAYERS).bool(), 0.1).item() == 0


def test_means_of_groups_leave_pads_out():
    values = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    groups = torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]])
    assert losses.group_means(values, groups).tolist() == [[1.5, 3.0, 0.0]]


def test_every_loss_is_the_mean_over_its_rows():
    """So micro-batches and processes of any size add up to the whole batch."""
    rates, means, present, seen = case()
    excess = torch.rand(LAYERS, BATCH, HOPS, dtype=torch.float64)

    def parts(rows):
        given = (rates, means[:, rows], present[rows], seen[rows])
        return torch.stack(
            [
                losses.rate_loss(*given, 0.7, per_rate=True),
                losses.rate_loss(*given, 0.4, per_rate=False),
                losses.hard_loss(excess[:, rows], seen[rows], EARLY, 0.1),
            ]
        )

    whole = parts(slice(None))
    apart = (parts(slice(0, 1)) + 2 * parts(slice(1, 3))) / 3
    torch.testing.assert_close(whole, apart)


def test_gradients_reach_rates_and_scores():
    rates, means, present, seen = case()
    rates.requires_grad_(True)
    means.requires_grad_(True)
    torch.autograd.gradcheck(
        lambda r, m: (
            losses.rate_loss(r, m, present, seen, 0.7, per_rate=True)
            + losses.rate_loss(r, m, present, seen, 0.4, per_rate=False)
        ),
        (rates, means),
    )
