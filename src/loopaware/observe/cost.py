"""What a loop costs: floating-point operations and bytes of state, from shapes, executed against dense.

In: a loop and a context. Out: a `Cost`, which turns steps per row into operations and bytes. A multiplication and an
addition count as two operations; matrix products, convolutions and attention count, elementwise work does not.
Deliberately elsewhere: time, which is measured (`loopaware bench`).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from loopaware import execute, tree
from loopaware.counting import attended, counter
from loopaware.loop import Loop
from loopaware.observe.record import shadow
from loopaware.protocols import Carry, Load, Ran, tokenwise
from loopaware.tokens import Tokens


class Cost(NamedTuple):
    """The cost of one step of a batch, and of whole runs.

    Units: `body`, `update`, `halt` are operations of one step of all rows, `attention` those of the body that are
    queries against keys and weights against values; `state_bytes` is what one step reads and writes of the state,
    2 * numbers * bytes each; `key_value_bytes` is what it writes and reads of keys and values, likewise. `load` says
    what of the body's operations each row costs as what it is: they differ where tokens halt by themselves.
    """

    body: int
    update: int
    halt: int
    state_bytes: int
    rows: int
    max_steps: int
    attention: int
    key_value_bytes: int
    load: Load

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
        """Operations of runs as `execute.Compacted` reports them: stopped rows that were carried along, keys that were
        made for stopped tokens, and queries that pad a sequence to the fullest are included.
        """
        body = sum(
            each * rows for ran in runs for load in ran.loads for each, rows in zip(self.load, load, strict=True)
        )
        return body + (self.update + self.halt) / self.rows * sum(sum(ran.rest) for ran in runs)

    def share(self, steps: Tensor) -> float:
        """Executed against dense, between 0 and 1."""
        return float(steps.sum()) / (self.rows * self.max_steps)

    @property
    def attention_share(self) -> float:
        """The part of the body's operations that grows with the square of the length."""
        return self.attention / max(self.body, 1)

    def by_row(self, steps: Tensor) -> Tensor:
        """Operations of each row that stops after its steps. Shapes: steps (*rows) -> the same, float64."""
        return steps.double() * (self.step / self.rows)

    def by_step(self, steps: Tensor) -> Tensor:
        """Operations of each step, of the rows that take it. Shapes: steps (*rows) -> (max_steps), float64."""
        numbers = torch.arange(1, self.max_steps + 1, device=steps.device)
        return (steps.flatten() >= numbers[:, None]).sum(1).double() * (self.step / self.rows)

    def traffic(self, steps: Tensor) -> float:
        """Bytes of state, keys and values that are moved if rows move nothing after they have stopped."""
        return (self.state_bytes + self.key_value_bytes) / self.rows * float(steps.sum())


class Energy(NamedTuple):
    """A model of energy with coefficients that you declare: J = per_operation * operations + per_byte * bytes.

    Its numbers are as good as its coefficients, and no claim about a machine that was not measured. What a byte costs
    depends on where states, keys and values live, in a cache or in memory.

    Units: joules for one operation, joules for one byte.

    >>> from loopaware import body
    >>> counts = cost(Loop(body.Called(torch.nn.Linear(4, 4)), max_steps=3), torch.zeros(2, 4))
    >>> Energy(per_operation=1.0, per_byte=0.5).joules(counts, torch.tensor([3, 1]))
    192.0
    """

    per_operation: float
    per_byte: float

    def joules(self, cost: Cost, steps: Tensor) -> float:
        """Of a run in which rows cost nothing after they have stopped. Shapes: steps (*rows)."""
        return self.per_operation * cost.executed(steps) + self.per_byte * cost.traffic(steps)


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
        some = (told(carry.alive, 0), told(carry.alive, 1)) if tokenwise(loop.body, carry) else None
        for inner in loop.modules():
            if isinstance(inner, Loop):
                stack.enter_context(shadow(inner, "execute", execute.Unrolled()))
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        carry, context = tree.map(fake.from_tensor, (carry, context))
        with Attended() as attended:
            body, proposal = counted(loop.body, carry.state, context, carry.index)
        update, (state, _) = counted(loop.update, carry.state, proposal, carry.update)
        halt, _ = counted(loop.halt, carry.state, state, carry.halt, carry.index)
        load = loaded(loop.body, carry, context, body, some)
    numbers = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(carry.state))
    rows, moved = carry.alive.numel(), 2 * attended.bytes
    return Cost(body, update, halt, 2 * numbers, rows, loop.max_steps, attended.operations, moved, load)


def loaded(body: Any, carry: Carry, context: Any, whole: int, some: tuple[Tokens, Tokens] | None) -> Load:
    """What each row costs as what it is, told from calls of `body.some` that differ in one of them at a time.

    Of N rows in B sequences, one of each sequence is run: with the keys of all to be made, with its own alone, and with
    one more in the first sequence, which adds a row, and B places of queries.
    """
    rows, sequences = carry.alive.numel(), len(carry.alive)
    if some is None or rows == sequences:
        return Load(whole / rows, 0.0, 0.0, 0.0)
    one, two = some
    few, (_, held) = counted(body.some, carry.state, context, carry.index, one.afresh, None)
    own, _ = counted(body.some, carry.state, context, carry.index, one, held) if held is not None else (few, None)
    more, _ = counted(body.some, carry.state, context, carry.index, two.afresh, None)
    keys, both = (few - own) / (rows - sequences), (whole - few) / (rows - sequences)
    queries = (more - few - both) / (sequences - 1) if sequences > 1 else 0.0
    return Load(both - queries, keys, queries, whole / rows - keys - both)


def told(alive: Tensor, extra: int) -> Tokens:
    """The first token of each sequence, which alone has moved, and `extra` more of the first sequence.

    Of real tensors, asked once for all they know: a fake one could not say how many tokens there are.
    """
    run = torch.zeros_like(alive)
    run[:, 0] = run[0, : 1 + extra] = True
    tokens = Tokens(run, run)
    for each in (tokens, tokens.afresh):
        _ = each.sources, each.positions, each.positions_moved
    return tokens


def counted(function: Any, *arguments: Any) -> tuple[int, Any]:
    """The operations of a call, and its result."""
    with counter() as seen:
        result = function(*arguments)
    return seen.get_total_flops(), result


class Attended(TorchFunctionMode):
    """Operations of attention while it is entered, and the bytes of its keys and values.

    Calls are seen before a kernel is chosen for them: a learned bias takes one that is made of plain matrix products.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), arguments, strict=False)) | (options or {})
            query, key, value = named["query"], named["key"], named["value"]
            self.operations += attended(query.shape, key.shape, value.shape)
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in (key, value))
        return function(*arguments, **(options or {}))
