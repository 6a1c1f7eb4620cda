"""Solvers of linear systems A x = b as bodies: each step is the next iterate, the loop stops by the residual.

In: an operator (`loopaware.body.operators`) and, in the context, the right-hand side b as its "x". Out: bodies with the
state `Iterate`; start them with their own `start`. Every step applies A once more to compute the residual of what it
returns, so that a row which `halt.Below` has stopped is solved to its tolerance; where float32 cannot reach that, the
row does not halt. All but ConjugateGradient move by x' = x + M^-1 (b - A x), whose fixed point is the solution: under
`grad.Implicit` they have its exact gradient in b and A, and nobody builds A^-1.

A row that cannot be solved (singular, indefinite, a method that diverges on it) ends at the bound without having
halted, or, once it is no longer finite, stops the loop with an error that names it. Deliberately elsewhere: the
stopping rule, and equations that are not linear (`loopaware.body.nonlinear`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.body.iterate import Iterate, inner, norm, share
from loopaware.body.operators import Operator
from loopaware.checks import between, shown
from loopaware.protocols import Context, Init

__all__ = ["SOR", "ConjugateGradient", "Corrected", "GaussSeidel", "Jacobi", "Richardson"]

Correction = Callable[[Tensor, Context], Tensor]


class Corrected(nn.Module):
    """Any correction of the residual: x' = x + C(b - A x).

    Use it for learned steps: whatever C is, the solution stays a fixed point as long as C(0) = 0, so a learned C can be
    slow or diverge but never settle on a wrong answer. C linear and without bias treats all b alike. Mixed with a
    classical step, `Stack(SOR(operator), Corrected(operator, learned))` is x' = p + C(b - A p), p the classical one.
    The solution does not depend on C, so `grad.Implicit` teaches it nothing: unroll some steps and lessen the residual.

    Args:
        operator: A.
        correction: `(residual, context) -> change of x`; a module is registered and trained with the loop.
        guess: where x begins, an init; None for zeros.

    Shapes: context's x = b (*rows, ...) -> Iterate of the same.

    References: J.-T. Hsieh et al., "Learning Neural PDE Solvers with Convergence Guarantees", 2019, arXiv 1906.01200.

    >>> from loopaware.body.operators import Dense
    >>> body = Corrected(Dense(), lambda residual, context: residual / 2)
    >>> context = {"x": torch.ones(1, 1), "matrix": torch.full((1, 1, 1), 2.0)}
    >>> body(body.start(context), context, 0).x
    tensor([[0.5000]])
    """

    def __init__(self, operator: Operator, correction: Correction, guess: Init | None = None):
        super().__init__()
        self.operator, self.correction, self.guess = operator, correction, guess

    def start(self, context: Context) -> Iterate:
        return begun(self.operator, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        return moved(self.operator, state, state.x + self.correction(state.residual, context), context)

    def extra_repr(self) -> str:
        return described(self, "operator", "correction", "guess")


class Richardson(nn.Module):
    """Steps along the residual: x' = x + rate (b - A x).

    Gradient descent on x^T A x / 2 - b^T x. Converges for 0 < rate < 2 / (largest eigenvalue) if all are positive; the
    plainest solver, and the slowest.

    Args:
        operator: A; only applied.
        rate: length of a step, above 0.
        guess: where x begins, an init; None for zeros.

    Shapes: context's x = b (*rows, ...) -> Iterate of the same.

    Raises:
        ValueError: the rate is not above zero.

    References: L. F. Richardson, "The Approximate Arithmetical Solution by Finite Differences", 1911,
    doi 10.1098/rsta.1911.0009.

    >>> from loopaware.body.operators import Poisson
    >>> body = Richardson(Poisson(), rate=0.25)
    >>> body(body.start(torch.ones(1, 1, 1)), torch.ones(1, 1, 1), 0).x.item()
    0.25
    """

    def __init__(self, operator: Operator, rate: float, guess: Init | None = None):
        super().__init__()
        self.operator, self.guess = operator, guess
        self.rate = between("rate", rate, 0.0, math.inf, "Below 2 / (largest eigenvalue) it converges.")

    def start(self, context: Context) -> Iterate:
        return begun(self.operator, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        return moved(self.operator, state, state.x + self.rate * state.residual, context)

    def extra_repr(self) -> str:
        return described(self, "operator", "rate", "guess")


class Jacobi(nn.Module):
    """All unknowns at once, each as if the others were right: x' = x + damping D^-1 (b - A x).

    Converges where the diagonal outweighs the rest of its row. Alone it is slow (on a grid of spacing h, its error
    shrinks by cos(pi h)); damped, it is a good smoother.

    Args:
        operator: A; applied, and asked for its diagonal D.
        damping: above 0 and at most 1.
        guess: where x begins, an init; None for zeros.

    Shapes: context's x = b (*rows, ...) -> Iterate of the same.

    Raises:
        ValueError: the damping is out of range.

    References: Y. Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed. 2003, chapter 4.

    >>> from loopaware.body.operators import Poisson
    >>> body = Jacobi(Poisson())
    >>> body(body.start(torch.ones(1, 1, 1)), torch.ones(1, 1, 1), 0).x.item()
    0.25
    """

    def __init__(self, operator: Operator, damping: float = 1.0, guess: Init | None = None):
        super().__init__()
        self.operator, self.guess = operator, guess
        self.damping = between("damping", damping, 0.0, 1.0, "1 is Jacobi's own step.")

    def start(self, context: Context) -> Iterate:
        return begun(self.operator, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        change = self.damping * state.residual / self.operator.diagonal(state.x, context)
        return moved(self.operator, state, state.x + change, context)

    def extra_repr(self) -> str:
        return described(self, "operator", "damping", "guess")


class GaussSeidel(nn.Module):
    """One unknown after the other, each seeing those before it: x' = x + (D + L)^-1 (b - A x).

    Converges for every symmetric positive definite A, about twice as fast as Jacobi. In which order, and how much of it
    at once, is the operator's affair: a triangular solve for a matrix, two half-steps of a chessboard for a grid.

    Args:
        operator: A; applied and swept.
        guess: where x begins, an init; None for zeros.

    Shapes: context's x = b (*rows, ...) -> Iterate of the same.

    References: Y. Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed. 2003, chapter 4.

    >>> from loopaware.body.operators import Poisson
    >>> body = GaussSeidel(Poisson())
    >>> body(body.start(torch.ones(1, 1, 2)), torch.ones(1, 1, 2), 0).x
    tensor([[[0.2500, 0.3125]]])
    """

    def __init__(self, operator: Operator, guess: Init | None = None):
        super().__init__()
        self.operator, self.guess = operator, guess

    def start(self, context: Context) -> Iterate:
        return begun(self.operator, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        change = self.operator.sweep(state.residual, 1.0, context)
        return moved(self.operator, state, state.x + change, context)

    def extra_repr(self) -> str:
        return described(self, "operator", "guess")


class SOR(nn.Module):
    """Gauss-Seidel that goes too far on purpose: x' = x + (D / omega + L)^-1 (b - A x).

    Successive over-relaxation. Converges for every symmetric positive definite A if 0 < omega < 2; with the best omega
    (`SOR.optimal`) the steps grow with a grid's side, not with its square.

    Args:
        operator: A; applied and swept.
        omega: above 0 and below 2; 1 is Gauss-Seidel.
        guess: where x begins, an init; None for zeros.

    Shapes: context's x = b (*rows, ...) -> Iterate of the same.

    Raises:
        ValueError: omega is out of range.

    References: D. M. Young, "Iterative Methods for Solving Partial Difference Equations of Elliptic Type", 1954,
    doi 10.1090/S0002-9947-1954-0059635-7.

    >>> from loopaware.body.operators import Poisson
    >>> body = SOR(Poisson(), omega=1.5)
    >>> body(body.start(torch.ones(1, 1, 1)), torch.ones(1, 1, 1), 0).x.item()
    0.375
    """

    def __init__(self, operator: Operator, omega: float, guess: Init | None = None):
        super().__init__()
        self.operator, self.guess = operator, guess
        if not 0.0 < omega < 2.0:
            raise ValueError(f"omega must be above 0 and below 2, got {omega}. Nothing converges outside.")
        self.omega = omega

    @staticmethod
    def optimal(radius: float) -> float:
        """The best omega, 2 / (1 + sqrt(1 - radius^2)), for consistently ordered A; `radius` is Jacobi's spectral one.

        The error then shrinks by omega - 1 a step. On a grid of spacing h, radius = cos(pi h).
        """
        if not 0.0 <= radius < 1.0:
            raise ValueError(f"radius must be from 0 to below 1, got {radius}. Jacobi itself must converge.")
        return 2.0 / (1.0 + math.sqrt(1.0 - radius**2))

    def start(self, context: Context) -> Iterate:
        return begun(self.operator, self.guess, context)

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        change = self.operator.sweep(state.residual, self.omega, context)
        return moved(self.operator, state, state.x + change, context)

    def extra_repr(self) -> str:
        return described(self, "operator", "omega", "guess")


class ConjugateGradient(nn.Module):
    """The best step within all directions so far: x' = x + a p, p = z + c p_before, z = C(b - A x).

    a = (r, z) / (p, A p); c = (r, z) / (r, z)_before, 0 at first. For symmetric positive definite A, in at most n steps
    but for rounding, and far fewer where eigenvalues cluster. A row for which (p, A p) is not above zero, so that A is
    not positive definite, stays where it is and ends without having halted. Its residual is computed anew like
    every solver's here, so that a step applies A twice, where a textbook applies it once and lets the residual drift.

    Its step has no derivative at rest (0/0, taken as 0), and long backpropagation through it loses all digits there:
    give it one under `grad.Implicit`, `Surrogate(ConjugateGradient(operator), Jacobi(operator))`.

    Args:
        operator: A; only applied.
        preconditioner: C, `(residual, context) -> z`, symmetric positive definite; None for the identity.
        guess: where x begins, an init; None for zeros.

    Shapes: context's x = b (*rows, ...) -> Iterate of the same; its memory is p and (r, z).

    Raises:
        TypeError: the loop was started by another solver, without that memory.

    References: M. Hestenes, E. Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952,
    doi 10.6028/jres.049.044.

    >>> from loopaware.body.operators import Poisson
    >>> body = ConjugateGradient(Poisson())
    >>> body(body.start(torch.ones(1, 1, 2)), torch.ones(1, 1, 2), 0).x
    tensor([[[0.3333, 0.3333]]])
    """

    def __init__(self, operator: Operator, preconditioner: Correction | None = None, guess: Init | None = None):
        super().__init__()
        self.operator, self.preconditioner, self.guess = operator, preconditioner, guess

    def start(self, context: Context) -> Iterate:
        state = begun(self.operator, self.guess, context)
        return state._replace(memory=(torch.zeros_like(state.x), torch.zeros_like(state.size)))

    def forward(self, state: Iterate, context: Context, index: int) -> Iterate:
        if state.memory is None:
            raise TypeError(
                "the state of ConjugateGradient must hold its direction, got none. "
                "Start the loop with init=solver.start, that of the ConjugateGradient in it."
            )
        axes, residual = self.operator.axes, state.residual
        direction, before = state.memory
        turned = residual if self.preconditioner is None else self.preconditioner(residual, context)
        product = inner(residual, turned, axes)
        direction = turned + share(product, before.view_as(product)) * direction
        step = share(product, inner(direction, self.operator(direction, context), axes))
        state = moved(self.operator, state, state.x + step * direction, context)
        return state._replace(memory=(direction, product.view_as(before)))

    def extra_repr(self) -> str:
        return described(self, "operator", "preconditioner", "guess")


def begun(operator: Operator, guess: Init | None, context: Context) -> Iterate:
    """The state before the first step."""
    target = tree.content(context)
    size = norm(target.detach(), operator.axes)
    if guess is None:
        return Iterate(torch.zeros_like(target), target, size)
    x = guess(context)
    return Iterate(x, target - operator(x, context), size)


def moved(operator: Operator, state: Iterate, x: Tensor, context: Context) -> Iterate:
    """The state at x. What another solver remembers is passed on as a constant."""
    residual = tree.content(context) - operator(x, context)
    return Iterate(x, residual, state.size.detach(), tree.detach(state.memory))


def described(solver: nn.Module, *names: str) -> str:
    """The options that are no modules, which show themselves."""
    options = {name: getattr(solver, name) for name in names if name not in solver._modules}
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items() if value is not None)
