"""Which steps of a loop are differentiated.

In: `run(carry, steps)`, a carry, and how many steps are left. Out: the carry after them, attached to the graph as the
rule says. Without gradients (`torch.no_grad`) every rule is a plain run. Deliberately elsewhere: how steps are run
(`loopaware.execute`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from loopaware import tree
from loopaware.checks import bounded
from loopaware.protocols import Carry, Run

__all__ = ["Checkpointed", "Full", "OneStep", "Truncated"]


@dataclass(frozen=True)
class Full:
    """Differentiate every step: backpropagation through the loop.

    Exact; memory grows with the number of steps. The default.

    >>> Full()(lambda carry, steps: carry + steps, 0, 3)
    3
    """

    complete = True
    extra_steps = 0

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        return run(carry, steps)


@dataclass(frozen=True)
class Checkpointed:
    """Differentiate every step, keep only every k-th carry: the steps between are run again in the backward pass.

    The gradient of Full for about a third more time and the memory of T/k carries and k steps; random numbers are
    replayed. Not for short loops, where Full is faster.

    Args:
        every: steps between two carries that are kept.

    Raises:
        ValueError: `every` is below one.

    References: T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174.

    >>> Checkpointed(every=2)(lambda carry, steps: carry + steps, torch.zeros(()), 3)
    tensor(3.)
    """

    complete = True
    extra_steps = 0
    every: int = 1

    def __post_init__(self):
        bounded("every", self.every, "Keep a carry at least every T steps.")

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if not torch.is_grad_enabled():
            return run(carry, steps)
        for done in range(0, steps, self.every):
            carry = checkpoint(run, carry, min(self.every, steps - done), use_reentrant=False)
        return carry


@dataclass(frozen=True)
class Truncated:
    """Differentiate the last k steps of every row: dL/dh_{T-k} = 0.

    Memory of k steps, and a biased gradient that forgets what earlier steps did. A row that stops early has its own
    last k steps differentiated, whatever its neighbours do; then the loop is run twice, first without gradients to
    learn where each row stops.

    Args:
        last: how many steps of each row are differentiated.

    Raises:
        ValueError: `last` is below one.

    References: A. Bansal et al., "End-to-end Algorithm Synthesis with Recurrent Networks", 2022, arXiv 2202.05826.

    >>> Truncated(last=4).complete
    False
    """

    complete = False
    extra_steps = 0
    last: int = 4

    def __post_init__(self):
        bounded("last", self.last, "Without a differentiated step nothing is learned.")

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if steps <= self.last or not torch.is_grad_enabled():
            return run(carry, steps)
        device = carry.alive.device
        before = random_state(device)
        with torch.no_grad():
            probe = run(carry, steps - self.last)
        if bool((probe.alive == carry.alive).all()):
            out = run(tree.detach(probe), self.last)
        else:
            with torch.no_grad():
                out = run(probe, self.last)
        ends = out.steps - carry.steps
        if bool((ends == steps * carry.alive).all()):
            return out
        return self.replay(run, carry, ends, before)

    def replay(self, run: Run, carry: Carry, ends: torch.Tensor, before: list[torch.Tensor]) -> Carry:
        """Run again with the same random numbers; row r is attached from its step `ends[r] - last` on."""
        restore(before, carry.alive.device)
        stepped = ends[ends > 0]
        if stepped.numel() == 0:
            return carry
        first, final = max(int(stepped.min()) - self.last, 0), int(stepped.max())
        with torch.no_grad():
            carry = run(carry, first)
        for done in range(first, final):
            carry = run(tree.where(done > ends - self.last, carry, tree.detach(carry)), 1)
        return carry


@dataclass(frozen=True)
class OneStep:
    """Differentiate one step, at the place where the loop came to rest: h = f(sg(h*)).

    The cheapest gradient, good where the loop contracts to a fixed point (Jacobian-free backpropagation). Rows that
    stopped early take one step more, so their value is one step further than a plain run's; the bound still holds.

    References: S. W. Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", 2021, arXiv 2103.12803.

    >>> OneStep().extra_steps
    1
    """

    complete = False
    extra_steps = 1

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if steps < 1 or not torch.is_grad_enabled():
            return run(carry, steps)
        alive = carry.alive
        with torch.no_grad():
            carry = run(carry, steps - 1)
        return run(tree.detach(carry)._replace(alive=alive), 1)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of the generators a body on `device` draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
