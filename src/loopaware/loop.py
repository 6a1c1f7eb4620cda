"""The driver: the one place that sees all seven parts of a loop.

In: a context. Out: an `Output` with the value, the steps each row took, whether its rule stopped it, and the `Carry`
to go on from. Deliberately elsewhere: what is computed, started, updated, stopped, returned, differentiated and how it
is run; those are the parts, one module each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loopaware import execute as executes
from loopaware import grad as grads
from loopaware import halt as halts
from loopaware import init as inits
from loopaware import protocols, tree
from loopaware import readout as readouts
from loopaware import update as updates
from loopaware.checks import bounded, fitting, keeps, real_positions, same_shape, shown
from loopaware.protocols import Body, Carry, Context, Execute, Grad, Halt, Init, Output, Readout, Rows, Update, Verdict


class Loop(nn.Module):
    """A body that runs again and again on a state until each row's rule stops it, at most `max_steps` times.

    h_0 = init(x);  h_t = update(h_{t-1}, body(h_{t-1}, x, t-1));  stop if halt(h_{t-1}, h_t);  value = readout(h_1..T)

    `Loop(body, max_steps)` alone is a weight-tied stack. A loop is a module, so a body may contain loops.

    Args:
        body: the only part that must be given.
        max_steps: a loop is always bounded; a call may give another bound.
        rows: how many leading axes halt by themselves: 1 = sequences, 2 = tokens.

    Shapes: the state's leaves (*rows, ..., features).

    Raises:
        TypeError, ValueError: a part or a pair of parts that cannot work, at construction.

    >>> loop = Loop(lambda state, context, index: state / 2, max_steps=3)
    >>> loop(torch.ones(1, 2)).value
    tensor([[0.1250, 0.1250]])
    """

    def __init__(
        self,
        body: Body,
        max_steps: int,
        *,
        rows: int = 1,
        init: Init | None = None,
        update: Update | None = None,
        halt: Halt | None = None,
        readout: Readout | None = None,
        grad: Grad | None = None,
        execute: Execute | None = None,
    ):
        super().__init__()
        self.body = body
        self.max_steps = bounded("max_steps", max_steps, "A loop is always bounded.")
        self.rows = bounded("rows", rows, "Use 1 if sequences halt by themselves, 2 if tokens do.")
        self.init = inits.FromContext() if init is None else init
        self.update = updates.Replace() if update is None else update
        self.halt = halts.Never() if halt is None else halt
        self.readout = readouts.Last() if readout is None else readout
        self.grad = grads.Full() if grad is None else grad
        self.execute = executes.Eager() if execute is None else execute
        fitting(self)

    def start(self, context: Context, mask: Tensor | None = None) -> Carry:
        """The carry before the first step. Shapes: mask (*rows, ...) bool, True = real."""
        state = self.init(context)
        rows = Rows(self.rows, real_positions(mask, state, self.rows))
        return Carry(
            state=state,
            update=self.update.start(state),
            halt=self.halt.start(state, rows),
            readout=self.readout.start(state, rows),
            rows=rows,
            alive=rows.real(state),
            halted=rows.zeros(state, torch.bool),
            steps=rows.zeros(state, torch.long),
        )

    def advance(self, carry: Carry, context: Context, body: Body | None = None, fold: Readout | None = None) -> Carry:
        """One step: each row that is alive moves on, each other stays as it is. `body`, `fold`: for the loop's own."""
        alive, body = carry.alive, self.body if body is None else body
        proposal = same_shape(body(carry.state, context, carry.index), carry.state)
        state, update = self.update(carry.state, proposal, carry.update)
        verdict, halt = self.halt(carry.state, state, carry.halt, carry.index)
        halted, steps = carry.halted, carry.steps + alive
        if self.halt.stops or carry.rows.mask is not None:
            kept = (state if keeps(body, self.update) else carry.state, carry.update, carry.halt)
            state, update, halt = tree.where(alive, (state, update, halt), kept)
            unheard = alive > halted
            verdict = Verdict(verdict.stop & unheard, verdict.weight * unheard, verdict.score)
            halted = halted | verdict.stop
            alive = alive > halted
        folded = (self.readout if fold is None else fold).fold(carry.readout, state, verdict, carry.alive)
        return Carry(state, update, halt, folded, carry.rows, alive, halted, steps, carry.index + 1)

    def forward(
        self,
        context: Context,
        *,
        mask: Tensor | None = None,
        carry: Carry | None = None,
        max_steps: int | None = None,
    ) -> Output:
        """Run from the start, or go on from `carry`, until every row has stopped or `max_steps` are counted in all."""
        limit = self.max_steps if max_steps is None else bounded("max_steps", max_steps, "A loop is always bounded.")
        if carry is None:
            carry = self.start(context, mask)
        elif mask is not None:
            raise ValueError("mask must be None when a carry is given, got both. The carry holds its own mask.")
        advance = protocols.Advance(self.advance, context, self.body, self.readout)
        run = protocols.Run(
            lambda carry, steps: self.execute(advance, carry, steps),
            lambda state, index: self.body.inverse(state, context, index),  # pyright: ignore[reportAttributeAccessIssue]
            getattr(self.halt, "foreseen", None),
        )
        carry = self.grad(run, carry, max(limit - carry.index, 0))
        return Output(self.readout.finish(carry.readout, carry), carry.steps, carry.halted, carry)

    def replace(
        self,
        *,
        body: Body | None = None,
        max_steps: int | None = None,
        rows: int | None = None,
        init: Init | None = None,
        update: Update | None = None,
        halt: Halt | None = None,
        readout: Readout | None = None,
        grad: Grad | None = None,
        execute: Execute | None = None,
    ) -> Loop:
        """The same loop with other parts; everything not named is shared, weights included."""
        named: dict[str, Any] = dict(locals())
        parts = ("body", "max_steps", "rows", "init", "update", "halt", "readout", "grad", "execute")
        chosen = {name: getattr(self, name) if named[name] is None else named[name] for name in parts}
        return Loop(**chosen).train(self.training)

    def extra_repr(self) -> str:
        slots = ("max_steps", "rows", "body", "init", "update", "halt", "readout", "grad", "execute")
        return ", ".join(f"{slot}={shown(getattr(self, slot))}" for slot in slots if slot not in self._modules)
