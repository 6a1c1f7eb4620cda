"""The exponential moving average of weights: often a better model than the last one.

In: a model while it trains. Out: averaged weights to evaluate with. Deliberately elsewhere: where they are stored
(`loopaware.train.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loopaware.checks import between


class Average:
    """Averaged weights: a = d a + (1 - d) w after each step, d = min(decay, (1 + step) / (10 + step)).

    Use it where the last steps are noisy, as in nested recursion; the rising decay lets the start be forgotten.

    Args:
        decay: above 0 and below 1.

    Raises:
        ValueError: the decay is out of range.

    References: B. T. Polyak, A. B. Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
    doi 10.1137/0330046.

    >>> average, model = Average(0.9), nn.Linear(1, 1)
    >>> average.step(model, 0)
    >>> sorted(average.weights)
    ['bias', 'weight']
    """

    def __init__(self, decay: float = 0.999):
        self.decay = between("decay", decay, 0.0, 1.0 - 1e-12, "Leave the average out for none.")
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, model: nn.Module, step: int) -> None:
        """Take in the model's weights after training step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(weight, 1 - decay)
            else:
                self.weights[name] = weight.detach().clone()

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the model have the averaged weights while the block runs."""
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        fill(model, self.weights)
        try:
            yield model
        finally:
            fill(model, own)


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in model.named_parameters():
        if name in weights:
            weight.copy_(weights[name])
