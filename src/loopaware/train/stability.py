"""What keeps the map of a loop calm while it is taught: a penalty on its Jacobian.

In: a loop, the carry it ended with, its context. Out: one number for each row, zero for padding, to be averaged by
`objectives.mean`. Deliberately elsewhere: penalties on recorded states (`loopaware.train.objectives`), bounds on the
weights (`loopaware.nn.spectral_norm`), and the spectral radius, which is looked at (`loopaware.observe`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loopaware.checks import bounded
from loopaware.jacobian import pull, real, step
from loopaware.protocols import Carry, Context

if TYPE_CHECKING:
    from loopaware.loop import Loop

__all__ = ["jacobian"]


def jacobian(loop: Loop, carry: Carry, context: Context, probes: int = 1) -> Tensor:
    """How strongly a step reacts to the state: ||v^T J||^2 / d with v ~ N(0, I), in expectation ||J||_F^2 / d.

    J is the Jacobian of one whole step, body and update, at the state of `carry`; the update's memory is held, and
    where the state came from gets no gradient. Add about 0.1 to 1 times it to the loss of a loop that shall come to
    rest, and grow the factor if it does not. It costs a step and two backward passes through it; attention runs in its
    plain kernel, the one with second derivatives. Below one it asks for more than contraction, whose bound is the
    largest of J's singular values and not the mean of their squares.

    Where tokens halt by themselves (rows=2), J is still that of the sequence: a token's number is the share of its own
    columns, how strongly the sequence reacts to it, and the mean over tokens that of the sequence.

    Args:
        carry: `loop(context).carry`; with another state, `carry._replace(state=state)`.
        probes: how many v are drawn and averaged; one is enough for training.

    Shapes: -> (*rows), zero for padding; d counts a row's real numbers.

    Raises:
        ValueError: `probes` is below one.

    References: S. Bai et al., "Stabilizing Equilibrium Models by Jacobian Regularization", 2021, arXiv 2106.14342;
    M. F. Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1990,
    doi 10.1080/03610919008812866.

    >>> from loopaware import Loop
    >>> loop = Loop(lambda state, context, index: 2 * state, max_steps=3)
    >>> x = torch.ones(2, 1)
    >>> jacobian(loop, loop(x).carry, x, probes=4000).mean().round()
    tensor(4.)
    """
    bounded("probes", probes, "One is enough for training.")
    with sdpa_kernel(SDPBackend.MATH):
        taken = step(loop, carry, context)
        inside = [real(leaf, taken.rows) for leaf in taken.here]
        squares = []
        for _ in range(probes):
            noise = [torch.randn_like(leaf) * mask for leaf, mask in zip(taken.there, inside, strict=True)]
            pulled = pull(taken, noise, create_graph=torch.is_grad_enabled())
            squares.append(by_row([(leaf * mask).square() for leaf, mask in zip(pulled, inside, strict=True)], carry))
    return torch.stack(squares).mean(0) / by_row(inside, carry).clamp(min=1)


def by_row(leaves: list[Tensor], carry: Carry) -> Tensor:
    """The sum of each row, over all leaves, in at least float32. Shapes: leaves (*rows, ...) -> (*rows)."""
    axes = carry.rows.axes
    wide = [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
    return torch.stack([leaf.flatten(axes).sum(-1) if leaf.ndim > axes else leaf for leaf in wide]).sum(0)
