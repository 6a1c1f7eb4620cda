"""How many steps a row shall take, as distributions to draw from in training (`halt.Drawn`).

In: a few numbers. Out: the chance of each number of steps. A distribution is anything with a method `chances`, so one
of your own may read them from data. Deliberately elsewhere: the draws, who shares them, and depths that grow in
training (`loopaware.halt.drawn`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopaware.checks import between, bounded

LONGEST = 1 << 14
"""The most steps of a distribution without an end; the chance of more is given to it."""

DEEPEST = 1024
"""The largest mean of one, so that next to nothing lies beyond `LONGEST`."""


class Depth(Protocol):
    """How likely is each number of steps? Law: chances are not negative and sum to one.

    `chances()` lives on the CPU in float64, wherever the loop runs and whatever the default device is.

    Shapes: -> (N,), of 1, 2, ..., N steps.
    """

    def chances(self) -> Tensor: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same: n = steps.

    Its use is beside others: the first depth of one that grows, or an entry in a table of runs. For itself, the bound
    of the loop does the same.

    Args:
        steps: how many.

    Raises:
        ValueError: `steps` is below one.

    >>> Fixed(3).chances()
    tensor([0., 0., 1.], dtype=torch.float64)
    """

    steps: int

    def __post_init__(self):
        bounded("steps", self.steps, "A row takes one step at least.")

    def chances(self) -> Tensor:
        return listed([0.0] * (self.steps - 1) + [1.0])


@dataclass(frozen=True)
class Uniform:
    """Each number from low to high alike: n ~ U{low, ..., high}.

    The plainest way to let no depth be special.

    Args:
        low: the fewest steps.
        high: the most, itself among them.

    Raises:
        ValueError: `low` is below one, or `high` below `low`.

    >>> Uniform(2, 3).chances()
    tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)
    """

    low: int
    high: int

    def __post_init__(self):
        bounded("low", self.low, "A row takes one step at least.")
        bounded("high", self.high, "Swap low and high.", least=self.low)

    def chances(self) -> Tensor:
        count = self.high - self.low + 1
        return listed([0.0] * (self.low - 1) + [1 / count] * count)


@dataclass(frozen=True)
class Poisson:
    """Around a mean, with a short tail: n = 1 + Poisson(mean - 1), so that E[n] = mean.

    Args:
        mean: of the steps.

    Raises:
        ValueError: the mean is not from 1 to 1024.

    >>> Poisson(1.0).chances()[:2]
    tensor([1., 0.], dtype=torch.float64)
    """

    mean: float

    def __post_init__(self):
        if not 1 <= self.mean <= DEEPEST:
            raise ValueError(f"mean must be from 1 to {DEEPEST}, got {self.mean}. A row takes one step at least.")

    def chances(self) -> Tensor:
        return poisson(listed([self.mean - 1]), listed([1.0]))


@dataclass(frozen=True)
class LogNormalPoisson:
    """Huginn's: n = 1 + Poisson(r), log r ~ N(log(mean) - sigma^2 / 2, sigma^2); most often shallow, sometimes deep.

    E[r] = mean, so that E[n] = mean + 1, as in the authors' code, where a mean of 32 is named and 33 steps are taken on
    average. The chances are exact but for the integral over r, a sum of 1,301 terms.

    Args:
        mean: of r, one less than the mean of the steps.
        sigma: of the logarithm of r; it makes the tail.

    Raises:
        ValueError: the mean is not above 0 and at most 1024, or sigma not above 0 and at most 2.

    References: J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171.

    >>> chances = LogNormalPoisson(32).chances()
    >>> round(sum(n * chance for n, chance in enumerate(chances.tolist(), start=1)), 6)
    33.0
    """

    mean: float
    sigma: float = 0.5

    def __post_init__(self):
        between("mean", self.mean, 0.0, DEEPEST, "It is the mean of r, one less than that of the steps.")
        between("sigma", self.sigma, 0.0, 2.0, "The authors take 0.5; take depths.Poisson for none.")

    def chances(self) -> Tensor:
        z = torch.linspace(-6.5, 6.5, 1301, dtype=torch.float64, device="cpu")  # beyond it less than 1e-10
        rates = torch.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * z)
        return poisson(rates, torch.softmax(-z.square() / 2, 0))


def poisson(rates: Tensor, weights: Tensor) -> Tensor:
    """The chances of 1 + Poisson(r) steps, r being a rate with the chance of its weight. Shapes: (R) each -> (N)."""
    highest = rates.max().item()
    count = min(LONGEST, math.ceil(highest + 8 * math.sqrt(highest) + 32))
    counts = torch.arange(count, dtype=torch.float64, device="cpu")
    blocks = [
        (torch.special.xlogy(some[:, None], rates) - rates - torch.lgamma(some + 1)[:, None]).exp() @ weights
        for some in counts.split(1024)
    ]
    chances = torch.cat(blocks)
    chances[-1] = (1 - chances[:-1].sum()).clamp(min=0)
    return chances


def listed(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
