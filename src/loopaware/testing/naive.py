"""The naive twin of the driver: one sequence at a time, rows held in Python lists, no masked arithmetic.

In: a loop and a context. Out: what the loop must return under `execute.Unrolled`, which also goes to the bound.
It shares the parts with the loop and none of its control: whatever the driver does with masks, this does with `if`.
Slow, and meant to be read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopaware import tree
from loopaware.loop import Loop
from loopaware.protocols import Carry, Output, Verdict
from loopaware.testing.tolerance import batch_size, rows_of


def naive(loop: Loop, context: Any, mask: Tensor | None = None, attached: int | None = None) -> Output:
    """Run `loop` on each sequence of the batch alone, one row at a time.

    Args:
        loop: its parts are used, its driver, gradient rule and execution are not.
        context: every tensor of it leads with the batch.
        mask: True = real.
        attached: how many last steps of each row keep their gradient; None keeps all.

    >>> loop = Loop(lambda state, context, index: state + 1, max_steps=3)
    >>> naive(loop, torch.zeros(2, 1)).value.flatten()
    tensor([3., 3.])
    """
    results = []
    for item in range(batch_size(context)):
        alone = rows_of(context, item, item + 1)
        real = None if mask is None else mask[item : item + 1]
        ends = None if attached is None else alone_run(loop, alone, real, None, 0).steps.flatten().tolist()
        results.append(alone_run(loop, alone, real, ends, attached or 0))
    axis = tree.leaves(results[0].value)[0].ndim - tree.leaves(results[0].carry.state)[0].ndim
    value = tree.map(lambda *leaves: torch.cat(leaves, axis), results[0].value, *(r.value for r in results[1:]))
    steps, halted = (torch.cat([getattr(result, name) for result in results]) for name in ("steps", "halted"))
    return Output(value, steps, halted, results[-1].carry)


def alone_run(loop: Loop, context: Any, mask: Tensor | None, ends: list[int] | None, attached: int) -> Output:
    """One sequence. `ends` are the steps its rows are known to take; before their last `attached` they are cut off."""
    carry = loop.start(context, mask)
    shape = carry.alive.shape
    alive, halted = carry.alive.flatten().tolist(), [False] * carry.alive.numel()
    steps = [0] * len(alive)
    state, update, halt, folded = carry.state, carry.update, carry.halt, carry.readout
    for index in range(loop.max_steps):
        if ends is not None:
            free = [index > end - attached for end in ends]
            kept = (state, update, halt, folded)
            state, update, halt, folded = chosen(free, kept, tree.detach(kept), shape)
        proposal = loop.body(state, context, index)
        new, new_update = loop.update(state, proposal, update)
        verdict, new_halt = loop.halt(state, new, halt, index)
        state, update, halt = chosen(alive, (new, new_update, new_halt), (state, update, halt), shape)
        stop = [bool(s) and a for s, a in zip(verdict.stop.flatten(), alive, strict=True)]
        weight = torch.stack([w if a else w * 0 for w, a in zip(verdict.weight.flatten(), alive, strict=True)])
        folded = loop.readout.fold(
            folded,
            state,
            Verdict(torch.tensor(stop).view(shape), weight.view(shape), verdict.score),
            torch.tensor(alive).view(shape),
        )
        for row in range(len(alive)):
            steps[row] += alive[row]
            halted[row] = halted[row] or stop[row]
            alive[row] = alive[row] and not stop[row]
    done = [torch.tensor(facts).view(shape) for facts in (alive, halted, steps)]
    carry = Carry(state, update, halt, folded, carry.rows, done[0], done[1], done[2], max(steps, default=0))
    return Output(loop.readout.finish(folded, carry), carry.steps, carry.halted, carry)


def chosen(flags: list[bool], yes: Any, no: Any, shape: torch.Size) -> Any:
    """Row by row the one or the other."""

    def pick(one: Tensor, other: Tensor) -> Tensor:
        if one is other:
            return one
        pairs = zip(flags, one.flatten(0, len(shape) - 1), other.flatten(0, len(shape) - 1), strict=True)
        return torch.stack([y if flag else n for flag, y, n in pairs]).unflatten(0, shape)

    return tree.map(pick, yes, no)
