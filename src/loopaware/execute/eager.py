"""Steps on the whole batch: all of them, or until no row is left.

In: `advance`, a carry, a number of steps. Out: the carry after them. Deliberately elsewhere: steps without the rows
that have stopped (`loopaware.execute.compacted`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loopaware import tree
from loopaware.protocols import Advance, Carry, State

__all__ = ["Eager", "Unrolled"]


@dataclass(frozen=True)
class Unrolled:
    """Run every step, never looking at the data: c_{t+1} = advance(c_t), t = 1..T.

    Use it under `torch.compile(fullgraph=True)`, for export, for CUDA graphs, and on a GPU with `halt.Never`: nothing
    waits for the device. It neither ends early nor notices a state that is no longer finite.

    >>> Unrolled()(lambda carry: carry + 1, 0, 5)
    5
    """

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        for _ in range(steps):
            carry = advance(carry)
        return carry


@dataclass(frozen=True)
class Eager:
    """Run until no row is alive, and look at the state after every step: while any(alive): c = advance(c).

    The default. Rows that have stopped are carried along unchanged until the last one stops. On a GPU each step waits
    for one number from the device.

    Args:
        check: raise where a real position of the state is not finite.

    Raises:
        FloatingPointError: the state holds a nan or an infinity; names the step and the rows.

    >>> from loopaware import Loop, halt
    >>> loop = Loop(lambda state, context, index: state / 2, max_steps=99, halt=halt.Converged(atol=0.1, rtol=0.0))
    >>> loop(torch.ones(1, 2)).steps
    tensor([4])
    """

    check: bool = True

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        seen: Tensor | None = None
        for _ in range(steps):
            if not self.look(carry, seen):
                return carry
            seen, carry = carry.alive, advance(carry)
        self.look(carry, seen)
        return carry

    def look(self, carry: Carry, seen: Tensor | None = None) -> bool:
        """Whether a row is alive; `seen` was looked at and holds one. Reads one pair of numbers from the device."""
        alive = None if carry.alive is seen else carry.alive.any()
        alive, total = read(alive, summed(carry.state) if self.check else None)
        if total is not None and not math.isfinite(total) and not tree.finite(real(carry)):
            raise FloatingPointError(describe(carry))
        return alive is None or bool(alive)


def read(*numbers: Tensor | None) -> list[float | None]:
    """Numbers on the host, None for None: one transfer from a device, and none on the CPU. Shapes: () each."""
    asked = [number for number in numbers if number is not None]
    if not asked or asked[0].device.type == "cpu":
        return [None if number is None else number.item() for number in numbers]
    found = iter(torch.stack([number.to(asked[-1]) for number in asked]).tolist())
    return [None if number is None else next(found) for number in numbers]


def summed(state: State) -> Tensor:
    """The sum of all numbers of a state: finite only if each of them is, and had in a fraction of the time of looking.

    The reverse is not so: a sum may overflow, and padding counts. Shapes: -> ().
    """
    if isinstance(state, Tensor) and state.dtype in (torch.float32, torch.float64):
        return state.detach().sum()
    sums = [leaf.detach().sum(dtype=wide(leaf.dtype)) for leaf in tree.leaves(state) if leaf.is_floating_point()]
    if not sums:
        return tree.leaves(state)[0].new_zeros((), dtype=torch.float32)
    return sum(sums[1:], sums[0])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def real(carry: Carry) -> object:
    """The state with its padding set to zero; what stands there is nobody's answer."""
    if carry.rows.mask is None:
        return carry.state
    return tree.where(carry.rows.mask, carry.state, tree.map(torch.zeros_like, carry.state))


def describe(carry: Carry) -> str:
    """The message for a state that is not finite."""
    axes = carry.rows.axes
    bad = torch.zeros_like(carry.alive)
    for leaf in tree.leaves(real(carry)):
        broken = ~torch.isfinite(leaf)
        bad = bad | (broken.flatten(axes).any(-1) if broken.ndim > axes else broken)
    rows = [index[0] if axes == 1 else tuple(index) for index in bad.nonzero()[:8].tolist()]
    return (
        f"the state must be finite, got nan or inf after {carry.index} steps in rows {rows}. "
        "Look at the input if it is step 0; else lower the learning rate, clip gradients, or damp the loop with "
        "update.Damped. execute.Eager(check=False) lets it pass."
    )
