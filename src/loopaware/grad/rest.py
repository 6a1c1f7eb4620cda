"""Gradients of a place of rest: the loop is run without a graph, and differentiated where it came to rest.

In: `run(carry, steps)`, a carry, and how many steps are left. Out: the carry after them, its state attached to few
steps, whatever number was run; values, steps and verdicts are those of the run. What moves is the state and the
update's memory together (an LSTM's cell, a momentum), so that every update that comes to rest is differentiated
rightly. Deliberately elsewhere: the solvers (`loopaware.solve`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from loopaware import solve, tree
from loopaware.checks import between, bounded
from loopaware.grad.attach import differentiable, grafted, packed, refilled, unpacked
from loopaware.protocols import Carry, Run, State

__all__ = ["Implicit", "OneStep", "Phantom"]

UNSOLVED = 0.1
"""The relative residual of a backward solve above which its gradient is called unreliable."""


@dataclass(frozen=True)
class OneStep:
    """Differentiate one step, at the place where the loop came to rest: value = h*, with the gradient of f(sg(h*)).

    The cheapest gradient, good where the loop contracts to a fixed point (Jacobian-free backpropagation). The step is
    taken for its graph alone: values, steps and verdicts are those of a plain run.

    References: S. W. Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", 2021, arXiv 2103.12803.

    >>> OneStep().complete
    False
    """

    complete = False
    final = True

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if steps < 1 or not torch.is_grad_enabled():
            return run(carry, steps)
        rest = rested(run, carry, steps)
        return grafted(rest, run(again(rest, carry), 1).state, carry)


@dataclass(frozen=True)
class Phantom:
    """Differentiate k damped steps from the place of rest: z <- (1 - r) z + r f(z), k times, from sg(h*).

    A gradient between OneStep (k = 1, r = 1) and Implicit: of the Neumann series of (I - J)^{-1} it keeps k damped
    terms, so it needs no solve and is defined where nothing contracts. Values are those of a plain run.

    Args:
        count: k.
        rate: r, above 0 and at most 1.

    Raises:
        ValueError: a number is out of range.

    References: Z. Geng et al., "On Training Implicit Models", 2021, arXiv 2111.05177.

    >>> Phantom(count=5).rate
    0.5
    """

    complete = False
    final = True
    count: int = 5
    rate: float = 0.5

    def __post_init__(self):
        bounded("count", self.count, "Without a differentiated step nothing is learned.")
        between("rate", self.rate, 0.0, 1.0, "1 takes whole steps.")

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if steps < 1 or not torch.is_grad_enabled():
            return run(carry, steps)
        rest = rested(run, carry, steps)
        now = again(rest, carry)
        for _ in range(self.count):
            out = run(now, 1)
            before, after = (differentiable(moving(each)) for each in (now, out))
            mixed = [torch.lerp(z, f, self.rate) for z, f in zip(before, after, strict=True)]
            now = settled(now, refilled(moving(out), mixed))
        return grafted(rest, now.state, carry)


@dataclass(frozen=True)
class Implicit:
    """Differentiate the place of rest itself: dL/dtheta = (dL/dz*) (I - J)^{-1} df/dtheta, J = df/dz at z* = f(z*).

    One step is differentiated, and g = g J + dL/dz* is solved in the backward pass, so memory is that of one step
    whatever the number of steps, and the gradient is exact where the loop is at rest: halt with `halt.Converged`, give
    enough steps, leave step signals and fresh dropout out (`update.Dropout` holds still). Without contraction there may
    be nothing to solve: a backward solve that ends above a tenth warns. Values are those of a plain run.

    Args:
        backward: solves for g, each sequence by itself; `solve.Anderson()` if None.
        forward: finds z* in place of the plain steps, in evaluation too, and one last step lets the loop's rule judge
            it. None runs the loop.

    Raises:
        RuntimeError: second derivatives are asked for (when it runs).

    References: S. Bai et al., "Deep Equilibrium Models", 2019, arXiv 1909.01377.

    >>> Implicit(backward=solve.Anderson(tolerance=1e-4)).forward is None
    True
    """

    complete = False
    final = True
    backward: solve.Solver | None = None
    forward: solve.Solver | None = None

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if steps < 1 or not (torch.is_grad_enabled() or self.forward):
            return run(carry, steps)
        if self.forward is None:
            rest = rested(run, carry, steps)
        else:
            rest = rested(run, solved(run, carry, steps - 1, self.forward), 1)
        return grafted(rest, self.implied(run, again(rest, carry)), carry) if torch.is_grad_enabled() else rest

    def implied(self, run: Run, rest: Carry) -> State:
        """The state after one differentiable step, whose gradient is solved for before it enters the step."""
        leaves = differentiable(moving(rest))
        free = [leaf.detach().requires_grad_() for leaf in leaves]
        out = run(settled(rest, refilled(moving(rest), free)), 1)
        ends = differentiable(moving(out))
        changed = different(ends, free)
        places, images = picked(free, changed), picked(ends, changed)
        rows = packed(images)
        if not rows.requires_grad:
            return out.state
        backward = self.backward or solve.Anderson()

        def adjoint(given: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "the gradient of grad.Implicit must not be differentiated again, got create_graph=True. "
                    "Take grad.Full or grad.Phantom for second derivatives."
                )

            def turned(g: Tensor) -> Tensor:
                found = torch.autograd.grad(rows, places, g, retain_graph=True, materialize_grads=True)
                return packed(list(found)) + given

            solution = backward(turned, given, rest.sequences)
            warn(solution)
            return solution.value

        hooked = rows.view_as(rows)
        hooked.register_hook(adjoint)
        return settled(out, refilled(moving(out), merged(ends, unpacked(hooked, images), changed))).state


def moving(carry: Carry) -> tuple:
    """What a step moves and derivatives are taken of."""
    return carry.state, carry.update


def settled(carry: Carry, moved: tuple) -> Carry:
    return carry._replace(state=moved[0], update=moved[1])


def rested(run: Run, carry: Carry, steps: int) -> Carry:
    """The carry after a plain run, without a graph."""
    with torch.no_grad():
        return tree.detach(run(carry, steps))


def again(rest: Carry, start: Carry) -> Carry:
    """The carry from which the last step is taken once more, for its graph, by all rows that were stepped."""
    return rest._replace(alive=start.alive, index=max(rest.index - 1, start.index))


@torch.no_grad()
def solved(run: Run, carry: Carry, steps: int, solver: solve.Solver) -> Carry:
    """The carry whose moving parts the solver found; a sequence's rows count its evaluations as steps."""
    if steps < 1:
        return carry
    first = run(carry, 1)
    leaves = differentiable(moving(first))
    changed = different(leaves, differentiable(moving(carry)))
    like = picked(leaves, changed)

    def at(rows: Tensor) -> Carry:
        return settled(carry, refilled(moving(first), merged(leaves, unpacked(rows, like), changed)))

    def function(rows: Tensor) -> Tensor:
        return packed(picked(differentiable(moving(run(at(rows), 1))), changed))

    solution = solver(function, packed(like), carry.sequences, steps - 1)
    taken = tree.expand(solution.steps + 1, carry.steps) * carry.alive
    index = carry.index + 1 + int(solution.steps.max())
    return tree.detach(at(solution.value))._replace(steps=carry.steps + taken, index=index)


def different(leaves: list[Tensor], others: list[Tensor]) -> list[bool]:
    """Which leaves a step made anew; what it hands on as it is (a dropout mask) does not move."""
    return [leaf is not other for leaf, other in zip(leaves, others, strict=True)]


def picked(leaves: list[Tensor], flags: list[bool]) -> list[Tensor]:
    return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]


def merged(leaves: list[Tensor], fresh: list[Tensor], flags: list[bool]) -> list[Tensor]:
    """`leaves`, those with a flag replaced by the fresh ones."""
    new = iter(fresh)
    return [next(new) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]


def warn(solution: solve.Solution) -> None:
    """Say when a gradient is not that of a place of rest. Waits for the device."""
    bad = (~(solution.residual <= UNSOLVED)).nonzero().flatten()[:8].tolist()
    if bad:
        worst = float(solution.residual.max())
        warnings.warn(
            f"the backward solve of grad.Implicit must reach a residual of {UNSOLVED}, got up to {worst:.3g} in "
            f"sequences {bad}: the loop does not contract there, and the gradient may be wrong. Penalise the Jacobian "
            "(train.stability), damp the loop (update.Damped), give the solver more steps, or take grad.Phantom.",
            RuntimeWarning,
            stacklevel=2,
        )
