"""Schedules: the factor on the learning rate as a function of the step alone, so that nothing must be stored.

In: the step (from 0) and the number of steps. Out: a factor. Deliberately elsewhere: the learning rate itself, which
belongs to the optimizer's groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from loopaware.checks import between, bounded

Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Constant:
    """The same throughout: factor = 1.

    >>> Constant()(5, 10)
    1.0
    """

    def __call__(self, step: int, steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Drop:
    """Smaller at the end: factor = `factor` from the step `at` * steps on, 1 before.

    Args:
        at: share of the steps before the drop.
        factor: of the learning rate after it.

    >>> [Drop(at=0.5, factor=0.2)(step, 4) for step in range(4)]
    [1.0, 1.0, 0.2, 0.2]
    """

    at: float = 0.7
    factor: float = 0.2

    def __post_init__(self):
        between("at", self.at, 0.0, 1.0, "Give the share of steps before the drop.")
        between("factor", self.factor, 0.0, 1.0, "Give the factor after the drop.")

    def __call__(self, step: int, steps: int) -> float:
        return self.factor if step >= self.at * steps else 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a wave from 1 to `floor`: factor = floor + (1 - floor) (1 + cos(pi step / steps)) / 2.

    Args:
        floor: the factor at the end.

    References: I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2016, arXiv
    1608.03983.

    >>> Cosine()(5, 10)
    0.5
    """

    floor: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must be from 0 to 1, got {self.floor}. It is the factor at the end.")

    def __call__(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Warmup:
    """Rise first: factor = min(1, (step + 1) / count) times that of `then`.

    Args:
        count: steps of the rise.
        then: the schedule over all steps.

    Raises:
        ValueError: `count` is below one.

    >>> [Warmup(2, then=Drop(at=0.5, factor=0.1))(step, 4) for step in range(4)]
    [0.5, 1.0, 0.1, 0.1]
    """

    count: int
    then: Schedule = field(default_factory=Constant)

    def __post_init__(self):
        bounded("count", self.count, "Leave the warm-up out for none.")

    def __call__(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / self.count) * self.then(step, steps)
