"""Ridge regression from sums over tokens, so that no token is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Strengths that are tried, as shares of the mean eigenvalue of the inputs' second moment.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Moments:
    """Sums over weighted samples of inputs x [D] with a constant 1 appended, and targets y.

    Attributes:
        inputs: Float[D+1, D+1], sum of x xᵀ.
        products: Float[D+1], sum of x y.
        squares: Sum of y².
        count: Samples.
    """

    inputs: Tensor
    products: Tensor
    squares: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        """No samples of `width` inputs."""
        size = width + 1
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, device=device))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples x Float[n, D] and y Float[n]."""
        x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        self.inputs += x.T @ x
        self.products += x.T @ y
        self.squares += float(y.square().sum())
        self.count += len(y)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.inputs + other.inputs,
            self.products + other.products,
            self.squares + other.squares,
            self.count + other.count,
        )

    def solve(self, strength: float) -> Tensor:
        """Float64[D+1], the minimiser of mean (w·x - y)² + strength * scale * |w|², bias free.

        The scale is the mean eigenvalue of the second moment, so that a strength means the same in
        every layer and model.
        """
        count = max(self.count, 1)
        second = self.inputs.double() / count
        penalty = torch.full_like(second[0], strength * float(second.diagonal()[:-1].mean()))
        penalty[-1] = 1e-9
        return torch.linalg.solve(second + penalty.diag(), self.products.double() / count)

    def error(self, weights: Tensor) -> float:
        """Mean squared error of `weights` on these samples."""
        total = self.squares - 2 * weights @ self.products.double()
        total = total + weights @ self.inputs.double() @ weights
        return float(total) / max(self.count, 1)

    def predicted(self, weights: Tensor) -> tuple[float, float]:
        """Mean and variance of what `weights` predict on these samples."""
        count = max(self.count, 1)
        mean = float(weights @ self.inputs[-1].double()) / count
        second = float(weights @ self.inputs.double() @ weights) / count
        return mean, max(second - mean**2, 0.0)

    def variance(self) -> float:
        """Variance of the targets: what the best constant leaves."""
        mean = float(self.products[-1]) / max(self.count, 1)
        return self.squares / max(self.count, 1) - mean**2


@dataclass
class CrossFitted:
    """A ridge regression whose strength is chosen on the half of the samples it has not seen.

    Attributes:
        halves: The samples, split in two.
    """

    halves: tuple[Moments, Moments]
    _turn: int = field(default=0)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> CrossFitted:
        """No samples of `width` inputs."""
        return cls((Moments.empty(width, device), Moments.empty(width, device)))

    @property
    def count(self) -> int:
        """Samples in both halves."""
        return self.halves[0].count + self.halves[1].count

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the samples of one row (a prompt); rows alternate between the halves."""
        self.halves[self._turn].add(x, y)
        self._turn = 1 - self._turn

    def predicted(self, weights: Tensor, bias: Tensor) -> tuple[float, float]:
        """Mean and variance of the predictions of Float64[D] weights and a bias on all samples."""
        one, two = self.halves
        return (one + two).predicted(torch.cat((weights, bias[None])))

    def solve(self) -> tuple[Tensor, Tensor, float]:
        """The fit on all samples.

        Returns:
            Weights Float64[D], bias Float64[], and the share of variance explained on held-out
            halves (mean of both; 0 or less: nothing was learned).
        """
        one, two = self.halves
        if not one.count or not two.count:
            weights = (one + two).solve(STRENGTHS[1])
            return weights[:-1], weights[-1], 0.0
        pairs = ((one, two), (two, one))

        def held_out(strength: float) -> float:
            return sum(test.error(train.solve(strength)) for train, test in pairs)

        strength = min(STRENGTHS, key=held_out)
        explained = 1 - held_out(strength) / max(one.variance() + two.variance(), 1e-12)
        weights = (one + two).solve(strength)
        return weights[:-1], weights[-1], explained
