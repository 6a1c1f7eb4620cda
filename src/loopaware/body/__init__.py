"""What a loop computes: combinators that make bodies from blocks, and solvers whose fixed point is a solution.

In: `(state, context, index)`. Out: a proposal with the state's shapes. Any module or function of these three is a
body by itself. Solvers have a state of their own, `Iterate`, and begin with their own `start`; what they know of a
linear system is an operator (`loopaware.body.operators`). Deliberately elsewhere: the blocks and fusions
(`loopaware.nn`), how a proposal is taken (`loopaware.update`), when a solution is good enough (`halt.Below`).
"""

from loopaware.body.combine import Called, Injected, Relaxed, Stack, Surrogate, Timed
from loopaware.body.coupled import Coupled
from loopaware.body.iterate import Iterate
from loopaware.body.linear import SOR, ConjugateGradient, Corrected, GaussSeidel, Jacobi, Richardson
from loopaware.body.nonlinear import GradientDescent, Newton

__all__ = [
    "SOR",
    "Called",
    "ConjugateGradient",
    "Corrected",
    "Coupled",
    "GaussSeidel",
    "GradientDescent",
    "Injected",
    "Iterate",
    "Jacobi",
    "Newton",
    "Relaxed",
    "Richardson",
    "Stack",
    "Surrogate",
    "Timed",
]
