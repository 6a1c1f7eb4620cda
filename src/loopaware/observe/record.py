"""The trajectory of every loop of a model: what each row did at each step.

In: a module, while it runs inside `record`. Out: for each loop, by its module name, a `Trajectory` for each call.
A recording is a readout around the loop's own; outside `record` nothing is added to a step. Deliberately elsewhere:
costs (`loopaware.observe.cost`), pictures (`loopaware.observe.report`), losses on trajectories
(`loopaware.train.objectives`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from loopaware import execute, tree
from loopaware.halt.measure import changes
from loopaware.loop import Loop
from loopaware.protocols import Carry, Execute, Memory, Readout, Rows, State, Verdict


class Trajectory(NamedTuple):
    """What one call of a loop did, with its gradients.

    Shapes: steps, halted (*rows); weights, scores, residuals, alive, distances (T, *rows), T = steps that were run.
    `weights` of a row that took a step sum to one: what the rule left over stands at its last step. `residuals` are the
    relative changes max |h_t - h_{t-1}| / |h_t| and `distances` the changes max |h_t - h_{t-1}|, over a row's real
    positions; `alive` says who took step t; `states` holds T states or None.
    """

    steps: Tensor
    halted: Tensor
    weights: Tensor
    scores: Tensor
    residuals: Tensor
    alive: Tensor
    states: tuple[State, ...] | None
    distances: Tensor

    @property
    def last(self) -> Tensor:
        """Which step was each row's last. Shapes: (T, *rows) bool; none of padding."""
        return self.numbers == self.alive.sum(0)

    @property
    def numbers(self) -> Tensor:
        """The number of each step, from 1. Shapes: (T, 1, ...), to be used with (T, *rows)."""
        return torch.arange(1, len(self.alive) + 1, device=self.alive.device).reshape(-1, *[1] * self.steps.ndim)

    def among(self, rows: Tensor) -> Trajectory:
        """The same trajectory with every other row taken for padding: of a loop in a loop, where the outer row stepped.

        The k-th call of the inner loop belongs to step k of the outer one: `inner.among(outer.alive[k])`. A mask of
        more axes makes the positions behind the rows rows of their own, which all did what their row did: so a loss
        for each token can be taken where sequences halt, and `path.among(labels != -100)` is right for both.

        Shapes: rows bool, the row axes, their first ones, or more.

        Raises:
            ValueError: a mask of more axes does not begin with the row axes.
        """
        path = self.apart(rows.shape) if rows.ndim > self.steps.ndim else self
        chosen = tree.expand(rows, path.steps)
        halted, alive, weights = path.halted & chosen, path.alive & chosen, path.weights * chosen
        return path._replace(steps=path.steps * chosen, halted=halted, weights=weights, alive=alive)

    def apart(self, shape: torch.Size) -> Trajectory:
        """The same trajectory, each row repeated for every position behind it. Shapes: shape begins with the rows."""
        rows, behind = self.steps.shape, shape[self.steps.ndim :]
        if shape[: len(rows)] != rows:
            raise ValueError(
                f"a mask of a trajectory must begin with the rows {tuple(rows)}, got {tuple(shape)}. Swap its axes."
            )

        def repeated(leaf: Tensor) -> Tensor:
            return leaf[(..., *[None] * len(behind))].expand(*leaf.shape, *behind)

        return self._replace(**{name: repeated(getattr(self, name)) for name in self._fields if name != "states"})

    @property
    def counts(self) -> Tensor:
        """How many rows took each step. Shapes: (T,)."""
        return self.alive.flatten(1).sum(1)


class Tape(dict[str, list[Trajectory]]):
    """Trajectories by the name of the loop in the model; the model itself, if it is a loop, has the name ""."""

    @property
    def only(self) -> Trajectory:
        """The one trajectory of a tape with one loop that was called once.

        Raises:
            ValueError: there are none, or several.
        """
        found = [trajectory for calls in self.values() for trajectory in calls]
        if len(found) != 1:
            counts = {name: len(calls) for name, calls in self.items()}
            raise ValueError(
                f"a tape must hold one trajectory to be read by `only`, got {counts}. "
                "Read it by name: tape['encoder.loop'][0]."
            )
        return found[0]


@contextmanager
def record(model: nn.Module, states: bool = False) -> Iterator[Tape]:
    """Record every loop in `model` while the block runs.

    A loop around other loops that lets rows leave its batch (`execute.Compacted`) or replays its steps
    (`execute.Graphed`) runs as `execute.Eager` while it is recorded, so that every call of the inner loops is seen,
    with all rows.

    Args:
        model: a loop, or a module with loops anywhere inside.
        states: keep the state of every step too.

    Raises:
        ValueError: the model has no loop.

    >>> from loopaware import Loop, halt
    >>> loop = Loop(lambda state, context, index: state / 2, max_steps=9, halt=halt.Converged(rtol=0.0, atol=0.2))
    >>> with record(loop) as tape:
    ...     _ = loop(torch.tensor([[1.0], [0.5]]))
    >>> tape.only.counts
    tensor([2, 2, 1])
    """
    loops = {name: module for name, module in model.named_modules() if isinstance(module, Loop)}
    if not loops:
        raise ValueError(f"a recorded model must contain a Loop, got {type(model).__name__} without one.")
    tape = Tape({name: [] for name in loops})
    with ExitStack() as stack:
        for name, loop in loops.items():
            if len([None for module in loop.modules() if isinstance(module, Loop)]) > 1 and hides(loop.execute):
                stack.enter_context(shadow(loop, "execute", execute.Eager(loop.execute.check)))
            stack.enter_context(shadow(loop, "readout", Recorded(loop.readout, tape[name], states)))
        yield tape


def hides(part: Execute) -> TypeGuard[execute.Compacted | execute.Graphed]:
    """Whether calls of loops inside the body are not all seen, or not whole."""
    return getattr(part, "gathers", False) or getattr(part, "captures", False)


@contextmanager
def shadow(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Let `module.name` be `value` for a while. The instance's own dict is seen before registered modules."""
    kept = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        module.__dict__.pop(name)
        if kept is not None:
            module.__dict__[name] = kept


class Notes(NamedTuple):
    """What a recording folds: the readout's own memory, the state before, and a tuple for each quantity."""

    inner: Memory
    state: State
    rows: Rows
    steps: tuple[tuple[Tensor, ...], ...] = ()
    states: tuple[State, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """A readout that returns what `inner` returns, and appends the trajectory to `calls`."""

    inner: Readout
    calls: list[Trajectory] = field(repr=False)
    keep: bool

    @property
    def weighted(self) -> bool:
        return self.inner.weighted

    def start(self, state: State, rows: Rows) -> Notes:
        return Notes(self.inner.start(state, rows), state, rows)

    def fold(self, folded: Notes, state: State, verdict: Verdict, alive: Tensor) -> Notes:
        with torch.no_grad():
            residual, moved = changes(folded.state, state, folded.rows)
        return Notes(
            self.inner.fold(folded.inner, state, verdict, alive),
            state,
            folded.rows,
            (*folded.steps, (verdict.weight, verdict.score, residual, alive, moved)),
            (*folded.states, state) if self.keep else (),
        )

    def finish(self, folded: Notes, carry: Carry) -> Any:
        if folded.steps:
            series = [torch.stack(each) for each in zip(*folded.steps, strict=True)]
        else:
            empty = folded.rows.zeros(carry.state)[None][:0]
            series = [empty, empty, empty, empty.bool(), empty]
        weights, scores, residuals, alive, distances = series
        states = folded.states if self.keep else None
        path = Trajectory(carry.steps, carry.halted, weights, scores, residuals, alive, states, distances)
        self.calls.append(path._replace(weights=weights + path.last * (1 - weights.sum(0))))
        return self.inner.finish(folded.inner, carry)
