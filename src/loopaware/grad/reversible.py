"""Steps that are undone in the backward pass, so that their states need not be kept.

In: a `run` that knows the body's inverse, a carry, and how many steps are left. Out: the carry after them, attached to
every step. Deliberately elsewhere: bodies with an inverse (`body.Coupled`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopaware import tree
from loopaware.grad.attach import random_state, restore
from loopaware.protocols import Carry, Run, State

__all__ = ["Reversible"]


@dataclass(frozen=True)
class Reversible:
    """Differentiate every step and keep only the last state: earlier ones are computed back, h_{t-1} = F^{-1}(h_t).

    The gradient of Full for about twice its time, and the memory of one step and one state, however many steps; what
    rules and readouts remember is kept for each step, so take `readout.Last`. Random numbers come again step by step,
    also where one block runs many times in a row. Each step back rounds once more: in float32 gradients of 64 steps
    agree to about 1e-5, and a body that shrinks its state much in a step cannot be undone.

    Raises:
        ValueError: in a Loop, a body without an inverse (take `body.Coupled`) or another update than `update.Replace`.

    References: A. Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations", 2017,
    arXiv 1707.04585; N. Kitaev et al., "Reformer: The Efficient Transformer", 2020, arXiv 2001.04451.

    >>> Reversible().complete
    True
    """

    complete = True
    final = False
    inverts = True

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if not torch.is_grad_enabled():
            return run(carry, steps)
        return Past(run).forward(carry, steps)


class Past:
    """The carries of a run without their states; a state is computed back from the one after it when it is asked for.

    Nothing here holds a graph: the graph holds this, and neither would ever be freed.
    """

    def __init__(self, run: Run):
        self.run = run
        self.now: Carry | None = None
        self.kept: list[Carry] = []
        self.states: dict[int, State] = {}
        self.attached: list[list[bool]] = []

    def forward(self, carry: Carry, steps: int) -> Carry:
        for number in range(steps):
            self.now = carry
            self.attached.append([leaf.requires_grad for leaf in tree.leaves(carry)])
            self.kept.append(tree.detach(carry)._replace(state=tree.map(lambda _: None, carry.state)))
            # `alive` is passed so that the generator of its device is replayed too.
            out = checkpoint(self.step, number, carry.alive, use_reentrant=False)
            if out.index == carry.index:  # nobody was alive
                break
            carry = out
        self.now = None
        self.last = carry.index - self.kept[0].index if self.kept else 0
        self.states[self.last] = tree.detach(carry.state)
        return carry

    def step(self, number: int, alive: Tensor) -> Carry:
        return self.run(self.now if self.now is not None else self.again(number), 1)

    def again(self, number: int) -> Carry:
        """The carry before step `number`, with leaves that ask for gradients where the first ones did."""
        carry = self.kept[number]._replace(state=self.state(number))
        flags = iter(self.attached[number])
        return tree.map(lambda leaf: leaf.detach().requires_grad_(next(flags)), carry)

    @torch.no_grad()
    def state(self, number: int) -> State:
        if number not in self.states:
            carry, after = self.kept[number], self.state(number + 1)
            before = random_state(carry.alive.device)
            back = self.run.inverse(after, carry.index)
            restore(before, carry.alive.device)
            self.states[number] = tree.where(carry.alive, back, after)
            if number + 1 != self.last:
                del self.states[number + 1]
        return self.states[number]
