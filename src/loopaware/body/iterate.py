"""The state of a solver: where it is, and what is left of the equation there.

In: a point x. Out: `Iterate`, whose residual is that of x itself, computed anew after every step and never updated by
recursion, so that a halting rule which reads it (`halt.Below`) is a guarantee. Deliberately elsewhere: the solvers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Iterate(NamedTuple):
    """What a solver hands from step to step: x, its residual, what that is measured against, and its own memory.

    Use `Iterate.relative` or `Iterate.absolute` as the measure of `halt.Below`. Updates that mix states (`Damped`,
    `Momentum`) keep the residual right for linear systems, where it is affine in x, and for no others.

    Shapes: x, residual (*rows, ...); size (*rows), the residual's norm at x = 0 (linear) or at the start (nonlinear).

    >>> Iterate.relative(Iterate(torch.zeros(1, 2), torch.tensor([[0.3, 0.4]]), torch.tensor([5.0])))
    tensor([0.1000])
    """

    x: Tensor
    residual: Tensor
    size: Tensor
    memory: Any = None

    def absolute(self) -> Tensor:
        """|residual| of each system. Shapes: -> (*rows)."""
        return norm(self.residual, self.residual.ndim - self.size.ndim)

    def relative(self) -> Tensor:
        """|residual| / size of each system; 0 where both are. Shapes: -> (*rows)."""
        return self.absolute() / self.size.clamp(min=torch.finfo(self.size.dtype).tiny)


def norm(vector: Tensor, axes: int) -> Tensor:
    """The Euclidean norm over the last `axes` axes."""
    return torch.linalg.vector_norm(vector.flatten(-axes), dim=-1)


def inner(one: Tensor, other: Tensor, axes: int) -> Tensor:
    """The inner product over the last `axes` axes, which stay with size one."""
    return (one * other).sum(tuple(range(-axes, 0)), keepdim=True)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Part / whole where whole is above zero, else 0, in the gradient too."""
    positive = whole > 0
    return torch.where(positive, part / torch.where(positive, whole, 1.0), 0.0)
