"""Steps without the rows that have stopped.

In: `advance`, a carry, a number of steps. Out: the carry after them, as `Eager` would have it. Sequences in which
nothing is alive leave the batch; where tokens halt by themselves, a body that declares `partial` is run for those that
are alive, and all serve as keys. Deliberately elsewhere: bodies that can do so (`loopaware.nn`, `loopaware.body`), what
was saved (`observe.cost`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.checks import same_shape
from loopaware.execute.eager import Eager, describe, read, real, summed
from loopaware.protocols import Advance, Carry, Context, Load, Ran, State, partial, tokenwise
from loopaware.tokens import Tokens

__all__ = ["Compacted"]

MOVING = 16.0
"""Operations that could be done in the time it takes to move one number to another place."""


@dataclass(frozen=True)
class Compacted:
    """Run until no row is alive, and only rows that are alive: c[alive] = advance(c[alive]).

    Use it where rows stop at different steps and a step takes more than some tenths of a millisecond; then the time of
    a run follows the steps that were taken. The result is that of `Eager` to rounding, gradients included; random
    numbers drawn inside a step, as of dropout, are others. Sequences leave the batch for any body; tokens (rows=2)
    leave it if the body declares `partial`, as `nn.Block` does, else when their whole sequence has stopped. A step is
    left as it is where leaving rows out would save fewer operations than `break_even`. That is judged from shapes and
    counts, never from a clock, so that a run can be replayed. Tensors that a body closes over cannot be gathered: put
    what belongs to sequences into the context.

    Args:
        break_even: operations that gathering must save in a step; None takes 8e6 on the CPU (about 0.1 ms) and 5e9
            elsewhere. 0 always gathers. A body is presumed to cost two operations for each of its parameters and
            positions, and no less than one square map of the features.
        check: raise where a real position of the state is not finite.
        shared: entries of the context that all sequences share although their first axis is of the batch's size.
        report: called after every run with a `Ran`, which says what was executed; gradient rules may run several times.

    Raises:
        FloatingPointError: as `Eager`.
        ValueError, TypeError: a context of which it cannot be told what belongs to which sequence (when it runs).

    >>> from loopaware import Loop, halt
    >>> ran: list[Ran] = []
    >>> rule, only = halt.Converged(atol=0.1, rtol=0.0), Compacted(break_even=0, report=ran.append)
    >>> _ = Loop(lambda state, context, index: state / 2, 99, halt=rule, execute=only)(torch.tensor([[1.0], [0.3]]))
    >>> ran[0].body
    (2, 2, 1, 1)
    """

    gathers = True  # a body sees some rows only, so that what it draws for all of them cannot be drawn again
    break_even: float | None = None
    check: bool = True
    shared: tuple[str, ...] | None = None
    report: Callable[[Ran], None] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.break_even is not None and not self.break_even >= 0:
            raise ValueError(f"break_even must be at least 0, got {self.break_even}. 0 gathers at every step.")

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        work = Work(self, advance, carry)
        if not work.worth(len(carry.alive), [carry.state]):
            return self.small(advance, carry, steps)
        run = Batch(self, work, advance, carry)
        for _ in range(steps):
            if not run.look():
                break
            run.step()
        else:
            run.look()
        if self.report is not None:
            self.report(run.ran())
        return run.whole()

    def small(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        """A run in which leaving out all rows would not pay."""
        out = Eager(self.check)(advance, carry, steps)
        if self.report is not None:
            rows, steps = carry.alive.numel(), out.index - carry.index
            reason = "a step of the whole batch is worth less than the break-even"
            self.report(Ran(rows, (whole(rows),) * steps, (rows,) * steps, reason))
        return out


class Batch:
    """A run under way: the sequences that are still in the batch, and those that have left it.

    `carry` is that of the sequences at `places`; None stands for all.
    """

    def __init__(self, rule: Compacted, work: Work, advance: Advance, carry: Carry):
        self.rule, self.work, self.all, self.advance = rule, work, advance, advance
        self.start = self.carry = carry
        self.places: Tensor | None = None
        self.left: list[tuple[Tensor, Carry]] = []
        self.still = Still(carry)
        self.settles = getattr(advance.readout, "settles", False)
        self.part = Part(advance, carry)
        self.loads: list[Load] = []
        self.rest: list[int] = []
        self.rows = self.sequences = 0

    def look(self) -> bool:
        """Whether a row is alive; counts sequences and rows. Reads three numbers from the device."""
        alive = self.carry.alive
        total = summed(self.carry.state) if self.rule.check else None
        rows, sequences, total = read(alive.sum(), self.carry.sequences.sum(), total)
        if total is not None and not math.isfinite(total) and not tree.finite(real(self.carry)):
            raise FloatingPointError(describe(self.whole()))
        assert rows is not None and sequences is not None
        self.rows, self.sequences = int(rows), int(sequences)
        return self.rows > 0

    def step(self) -> None:
        # Judged against all sequences, whatever left before: a run that is cut and resumed, or replayed step by step by
        # a gradient rule, then has the same batches, and draws the same random numbers.
        stopped = len(self.start.alive) - self.sequences
        if self.settles and self.sequences < len(self.carry.alive) and self.work.worth(stopped, [self.start.state]):
            self.leave()
        body = self.part.chosen(self)
        self.rest.append(self.carry.alive.numel())
        before, self.carry = self.carry, self.advance._replace(body=body)(self.carry)
        self.loads.append(self.part.load)
        self.still.stepped(before, self.carry)

    def leave(self) -> None:
        """Let the sequences go in which nothing is alive."""
        alive = self.carry.sequences
        stay, go = alive.nonzero().flatten(), (~alive).nonzero().flatten()
        places = torch.arange(len(alive), device=alive.device) if self.places is None else self.places
        self.left.append((places[go], tree.gather(go, self.carry)))
        self.places, self.carry = places[stay], tree.gather(stay, self.carry)
        self.advance = self.all.among(self.places, len(self.start.alive), self.rule.shared)
        self.part.leave(stay)

    def whole(self) -> Carry:
        """The carry of all sequences, in their order."""
        if self.places is None:
            return self.carry
        order = torch.cat([*(places for places, _ in self.left), self.places]).argsort()
        parts = [carry._replace(index=self.carry.index) for _, carry in self.left]

        def joined(*leaves: Tensor) -> Tensor:
            return torch.cat(leaves).index_select(0, order)

        whole = tree.map(joined, *(part._replace(rows=None) for part in (*parts, self.carry)))
        return self.still.kept(whole)._replace(rows=self.start.rows)

    def ran(self) -> Ran:
        return Ran(self.start.alive.numel(), tuple(self.loads), tuple(self.rest), self.part.reason)


class Still:
    """Which memories no step of a run has made anew: they stay the very same tensors.

    Gradient rules tell by it what moves.
    """

    def __init__(self, start: Carry):
        self.start = memories(start)
        self.leaves = [True] * len(tree.leaves(self.start))

    def stepped(self, before: Carry, after: Carry) -> None:
        pairs = zip(self.leaves, tree.leaves(memories(before)), tree.leaves(memories(after)), strict=True)
        self.leaves = [still and one is other for still, one, other in pairs]

    def kept(self, whole: Carry) -> Carry:
        """The carry, with the memories of the start where they are still."""
        still = iter(self.leaves)
        update, halt = tree.map(lambda new, old: old if next(still) else new, memories(whole), self.start)
        return whole._replace(update=update, halt=halt)


def memories(carry: Carry) -> tuple[Any, Any]:
    return carry.update, carry.halt


class Work:
    """What a step costs, from shapes alone."""

    def __init__(self, rule: Compacted, advance: Advance, carry: Carry):
        leaves = tree.leaves(carry.state)
        features = max((leaf.shape[-1] for leaf in leaves if leaf.ndim > carry.rows.axes), default=1)
        weights = advance.body.parameters() if isinstance(advance.body, nn.Module) else ()
        self.position = 2.0 * max(sum(weight.numel() for weight in weights), features**2)
        self.positions = max(math.prod(leaf.shape[1:-1]) for leaf in leaves)
        default = 8e6 if carry.alive.device.type == "cpu" else 5e9
        self.free = rule.break_even == 0
        self.break_even = default if rule.break_even is None else rule.break_even

    def worth(self, sequences: float, moved: list[Tensor]) -> bool:
        """Whether it pays to run so many sequences fewer (a token is a share of one) and to move these tensors."""
        if self.free or sequences <= 0:
            return sequences > 0
        saved = sequences * self.positions * self.position
        return saved >= self.break_even + MOVING * sum(leaf.numel() for leaf in moved)


def whole(rows: int) -> Load:
    """Of a body that is run for whole sequences."""
    return Load(rows, rows, rows, rows)


@dataclass(frozen=True)
class Only:
    """A body that is run for rows that are alive; what the others propose is their state, to the bit."""

    keeps = True
    function: Callable[[State, Context, int], State]

    def __call__(self, state: State, context: Context, index: int) -> State:
        return self.function(state, context, index)


class Part:
    """The body of a step, for the tokens or the sequences of a batch that are alive. Does not hold the batch."""

    def __init__(self, advance: Advance, carry: Carry):
        self.advance = advance
        self.held: Any = None
        self.before: Tensor | None = None
        self.few_before: tuple[Tensor, Context] | None = None
        self.load = whole(0)
        self.tokens = tokenwise(advance.body, carry)
        self.reason = ""
        if carry.rows.axes > 1 and not self.tokens:
            able = "takes single tokens of one tensor (B, T, D)"
            what = able if partial(advance.body) else "declares no `partial`, or has hooks"
            name = type(advance.body).__name__
            self.reason = f"tokens that have stopped are run with their sequence: body {name} {what}"

    def leave(self, stay: Tensor) -> None:
        """Let sequences go: what is held of the others stays."""
        self.held, self.before = tree.gather(stay, (self.held, self.before))

    def chosen(self, batch: Batch) -> Any:
        """A body for this step. What it works on is in `load` when it has run."""
        alive = batch.carry.alive
        each = alive.numel() // len(alive)
        if self.tokens and batch.work.worth(len(alive) - batch.rows / each, [batch.carry.state]):
            return Only(lambda state, context, index: self.some(alive, state, context, index))
        self.held = self.before = None
        if not batch.settles and batch.work.worth(len(alive) - batch.sequences, tree.leaves(batch.carry.state)):
            if self.few_before is None or len(self.few_before[0]) != batch.sequences:
                places = batch.carry.sequences.nonzero().flatten()
                self.few_before = places, self.advance.among(places, len(alive), batch.rule.shared).context
            self.load = whole(batch.sequences * each)
            return self.few
        self.load = whole(alive.numel())
        return self.advance.body

    def some(self, alive: Tensor, state: Tensor, context: Context, index: int) -> Tensor:
        """Proposals of the tokens that are alive; the others propose what they are."""
        tokens, body = Tokens(alive, self.before if self.held is not None else None), self.advance.body
        assert partial(body)
        new, self.held = body.some(state, context, index, tokens, self.held)
        self.before = alive
        self.load = Load(len(tokens.run), len(tokens.moved), len(alive) * tokens.most, alive.numel())
        return tokens.put(state, new.to(state.dtype))

    def few(self, state: State, context: Context, index: int) -> State:
        """Proposals of the sequences in which something is alive; the others propose what they are."""
        assert self.few_before is not None
        places, context = self.few_before
        some = tree.gather(places, state)
        new = same_shape(self.advance.body(some, context, index), some)
        return tree.map(lambda old, own: old.index_copy(0, places, own), state, new)
