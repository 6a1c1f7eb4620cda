"""One step of a loop as a map of its state, and products of vectors with the Jacobian of that map.

In: a loop, a carry that says where, a context. Out: the step taken anew from there, cut from whatever came before, and
v^T J for any v. Deliberately elsewhere: the penalty (`loopaware.train.stability`) and the spectral radius
(`loopaware.observe.stability`) made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopaware import tree
from loopaware.protocols import Carry, Context, Rows

if TYPE_CHECKING:
    from loopaware.loop import Loop

__all__ = ["Step", "pull", "real", "step"]


class Step(NamedTuple):
    """A step taken anew: the numbers that went in, those that came out, in the same order and shapes.

    Shapes: leaves (*rows, ...).
    """

    here: tuple[Tensor, ...]
    there: tuple[Tensor, ...]
    rows: Rows


def step(loop: Loop, carry: Carry, context: Context, memory: bool = False) -> Step:
    """Take the step at `carry` anew, by body and update, for every real row, stopped or not.

    A body that is told the index is told that of the last step that was run, so that a signal of bounded length has an
    entry for it.

    Args:
        carry: of an output, or of `loop.start`; another state is tried by `carry._replace(state=...)`.
        memory: the update's memory is part of the map too; else it is held as it is.

    >>> from loopaware import Loop
    >>> loop = Loop(lambda state, context, index: state**2, max_steps=1)
    >>> pull(step(loop, loop.start(x := torch.tensor([[3.0]])), x), [torch.ones(1, 1)])
    (tensor([[6.]]),)
    """
    carry = tree.detach(carry)
    carry = carry._replace(
        alive=carry.rows.real(carry.state), halted=torch.zeros_like(carry.halted), index=max(carry.index - 1, 0)
    )
    here = floats(carry, memory)
    for leaf in here:
        leaf.requires_grad_()
    with torch.enable_grad():
        there = floats(loop.advance(carry, context), memory)
    return Step(here, there, carry.rows)


def floats(carry: Carry, memory: bool) -> tuple[Tensor, ...]:
    """The numbers of a carry that a step maps."""
    leaves = tree.leaves((carry.state, carry.update if memory else None))
    return tuple(leaf for leaf in leaves if leaf.is_floating_point())


def pull(taken: Step, vectors: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """v^T J: what a change of each number that went in does to v^T (what came out). May be called again and again.

    Args:
        vectors: v, in the shapes of `taken.there`.
        create_graph: keep the result differentiable. Attention must then have been computed by a kernel that has second
            derivatives: take the step and the product inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    pairs = [(leaf, vector) for leaf, vector in zip(taken.there, vectors, strict=True) if leaf.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(leaf) for leaf in taken.here)
    outputs, weights = zip(*pairs, strict=True)
    found: Any = torch.autograd.grad(
        outputs, taken.here, weights, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return found


def real(leaf: Tensor, rows: Rows) -> Tensor:
    """One where a number belongs to a real position, zero at padding. Shapes: leaf (*rows, ...) -> the same."""
    mask = rows.mask
    if mask is None:
        return torch.ones_like(leaf)
    if leaf.shape[: mask.ndim] != mask.shape:  # a tensor without the positions that the mask tells apart
        mask = rows.real(leaf)
    return tree.expand(mask, leaf).expand_as(leaf).to(leaf.dtype)
