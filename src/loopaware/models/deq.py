"""Deep equilibrium transformer: one block with its input injected, taken to its place of rest, differentiated there.

S. Bai, J. Z. Kolter, V. Koltun, "Deep Equilibrium Models", 2019, arXiv 1909.01377; stabilised as in S. Bai, V. Koltun,
J. Z. Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", 2021, arXiv 2106.14342.

    z* = f(z*, x),   f(z, x) = LN(h + FF(h)),   h = LN(u + attention(u)),   u = z + W x

The authors add W x to queries, keys and values alone; here it is added to what the block sees, as everywhere in this
library. In: a sequence (B, T, D), embedded. Out: the place of rest, and how each sequence came there. Deliberately
elsewhere: embeddings and heads; the penalty on the Jacobian (`train.stability.jacobian(model.loop, out.carry, ...)`),
without which training drifts to where nothing contracts.
"""

from __future__ import annotations

from torch import Tensor, nn

from loopaware import body, grad, init, solve, update
from loopaware import halt as halts
from loopaware.loop import Loop
from loopaware.nn import Add, AttentionPositions, Block, Post
from loopaware.protocols import Grad, Output

__all__ = ["EquilibriumTransformer"]


class EquilibriumTransformer(nn.Module):
    """As deep as its input needs, in the memory of one layer: value = z* with z* = f(z*, x).

    Solved by Anderson's mixing forwards and backwards; a sequence has halted if its last step moved it by less than
    `tolerance`. With `model.loop.replace(grad=...)` the same weights are trained through all steps, or through one.

    Args:
        dim: features.
        heads: attention heads; divide dim.
        max_steps: evaluations of f at most.
        hidden: width of the feed-forward; None takes 4 dim.
        causal: no token sees a later one.
        positions: `Rotary`, `Relative` or None.
        dropout: share of the state's features dropped in training, one mask for all steps, so that there is a rest.
        tolerance: of the halting rule, relative; the solvers go to a tenth of it.
        grad: None takes `grad.Implicit` with Anderson both ways.

    Shapes: x (B, T, dim), mask (B, T) bool, True = real -> value (B, T, dim), steps and halted (B).

    Raises:
        ValueError: heads do not divide dim, or a number is out of range.

    >>> import torch
    >>> out = EquilibriumTransformer(8, heads=2, max_steps=60).eval()(torch.randn(2, 5, 8))
    >>> out.value.shape, out.steps.shape
    (torch.Size([2, 5, 8]), torch.Size([2]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        max_steps: int,
        *,
        hidden: int | None = None,
        causal: bool = False,
        positions: AttentionPositions | None = None,
        dropout: float = 0.0,
        tolerance: float = 1e-4,
        grad: Grad | None = None,
    ):
        super().__init__()
        block = Block(dim, heads, hidden=hidden, causal=causal, positions=positions, placement=Post())
        self.inject = nn.Linear(dim, dim)
        self.loop = Loop(
            body.Injected(block, Add()),
            max_steps,
            init=init.Zeros(),
            update=update.Dropout(update.Replace(), dropout) if dropout else update.Replace(),
            halt=halts.Converged(rtol=tolerance),
            grad=implicit(tolerance) if grad is None else grad,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Output:
        return self.loop({"x": self.inject(x), "mask": mask}, mask=mask)


def implicit(tolerance: float) -> Grad:
    """Anderson both ways. A solver measures whole sequences, the rule their worst position: hence a tenth."""
    solver = solve.Anderson(tolerance / 10)
    return grad.Implicit(solver, forward=solver)
