"""What a loop costs: floating-point operations and bytes of state, from shapes, executed against dense.

In: a loop and a context. Out: a `Cost`, which turns steps per row into operations. A multiplication and an addition
count as two operations; matrix products, convolutions and attention count, elementwise work does not. Deliberately
elsewhere: time, which is measured in `benchmarks/`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from loopaware import execute, tree
from loopaware.loop import Loop
from loopaware.observe.record import shadow
from loopaware.protocols import Ran


class Cost(NamedTuple):
    """The cost of one step of a batch, and of whole runs.

    Units: `body`, `update`, `halt` are operations of one step of all rows; `state_bytes` is what one step reads and
    writes of the state, 2 * numbers * bytes each.
    """

    body: int
    update: int
    halt: int
    state_bytes: int
    rows: int
    max_steps: int

    @property
    def step(self) -> int:
        """Operations of one step of all rows."""
        return self.body + self.update + self.halt

    @property
    def dense(self) -> int:
        """Operations of a run in which every row takes every step."""
        return self.step * self.max_steps

    def executed(self, steps: Tensor) -> float:
        """Operations of a run in which rows take `steps` steps and cost nothing after. Shapes: steps (*rows)."""
        return self.step / self.rows * float(steps.sum())

    def spent(self, *runs: Ran) -> float:
        """Operations of runs as `execute.Compacted` reports them, stopped rows that were carried along included.

        Keys and values of rows that have just stopped are not: they are made once more.
        """
        alone = sum(self.body * sum(ran.body) + (self.update + self.halt) * sum(ran.rest) for ran in runs)
        return alone / self.rows

    def share(self, steps: Tensor) -> float:
        """Executed against dense, between 0 and 1."""
        return float(steps.sum()) / (self.rows * self.max_steps)


def cost(loop: Loop, context: Any, mask: Tensor | None = None) -> Cost:
    """Count one step of `loop` on `context` from shapes alone; nothing is computed.

    Every row is charged the same share of a step, padding included; loops inside the body are charged their
    `max_steps`. Tokens that halt by themselves (rows=2) are charged their share of all attention, though as keys they
    still serve others.

    Args:
        loop: any loop.
        context: what it would be called with.
        mask: likewise.

    >>> from loopaware import body
    >>> layer = body.Called(torch.nn.Linear(4, 4))
    >>> cost(Loop(layer, max_steps=3), torch.zeros(2, 4)).dense
    192
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), ExitStack() as stack:
        carry = loop.start(context, mask)
        for inner in loop.modules():
            if isinstance(inner, Loop):
                stack.enter_context(shadow(inner, "execute", execute.Unrolled()))
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        carry, context = tree.map(fake.from_tensor, (carry, context))
        body, proposal = counted(loop.body, carry.state, context, carry.index)
        update, (state, _) = counted(loop.update, carry.state, proposal, carry.update)
        halt, _ = counted(loop.halt, carry.state, state, carry.halt, carry.index)
    numbers = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(carry.state))
    return Cost(body, update, halt, 2 * numbers, carry.alive.numel(), loop.max_steps)


def counted(function: Any, *arguments: Any) -> tuple[int, Any]:
    """The operations of a call, and its result."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attended}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


def _attended(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of attention on the CPU, which PyTorch's counter leaves out: q k^T and p v.

    Shapes: query (B, H, Tq, d), key (B, H, Tk, d), value (B, H, Tk, e).
    """
    batch, heads, queries, features = query
    return 2 * batch * heads * queries * key[-2] * (features + value[-1])
