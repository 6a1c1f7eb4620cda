"""Solvers of equations that are not linear, as bodies: roots and minima of a given function.

In: a function of `(x, context)` that treats each row by itself. Out: bodies with the state `Iterate`; start them with
their own `start`. Deliberately elsewhere: linear systems (`loopaware.body.linear`), the stopping rule (`halt.Below`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.body.iterate import Iterate, norm
from loopaware.body.linear import described
from loopaware.checks import between
from loopaware.protocols import Context, Init

__all__ = ["GradientDescent", "Newton"]

Function = Callable[[Tensor, Context], Tensor]


class Newton(nn.Module):
    """The root of the tangent: x' = x - J(x)^-1 f(x), J = df/dx.

    Use it near a root, where the number of right digits doubles with every step; far from one it may run away. The
    Jacobian takes one backward pass for each unknown, all at once, and n^3 operations for each row: for tens of
    unknowns. A row whose Jacobian is singular stays where it is and ends without having halted.

    Args:
        function: f, `(x, context) -> residual`, each row by itself.
        guess: where x begins, an init; None for zeros with the shape of the context's x.

    Shapes: x, f(x) (*rows, n).

    References: J. Nocedal, S. Wright, "Numerical Optimization", 2nd ed. 2006, chapter 11.

    >>> body = Newton(lambda x, target: x**2 - target, guess=lambda target: torch.ones_like(target))
    >>> body(body.start(torch.tensor([[4.0]])), torch.tensor([[4.0]]), 0).x
    tensor([[2.5000]])
    """

    def __init__(self, function: Function, guess: Init | None = None):
        super().__init__()
        self.function, self.guess = function, guess

    def start(self, context: Context) -> Iterate:
        return begun(self.function, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        matrix = jacobian(self.function, state.x, context)
        with torch.no_grad():
            singular = torch.linalg.lu_factor_ex(matrix).info != 0
        # Solved with the identity in its place, so that not even the gradient of a row that stays is nan.
        matrix = torch.where(singular[..., None, None], torch.eye(matrix.shape[-1]).to(matrix), matrix)
        change = torch.linalg.solve_ex(matrix, state.residual[..., None]).result[..., 0]
        x = state.x - torch.where(singular[..., None], 0.0, change)
        return Iterate(x, self.function(x, context), state.size.detach(), tree.detach(state.memory))

    def extra_repr(self) -> str:
        return described(self, "function", "guess")


class GradientDescent(nn.Module):
    """Downhill on a function: x' = x - rate df/dx.

    Use it as an optimizer inside a network, for the minimum of an energy that depends on the context. Its residual is
    the gradient, so `halt.Below(Iterate.absolute, ...)` stops where the ground is flat.

    Args:
        function: f, `(x, context) -> a number for each row`, each row by itself.
        rate: length of a step, above 0.
        guess: where x begins, an init; None for zeros with the shape of the context's x.

    Shapes: x (*rows, n), f(x) (*rows).

    Raises:
        ValueError: the rate is not above zero.

    References: J. Nocedal, S. Wright, "Numerical Optimization", 2nd ed. 2006, chapter 3.

    >>> body = GradientDescent(lambda x, target: (x - target).square().sum(-1), rate=0.25)
    >>> body(body.start(torch.ones(1, 2)), torch.ones(1, 2), 0).x
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, function: Function, rate: float, guess: Init | None = None):
        super().__init__()
        self.function, self.guess = function, guess
        self.rate = between("rate", rate, 0.0, math.inf, "Lower it until the loop converges.")

    def slope(self, x: Tensor, context: Context) -> Tensor:
        return torch.func.grad(lambda point: self.function(point, context).sum())(x)

    def start(self, context: Context) -> Iterate:
        return begun(self.slope, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        x = state.x - self.rate * state.residual
        return Iterate(x, self.slope(x, context), state.size.detach(), tree.detach(state.memory))

    def extra_repr(self) -> str:
        return described(self, "function", "rate", "guess")


def begun(function: Function, guess: Init | None, context: Context) -> Iterate:
    """The state before the first step; its residual's norm is what later ones are measured against."""
    x = torch.zeros_like(tree.content(context)) if guess is None else guess(context)
    residual = function(x, context)
    return Iterate(x, residual, norm(residual.detach(), 1))


def jacobian(function: Function, x: Tensor, context: Context) -> Tensor:
    """df/dx of every row at once: rows do not see each other, so the sum over them has all their Jacobians.

    Shapes: x (*rows, n) -> (*rows, n, n).
    """

    def total(point: Tensor) -> Tensor:
        return function(point, context).flatten(0, -2).sum(0)

    return torch.func.jacrev(total)(x).movedim(0, -2)
