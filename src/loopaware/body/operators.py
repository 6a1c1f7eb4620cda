"""What a solver knows of a linear system A x = b: how to apply A, its diagonal, and how to sweep through it.

In: vectors and the context. Out: vectors. An operator keeps no matrix of its own if the context carries one, and none
at all if it is a stencil: then the same operator serves grids of every size. Any object with the methods of `Operator`
will do; a solver that asks for less says so. Deliberately elsewhere: the solvers (`loopaware.body.linear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopaware.protocols import Context

__all__ = ["Dense", "Operator", "Poisson"]


class Operator(Protocol):
    """A = L + D + U, applied to x. `axes` says how many of x's last axes are one system's unknowns.

    Every solver applies A; Jacobi asks for the diagonal too, GaussSeidel and SOR for `sweep` in its place.
    """

    @property
    def axes(self) -> int: ...

    def __call__(self, x: Tensor, context: Context, /) -> Tensor:
        """A x. Shapes: x (*rows, ...) -> the same."""
        ...

    def diagonal(self, x: Tensor, context: Context, /) -> Tensor:
        """D, in a shape that broadcasts against x."""
        ...

    def sweep(self, residual: Tensor, omega: float, context: Context, /) -> Tensor:
        """D that solves (D / omega + L) d = residual."""
        ...


@dataclass(frozen=True)
class Dense:
    """A matrix for each system, found in the context: (A x)_i = sum_j A_ij x_j, A = context["matrix"].

    Use it for small systems; a structured one is cheaper as an operator of its own.

    Shapes: x (*rows, n), context["matrix"] (*rows, n, n), or (n, n) for all.

    >>> Dense()(torch.tensor([[1.0, 2.0]]), {"matrix": torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])})
    tensor([[2., 6.]])
    """

    axes = 1

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        return (context["matrix"] @ x[..., None])[..., 0]

    def diagonal(self, x: Tensor, context: Context) -> Tensor:
        return context["matrix"].diagonal(dim1=-2, dim2=-1)

    def sweep(self, residual: Tensor, omega: float, context: Context) -> Tensor:
        matrix = context["matrix"]
        lower = matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1) / omega)
        return torch.linalg.solve_triangular(lower, residual[..., None], upper=False)[..., 0]


@dataclass(frozen=True)
class Poisson:
    """The five-point Laplacian on a grid, x = 0 around it: (A x)_ij = 4 x_ij - the four neighbours.

    h^2 times -Laplace, for any grid. A sweep takes the fields of a chessboard in turn, first those with even i + j, so
    that every field of one colour moves at once; its unknowns are ordered so, and the spectral theory holds.

    Shapes: x (*rows, height, width); the spacing is 1 / (width + 1), and b = h^2 f.

    References: D. M. Young, "Iterative Solution of Large Linear Systems", 1971, chapter 6.

    >>> Poisson()(torch.ones(1, 3, 3), None)[0]
    tensor([[2., 1., 2.],
            [1., 0., 1.],
            [2., 1., 2.]])
    """

    axes = 2

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        return 4 * x - around(x)

    def diagonal(self, x: Tensor, context: Context) -> Tensor:
        return x.new_full((), 4.0)

    def sweep(self, residual: Tensor, omega: float, context: Context) -> Tensor:
        first = board(residual)
        even = torch.where(first, residual, 0.0) * (omega / 4)
        odd = torch.where(first, 0.0, residual + around(even)) * (omega / 4)
        return even + odd


def around(x: Tensor) -> Tensor:
    """The sum of the four neighbours of each field, zeros beyond the border. Shapes: (*rows, height, width)."""
    tall = torch.nn.functional.pad(x, (0, 0, 1, 1))
    wide = torch.nn.functional.pad(x, (1, 1))
    return tall[..., :-2, :] + tall[..., 2:, :] + wide[..., :-2] + wide[..., 2:]


def board(x: Tensor) -> Tensor:
    """True where i + j is even. Shapes: x (..., height, width) -> (height, width)."""
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    return (rows[:, None] + columns) % 2 == 0
