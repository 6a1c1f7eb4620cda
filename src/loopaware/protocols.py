"""What a loop hands around, and the seven protocols its parts fulfil, each with its law.

Terms used everywhere:

- *state*: a tensor or a tree of tensors (`loopaware.tree`), each leading with the row axes.
- *context*: what stays the same during a loop: a tensor `x`, or a mapping with `x` and, where a body reads them,
  `mask` (attention: True may be attended to), `memory` (what cross-attention looks at) and `memory_mask`.
- *rows*: the leading axes that halt by themselves: 1 = sequences, 2 = tokens. Behind them come positions and, last,
  features.
- *index*: how many steps were taken before this one; the first step has index 0.

Deliberately elsewhere: every implementation. A part is a frozen dataclass, or an `nn.Module` if it has parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from loopaware import tree
from loopaware.tokens import Tokens

State = Any
Memory = Any
Context = Any


class Rows(NamedTuple):
    """Which leading axes of a state halt by themselves, and which positions of it are real.

    Shapes: mask (*rows, ...) bool, any number of axes from `axes` up to all but the feature axis; True = real.
    """

    axes: int = 1
    mask: Tensor | None = None

    def zeros(self, state: State, dtype: torch.dtype | None = None) -> Tensor:
        """A zero for each row, in at least float32 unless a dtype is given. Shapes: -> (*rows)."""
        first = tree.leaves(state)[0]
        wide = torch.promote_types(first.dtype, torch.float32) if dtype is None else dtype
        return first.new_zeros(first.shape[: self.axes], dtype=wide)

    def real(self, state: State) -> Tensor:
        """Which rows have a real position. Shapes: -> (*rows) bool."""
        if self.mask is None:
            return ~self.zeros(state, torch.bool)
        return self.mask.flatten(self.axes).any(-1) if self.mask.ndim > self.axes else self.mask

    def largest(self, values: Tensor) -> Tensor:
        """The largest value of each row over its real positions. Shapes: (*rows, ...) -> (*rows)."""
        if self.mask is not None and values.ndim >= self.mask.ndim:
            values = values.masked_fill(~tree.expand(self.mask, values), float("-inf"))
        return values.flatten(self.axes).amax(-1) if values.ndim > self.axes else values

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each row over its real positions, feature by feature. Shapes: (*rows, ..., d) -> (*rows, d)."""
        if values.ndim - 1 <= self.axes:
            return values
        flat = values.flatten(self.axes, -2)
        if self.mask is None or self.mask.ndim <= self.axes:
            return flat.mean(-2)
        real = tree.expand(self.mask, values[..., 0]).expand(values.shape[:-1]).flatten(self.axes)[..., None]
        return flat.masked_fill(~real, 0.0).sum(-2) / real.sum(-2).clamp(min=1)


class Verdict(NamedTuple):
    """What a halting rule says after a step.

    Shapes: stop (*rows) bool; weight (*rows), the share of this step's state in the answer; score (*rows), the number
    the rule looked at (residual, divergence, entropy, probability, or the logit of a learned rule), with its gradient.
    """

    stop: Tensor
    weight: Tensor
    score: Tensor


class Carry(NamedTuple):
    """Everything one step hands to the next. A loop cut anywhere goes on from it as if it had not been cut.

    `alive` is a plan: the row is still to be stepped. `halted` is a fact: the rule has spoken. A row that is neither
    was padding; a row that is alive when a loop ends has met the cap. Shapes: alive, halted, steps (*rows).
    """

    state: State
    update: Memory
    halt: Memory
    readout: Memory
    rows: Rows
    alive: Tensor
    halted: Tensor
    steps: Tensor
    index: int = 0  # pyright: ignore[reportIncompatibleMethodOverride] - the word of the field

    @property
    def sequences(self) -> Tensor:
        """In which sequences a row is alive. Shapes: -> (B) bool."""
        return self.alive.flatten(1).any(1) if self.alive.ndim > 1 else self.alive


class Status(IntEnum):
    """Why a row takes no further step: it was padding, its rule spoke, it met the bound, or it is no longer finite."""

    PADDING = 0
    HALTED = 1
    BOUND = 2
    DIVERGED = 3


class Output(NamedTuple):
    """What a loop returns. Shapes: steps, halted (*rows); `value` is the readout's."""

    value: Any
    steps: Tensor
    halted: Tensor
    carry: Carry

    @property
    def status(self) -> Tensor:
        """A `Status` for each row. Shapes: -> (*rows) long.

        `execute.Eager` raises where a state is not finite; who runs without its check, under `torch.compile` or on a
        CUDA graph, reads it here.
        """
        rows, real = self.carry.rows, self.carry.rows.real(self.carry.state)
        finite = torch.ones_like(real)
        for leaf in tree.leaves(self.carry.state):
            sound = torch.isfinite(leaf)
            if rows.mask is not None:
                sound = sound | ~tree.expand(rows.mask, leaf)
            finite = finite & (sound.flatten(rows.axes).all(-1) if sound.ndim > rows.axes else sound)
        status = torch.where(self.halted, int(Status.HALTED), torch.full_like(self.steps, int(Status.BOUND)))
        status = torch.where(finite, status, int(Status.DIVERGED))
        return torch.where(real, status, int(Status.PADDING))


class Load(NamedTuple):
    """What a body worked on in one step of a batch, in rows; or what each of these costs.

    `run`: rows that were stepped. `keys`: rows whose keys and values were made, of stopped ones too where they have
    moved. `queries`: places of queries in attention, every sequence padded to the one with the most. `among`: all rows
    of the sequences the body saw. Where a body is run for whole sequences, all four are the same number.
    """

    run: float
    keys: float
    queries: float
    among: float


class Ran(NamedTuple):
    """What a run of `execute.Compacted` executed, step by step, and what kept it from leaving out more.

    `rows` is the number of rows of the batch; `loads` says what the body worked on at each step, `rest` for how many
    rows the update and the rule were run. `reason` is empty, or says why no step could leave out all rows that had
    stopped.
    """

    rows: int
    loads: tuple[Load, ...]
    rest: tuple[int, ...]
    reason: str = ""

    @property
    def body(self) -> tuple[int, ...]:
        """For how many rows the body was run at each step, rows that only served as keys not counted."""
        return tuple(int(load.run) for load in self.loads)

    @property
    def share(self) -> float:
        """The rows the body was run for, against all rows at each of these steps; 0 if there was no step."""
        return sum(self.body) / max(self.rows * len(self.body), 1)


class Advance(NamedTuple):
    """What an execution is given: one step, on all sequences of the context or on some of them.

    `step(carry, context, body, readout)` is the driver's; `body` and `readout` are the loop's, for the traits they
    declare, and may be replaced for a step.
    """

    step: Callable[[Carry, Context, Body, Readout], Carry]
    context: Context
    body: Body
    readout: Readout

    def __call__(self, carry: Carry) -> Carry:
        return self.step(carry, self.context, self.body, self.readout)

    def among(self, index: Tensor, batch: int, shared: tuple[str, ...] | None = None) -> Advance:
        """The step of some sequences, for carries that were gathered likewise. Shapes: index (k), of `batch`."""
        return self._replace(context=tree.among(index, self.context, batch, shared))


class Run(NamedTuple):
    """What a gradient rule is given: run some steps; and what parts that know more can tell.

    `inverse(state, index)` asks `body.inverse(state, context, index)` for h_{t-1}, all rows taken back.
    `foreseen(memory)` asks a halting rule that declares it after how many steps each row will stop, bound aside; None
    if it cannot tell.
    """

    forward: Callable[[Carry, int], Carry]
    inverse: Callable[[State, int], State]
    foreseen: Callable[[Memory], Tensor | None] | None = None

    def __call__(self, carry: Carry, steps: int) -> Carry:
        return self.forward(carry, steps)


class Body(Protocol):
    """What is computed? Law: rows in, rows out; the proposal has the shapes of the state."""

    def __call__(self, state: State, context: Context, index: int, /) -> State: ...


class Partial(Protocol):
    """A body that can be run for some tokens, which look at all of them. Law: these proposals equal the whole body's.

    `partial`: it can, as it is built. `some` returns the proposals of `tokens.run`, and what it wants to be handed at
    the next step: numbers of all tokens that only those in `tokens.moved` change, as keys and values. It is handed None
    when there are none, or when they no longer hold.

    Shapes: state (B, T, D), n tokens of it -> (1, n, D).
    """

    @property
    def partial(self) -> bool: ...
    def some(self, state: Tensor, context: Context, index: int, tokens: Tokens, held: Any, /) -> tuple[Tensor, Any]: ...


def partial(body: object) -> TypeGuard[Partial]:
    """Whether a body declares that it can be run for some tokens, and has no hooks, which a part would not call."""
    hooks = getattr(body, "_forward_hooks", None) or getattr(body, "_forward_pre_hooks", None)
    return getattr(body, "partial", False) is True and not hooks


def tokenwise(body: object, carry: Carry) -> bool:
    """Whether a body can be run for single tokens of this carry: of one tensor (B, T, D), and it declares so."""
    return carry.rows.axes == 2 and partial(body) and isinstance(carry.state, Tensor) and carry.state.ndim == 3


class Init(Protocol):
    """Where does it start? Law: the state has the rows of the context; a row's start does not depend on the others."""

    def __call__(self, context: Context, /) -> State: ...


class Update(Protocol):
    """How does a proposal become the next state?

    Law, where `keeps_fixed_points` is True: with fresh memory, a proposal equal to the state changes nothing. The
    standard GRU and LSTM cells break it by their equations and say so with False.
    """

    @property
    def keeps_fixed_points(self) -> bool: ...

    def start(self, state: State, /) -> Memory: ...
    def __call__(self, state: State, proposal: State, memory: Memory, /) -> tuple[State, Memory]: ...


class Halt(Protocol):
    """Which rows are done? Law: weights are not negative and those of a row sum to one when it stops.

    The driver ignores verdicts on rows that have stopped, and readouts give what is missing to one at the cap to the
    last state. `learned`: has parameters that need a gradient through the score. `stops`: may ever stop a row. `mixes`:
    spreads its weights over the steps, so that the readout must be a weighted one. A rule that knows from its start
    when it will stop may declare `foreseen(memory)`, the number of steps of each row: a gradient rule of the last steps
    then need not run the loop to see where they are.
    """

    @property
    def learned(self) -> bool: ...
    @property
    def stops(self) -> bool: ...
    @property
    def mixes(self) -> bool: ...

    def start(self, state: State, rows: Rows, /) -> Memory: ...
    def __call__(self, old: State, new: State, memory: Memory, index: int, /) -> tuple[Verdict, Memory]: ...


class Readout(Protocol):
    """What is returned? Law: folding in two pieces equals folding in one.

    `weighted`: earlier states than the last reach the value. A readout may also declare `settles`: what it has folded
    of a row does not change after the row has stopped, so that the row may leave the batch; without it, it stays.
    """

    @property
    def weighted(self) -> bool: ...

    def start(self, state: State, rows: Rows, /) -> Memory: ...
    def fold(self, folded: Memory, state: State, verdict: Verdict, alive: Tensor, /) -> Memory: ...
    def finish(self, folded: Memory, carry: Carry, /) -> Any: ...


class Grad(Protocol):
    """Which steps are differentiated? Law: values, steps and verdicts equal a plain run's.

    `complete`: every step is differentiated, so that a learned halting rule is taught. `final`: only the last state
    carries a gradient, so that the readout must not give others.
    """

    @property
    def complete(self) -> bool: ...
    @property
    def final(self) -> bool: ...

    def __call__(self, run: Run, carry: Carry, steps: int, /) -> Carry: ...


class Execute(Protocol):
    """How are steps run? Law: equals the naive run in outputs and gradients.

    `advance` makes one step; where only that is asked for, any function of a carry serves.
    """

    def __call__(self, advance: Advance, carry: Carry, steps: int, /) -> Carry: ...
