"""Fixed points of batched functions: x = f(x), each row stopped by itself, the best iterate kept.

In: a function of (B, N) tensors whose rows do not depend on each other, where to start, and which rows to solve. Out: a
`Solution`. `grad.Implicit` solves with them, forwards and backwards. Deliberately elsewhere: what the rows mean, and
loops whose own steps solve something (`loopaware.body`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loopaware.checks import between, bounded

__all__ = ["Anderson", "Broyden", "Picard", "Solution", "Solver"]

Function = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """Where a solver ended.

    Shapes: value (B, N), the iterate x with the smallest residual; residual (B), |f(x) - x| / |f(x)| there; steps (B),
    the evaluations of f that a row was solved for; solved (B) bool, whether the tolerance was reached. Rows that were
    not to be solved keep their start, and count as solved in no step.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    solved: Tensor


class Solver(Protocol):
    """Law: a row's solution depends neither on other rows nor on whether they are solved; at most `max_steps` times f.

    `active` (B) bool says which rows to solve; `limit` bounds the steps further.
    """

    @property
    def max_steps(self) -> int: ...

    def __call__(
        self, function: Function, start: Tensor, active: Tensor | None = None, limit: int | None = None, /
    ) -> Solution: ...


@dataclass(frozen=True)
class Picard:
    """Take what f says, again and again: x' = (1 - r) x + r f(x).

    Converges where f contracts, by the contraction rate in each step; never wrong where it converges, and slow near
    a rate of one.

    Args:
        tolerance: of the relative residual |f(x) - x| / |f(x)|; below 1e-5 take float64.
        max_steps: evaluations of f at most.
        rate: r, above 0 and at most 1.

    Raises:
        ValueError: a number is out of range.

    >>> Picard()(lambda x: x / 2 + 1, torch.zeros(1, 1)).value.round(decimals=4)
    tensor([[2.]])
    """

    tolerance: float = 1e-5
    max_steps: int = 200
    rate: float = 1.0

    def __post_init__(self):
        usual(self.tolerance, self.max_steps)
        between("rate", self.rate, 0.0, 1.0, "1 takes all of f.")

    def __call__(
        self, function: Function, start: Tensor, active: Tensor | None = None, limit: int | None = None, /
    ) -> Solution:
        return iterate(self, function, start, active, limit, lambda x, fx: torch.lerp(x, fx, self.rate))


@dataclass(frozen=True)
class Anderson:
    """Mix the last m evaluations so that their residuals cancel: x' = sum_i a_i ((1 - r) x_i + r f(x_i)).

    The a_i sum to one and minimise |sum_i a_i (f(x_i) - x_i)|^2 + l |a|^2, l relative to the mean square of the
    residuals. Solves linear systems about as GMRES does; the usual choice.

    Args:
        tolerance: of the relative residual |f(x) - x| / |f(x)|; below 1e-5 take float64.
        max_steps: evaluations of f at most.
        memory: m.
        rate: r, above 0 and at most 1.
        regularisation: l.

    Raises:
        ValueError: a number is out of range.

    References: D. Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965, doi 10.1145/321296.321305;
    H. Walker, P. Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011, doi 10.1137/10078356X.

    >>> Anderson()(lambda x: x / 2 + 1, torch.zeros(1, 1)).value.round(decimals=4)
    tensor([[2.]])
    """

    tolerance: float = 1e-5
    max_steps: int = 100
    memory: int = 6
    rate: float = 1.0
    regularisation: float = 1e-10

    def __post_init__(self):
        usual(self.tolerance, self.max_steps)
        bounded("memory", self.memory, "One is Picard.")
        between("rate", self.rate, 0.0, 1.0, "1 takes all of f.")
        between("regularisation", self.regularisation, 0.0, 1.0, "It keeps the mix bounded.")

    def __call__(
        self, function: Function, start: Tensor, active: Tensor | None = None, limit: int | None = None, /
    ) -> Solution:
        points, images = [], []
        memory = min(self.memory, start.shape[-1] + 1)  # more points than that say nothing new

        def mixed(x: Tensor, fx: Tensor) -> Tensor:
            points.append(x)
            images.append(fx)
            del points[:-memory], images[:-memory]
            xs, fs = torch.stack(points, 1), torch.stack(images, 1)
            shares = self.shares(fs - xs)
            return torch.lerp((shares * xs).sum(1), (shares * fs).sum(1), self.rate)

        return iterate(self, function, start, active, limit, mixed)

    def shares(self, residuals: Tensor) -> Tensor:
        """The a_i of each row. Shapes: residuals (B, m, N) -> (B, m, 1)."""
        # Squares of residuals span twice the digits, so they are summed and solved in float64.
        wide = residuals.double()
        gram = wide @ wide.mT
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        broken = ~gram.isfinite().flatten(1).all(1)[:, None, None]
        system = torch.where(broken | (scale <= 0), eye, gram / scale + self.regularisation * eye)
        shares, _ = torch.linalg.solve_ex(system, torch.ones_like(system[..., :1]))
        return (shares / shares.sum(1, keepdim=True)).to(residuals.dtype)


@dataclass(frozen=True)
class Broyden:
    """Newton's step with a Jacobian learned on the way: x' = x - K g(x), g(x) = f(x) - x.

    K begins as -1 and is mended after every step by one rank, so that it maps the last change of g to that of x
    (Broyden's good update): K += (dx - K dg) dx^T K / (dx^T K dg). When its memory is full the oldest rank is dropped.
    For stiff problems with few unknowns; no safer than Anderson far from the solution.

    Args:
        tolerance: of the relative residual |f(x) - x| / |f(x)|; below 1e-5 take float64.
        max_steps: evaluations of f at most.
        memory: ranks that are kept.

    Raises:
        ValueError: a number is out of range.

    References: C. Broyden, "A Class of Methods for Solving Nonlinear Simultaneous Equations", 1965,
    doi 10.1090/S0025-5718-1965-0198670-6.

    >>> Broyden()(lambda x: x / 2 + 1, torch.zeros(1, 1)).value.round(decimals=4)
    tensor([[2.]])
    """

    tolerance: float = 1e-5
    max_steps: int = 100
    memory: int = 30

    def __post_init__(self):
        usual(self.tolerance, self.max_steps)
        bounded("memory", self.memory, "Without a rank it is Picard.")

    def __call__(
        self, function: Function, start: Tensor, active: Tensor | None = None, limit: int | None = None, /
    ) -> Solution:
        left, right, last = [], [], []

        def times(u: list[Tensor], v: list[Tensor], vector: Tensor) -> Tensor:
            """(-1 + sum_k u_k v_k^T) vector; with the lists swapped, the transpose."""
            if not u:
                return -vector
            us, vs = torch.stack(u, 1), torch.stack(v, 1)
            return (us * (vs * vector[:, None]).sum(-1, keepdim=True)).sum(1) - vector

        def stepped(x: Tensor, fx: Tensor) -> Tensor:
            g = fx - x
            if last:
                dx, dg = x - last[0], g - last[1]
                turned, back = times(left, right, dg), times(right, left, dx)
                divisor = (dx * turned).sum(-1, keepdim=True)
                # A row that stands still has nothing to learn from; its rank is zero.
                small = divisor.abs() <= torch.finfo(x.dtype).tiny
                left.append(torch.where(small, 0.0, (dx - turned) / torch.where(small, 1.0, divisor)))
                right.append(torch.where(small, 0.0, back))
                del left[: -self.memory], right[: -self.memory]
            last[:] = [x, g]
            return x - times(left, right, g)

        return iterate(self, function, start, active, limit, stepped)


def usual(tolerance: float, max_steps: int) -> None:
    between("tolerance", tolerance, 0.0, 1.0, "Rows are solved when their relative residual is below it.")
    bounded("max_steps", max_steps, "A solver is always bounded.")


def iterate(
    solver: Picard | Anderson | Broyden,
    function: Function,
    start: Tensor,
    active: Tensor | None,
    limit: int | None,
    propose: Callable[[Tensor, Tensor], Tensor],
) -> Solution:
    """The loop that all solvers share: evaluate, keep the best, stop rows by themselves, propose the next iterate.

    A row that is solved, or whose function is no longer finite, stays where it is. Waits for the device in each step.
    """
    running = start.new_ones(len(start), dtype=torch.bool) if active is None else active
    x = best = start
    lowest = torch.where(running, math.inf, torch.zeros_like(running, dtype=start.dtype))
    solved, steps = ~running, torch.zeros_like(running, dtype=torch.long)
    for _ in range(solver.max_steps if limit is None else min(limit, solver.max_steps)):
        if not bool(running.any()):
            break
        fx = function(x)
        size = torch.linalg.vector_norm(fx, dim=-1).clamp(min=torch.finfo(fx.dtype).tiny)
        residual = torch.linalg.vector_norm(fx - x, dim=-1) / size
        steps = steps + running
        better = running & (residual < lowest)
        best, lowest = torch.where(better[:, None], x, best), torch.where(better, residual, lowest)
        solved = solved | (running & (residual <= solver.tolerance))
        running = running & ~solved & residual.isfinite()
        x = torch.where(running[:, None], propose(x, fx), x)
    return Solution(best, lowest, steps, solved)
