"""Checks of a whole loop: the laws that its parts and the driver keep together.

In: a loop and a context whose tensors lead with the batch. Out: nothing, or an AssertionError with the broken law.
Deliberately elsewhere: parts alone (`loopaware.testing.parts`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from loopaware import execute, grad, halt, readout, tree
from loopaware.loop import Loop
from loopaware.testing.naive import naive
from loopaware.testing.parts import check_module
from loopaware.testing.tolerance import assert_close, batch_size, rows_of


def check_loop(loop: Loop, context: Any, mask: Tensor | None = None) -> None:
    """Every law of a loop: naive twin, rows alone, resume, weights, stopped rows, double precision, saving.

    Args:
        loop: in evaluation mode, or without randomness.
        context: every tensor leads with the batch.
        mask: True = real.

    >>> check_loop(Loop(lambda state, context, index: state / 2, max_steps=3), torch.ones(3, 2))
    """
    check_module(loop)
    check_twin(loop, context, mask)
    check_rows(loop, context, mask)
    check_resume(loop, context, mask)
    check_stopped(loop, context, mask)
    check_double(loop, context, mask)


def check_twin(loop: Loop, context: Any, mask: Tensor | None = None) -> None:
    """The loop equals its naive twin in outputs and gradients."""
    plain = loop.replace(execute=execute.Unrolled(), grad=grad.Full())
    got, expected = plain(context, mask=mask), naive(plain, context, mask)
    assert_close(got[:3], expected[:3], "the loop equals its naive twin")
    parameters = [parameter for parameter in loop.parameters() if parameter.requires_grad]
    pair = [gradients(tree.leaves(output.value)[0], parameters) for output in (got, expected)]
    assert_close(pair[0], pair[1], "the loop has the gradients of its naive twin")


def gradients(leaf: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Those of the leaf's sum of squares; zeros where nothing was stepped, as in a batch of padding alone."""
    if not leaf.requires_grad or not parameters:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(leaf.square().sum(), parameters, materialize_grads=True)


def check_rows(loop: Loop, context: Any, mask: Tensor | None = None) -> None:
    """Batch N equals batch 1, row by row, in values and step counts."""
    loop = loop.replace(readout=readout.Weighted(), grad=grad.Full())
    whole = loop(context, mask=mask)
    for item in range(batch_size(context)):
        real = None if mask is None else mask[item : item + 1]
        alone = loop(rows_of(context, item, item + 1), mask=real)
        assert_close(alone[:3], rows_of(whole[:3], item, item + 1), "batch N equals batch 1")


def check_resume(loop: Loop, context: Any, mask: Tensor | None = None) -> None:
    """Cut anywhere, the loop goes on from its carry as if it had not been cut, to its rule's stop and to its bound."""
    plain = loop.replace(grad=grad.Full())
    for loop in (plain, plain.replace(halt=halt.Watched(plain.halt))):
        whole = loop(context, mask=mask)
        for cut in range(1, loop.max_steps + 1):
            piece = loop(context, mask=mask, max_steps=cut)
            rest = loop(context, carry=piece.carry)
            assert_close(rest[:3], whole[:3], f"cut at step {cut}, it is the same loop")


def check_stopped(loop: Loop, context: Any, mask: Tensor | None = None) -> None:
    """Weights sum to one; a stopped row stays stopped, bit for bit; padding is never stepped."""
    loop = loop.replace(readout=readout.Weighted(), grad=grad.Full())
    carry = loop.start(context, mask)
    real, taken = carry.rows.real(carry.state), torch.zeros_like(carry.steps)
    for _ in range(loop.max_steps):
        before, carry = carry, loop.advance(carry, context)
        taken = taken + before.alive
        assert not (carry.alive & ~before.alive).any(), "a stopped row stays stopped"
        assert torch.equal(carry.steps, taken), "steps counts the steps that were taken"
        assert torch.equal(carry.alive, real & ~carry.halted), "a row is alive until its rule has spoken"
        for now, then in zip(tree.leaves(carry.state), tree.leaves(before.state), strict=True):
            assert torch.equal(now[~before.alive], then[~before.alive]), "a stopped row's state stays as it is"
        weights = carry.readout[1]
        assert (weights >= 0).all() and (weights <= 1 + 1e-5).all(), "weights never sum to more than one"
        assert_close(
            weights[carry.halted], torch.ones_like(weights[carry.halted]), "weights of a stopped row sum to one"
        )
        assert not weights[~real].any(), "padding has no weight"


def check_double(loop: Loop, context: Any, mask: Tensor | None = None) -> None:
    """The same loop in float64 keeps its dtype and agrees with float32 over the first two steps."""
    double = copy.deepcopy(loop).double()
    wide = tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, context)
    with torch.no_grad():
        narrow, broad = loop(context, mask=mask, max_steps=1), double(wide, mask=mask, max_steps=1)
    for one, other in zip(tree.leaves(narrow.value), tree.leaves(broad.value), strict=True):
        assert other.dtype == torch.float64, "the state keeps its dtype"
        assert_close(other.to(one.dtype), one, "float64 agrees with float32")


def check_traceable(loop: Loop, context: Any) -> None:
    """`torch.compile(fullgraph=True)` traces the unrolled loop, and the traced loop returns the same."""
    loop = loop.replace(execute=execute.Unrolled(), grad=grad.Full())
    traced = torch.compile(loop, fullgraph=True, backend="eager")
    assert_close(traced(context)[:3], loop(context)[:3], "the traced loop equals the loop")
