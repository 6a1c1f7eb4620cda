"""Where and when a token is, told to the state of a Universal Transformer at every step.

M. Dehghani et al., "Universal Transformers", 2018, arXiv 1807.03819. In: a state (B, T, D) and the step. Out: the state
with waves or learned vectors added. Deliberately elsewhere: the waves themselves (`loopaware.nn`), and the model
(`loopaware.models.universal`), which offers these names too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loopaware.checks import bounded
from loopaware.nn import LearnedPositions, Sinusoidal

__all__ = ["Coordinates", "HalvedWaves", "tensor2tensor_signal"]

Waves = Callable[[Any], Tensor]


class Coordinates(nn.Module):
    """Tell each token where and when it is: H + positions(i) + steps(t).

    With two `nn.Sinusoidal(dim)` it is the paper's P^t. With a shift the positions of a sequence start, in training, up
    to so much later, drawn once for a run: longer sequences then hold no new positions. (tensor2tensor draws one start
    for the batch, anew at every step.) A rule in `halt.Before` is told positions without the shift.

    Args:
        positions: (T) or (B, T) long -> (..., dim); None tells none.
        steps: int -> (dim); None tells none.
        first: number of the first position and step: 1 in the paper, 0 in tensor2tensor.
        shift: the latest start.

    Shapes: state (B, T, dim), start (B) long -> (B, T, dim).

    Raises:
        ValueError: first or shift is negative.

    >>> Coordinates(steps=HalvedWaves(2))(torch.zeros(1, 1, 2), 0)
    tensor([[[0.8415, 0.5403]]])
    """

    def __init__(self, positions: Waves | None = None, steps: Waves | None = None, first: int = 1, shift: int = 0):
        super().__init__()
        self.positions = positions
        self.steps = steps
        self.first = bounded("first", first, "The paper counts from 1, tensor2tensor from 0.", least=0)
        self.shift = bounded("shift", shift, "0 lets positions start where they are.", least=0)

    def forward(self, state: Tensor, index: int, start: Tensor | None = None) -> Tensor:
        told = state
        if self.positions is not None:
            at = torch.arange(self.first, self.first + state.shape[-2], device=state.device)
            told = told + self.positions(at if start is None else at + start[:, None]).to(state)
        return told if self.steps is None else told + self.steps(self.first + index).to(state)


class HalvedWaves(nn.Module):
    """tensor2tensor's waves, sines first: PE(p, k) = sin(p r_k), PE(p, n + k) = cos(p r_k), r_k = 10000^(-k / (n - 1)).

    Shapes: positions (...) long, or an int -> (..., dim), dim = 2 n.

    Raises:
        ValueError: dim is odd or below 2.

    >>> HalvedWaves(4)(1)
    tensor([8.4147e-01, 1.0000e-04, 5.4030e-01, 1.0000e+00])
    """

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.waves = Sinusoidal(dim, 10000.0 ** (half / max(half - 1, 1)))

    def forward(self, positions: int | Tensor) -> Tensor:
        waves = self.waves(positions)
        return torch.cat([waves[..., ::2], waves[..., 1::2]], -1)


def tensor2tensor_signal(dim: int, steps: int, shift: int = 0) -> Coordinates:
    """tensor2tensor's default: halved waves for positions, a learned vector, N(0, 1), for each of so many steps.

    >>> tensor2tensor_signal(4, steps=3).first
    0
    """
    learned = LearnedPositions(steps, dim)
    nn.init.normal_(learned.table)
    return Coordinates(HalvedWaves(dim), learned, first=0, shift=shift)
