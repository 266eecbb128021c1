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


def gap(rates, means, seen, layers):
    return mean(
        mean(
            (means[layer, row, hop] - rates[layer, hop]) ** 2
            for layer in layers
            for hop in range(HOPS)
            if seen[row, hop]
        )
        for row in range(BATCH)
    )


def test_the_ratio_loss_is_its_formula():
    rates, means, present, seen = case()
    expected = mean(
        mean(
            (rates[layer, hop] - 0.7) ** 2
            for layer in range(LAYERS)
            for hop in range(HOPS)
            if present[row, hop]
        )
        for row in range(BATCH)
    ) + gap(rates, means, seen, range(LAYERS))
    ours = losses.ratio_loss(rates, means, present, seen, 0.7)
    assert ours.item() == pytest.approx(float(expected))


def test_the_soft_loss_is_its_formula():
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
    ) + gap(rates, means, seen, [0, 1])
    ours = losses.soft_loss(rates, means, present, seen, 0.4, EARLY)
    assert ours.item() == pytest.approx(float(expected))


def test_the_hard_loss_is_its_formula():
    excess = torch.rand(LAYERS, BATCH, dtype=torch.float64)
    ours = losses.hard_loss(excess, EARLY, 0.1)
    expected = 0.1 * mean(excess[layer, row] for layer in (2, 3) for row in range(BATCH))
    assert ours.item() == pytest.approx(float(expected))
    assert losses.hard_loss(excess, torch.ones(LAYERS).bool(), 0.1).item() == 0


def test_means_of_groups_leave_pads_out():
    values = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    groups = torch.tensor([[[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]])
    assert losses.group_means(values, groups).tolist() == [[1.5, 3.0, 0.0]]


def test_every_loss_is_the_mean_over_its_rows():
    """So micro-batches and processes of any size add up to the whole batch."""
    rates, means, present, seen = case()
    excess = torch.rand(LAYERS, BATCH, dtype=torch.float64)

    def parts(rows):
        return torch.stack(
            [
                losses.ratio_loss(rates, means[:, rows], present[rows], seen[rows], 0.7),
                losses.soft_loss(rates, means[:, rows], present[rows], seen[rows], 0.4, EARLY),
                losses.hard_loss(excess[:, rows], EARLY, 0.1),
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
            losses.ratio_loss(r, m, present, seen, 0.7)
            + losses.soft_loss(r, m, present, seen, 0.4, EARLY)
        ),
        (rates, means),
    )
