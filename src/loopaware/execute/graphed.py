"""Steps that were captured as CUDA graphs, one for each index, and are replayed.

In: `advance`, a carry, a number of steps, without gradients. Out: the carry after them, in tensors of its own.
Deliberately elsewhere: steps that are compiled (`loopaware.execute.compiled`), and what may be captured at all, which
CUDA decides.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from loopaware import tree
from loopaware.checks import bounded
from loopaware.execute.compiled import KEPT
from loopaware.execute.eager import Eager, Unrolled
from loopaware.protocols import Advance, Carry, Context, Verdict

__all__ = ["Graphed"]

SHELVES: Any = WeakIdKeyDictionary()
"""For each loop, as long as it lives, its `Shelf`."""


class Stepped(NamedTuple):
    """What a captured step computes: for the readout the verdict and who took the step, and the next carry."""

    verdict: Verdict
    alive: Tensor
    carry: Carry


class Capture(Protocol):
    """Makes a step replayable: `run` computes from static tensors, `write` puts the result back into them.

    Returned are a function that does both once more, and the tensors in which it leaves what `run` returns. `run` may
    be called any number of times before; `write` belongs to a replay alone.
    """

    def __call__(
        self, run: Callable[[], Stepped], write: Callable[[Stepped], None], /
    ) -> tuple[Callable[[], None], Stepped]: ...


class CUDAGraphs:
    """Captures on the current CUDA device, all in one pool of memory, to be replayed in turn."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, run: Callable[[], Stepped], write: Callable[[Stepped], None]
    ) -> tuple[Callable[[], None], Stepped]:
        caching = torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)  # weights that were cast outside of a graph would not outlive it
        try:
            # Once before, on a stream of its own: libraries set themselves up at their first use.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.random.fork_rng([torch.cuda.current_device()]):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = run()
                write(out)
        finally:
            torch.set_autocast_cache_enabled(caching)
        return graph.replay, out


@dataclass(frozen=True)
class Graphed:
    """Replay captured steps, and look at the device at every k-th only: if t mod k = 0 and not any(alive), stop.

    For inference on a GPU with steps so short that launching their kernels takes longer than running them. NOT YET RUN
    ON A GPU: what is here was tested with a stand-in for the capture. Rows that have stopped stay as they are, so that
    value, steps and verdicts are those of `Eager`; up to k - 1 steps more are run and counted in `carry.index`, as by
    `Unrolled`.

    Every index has a graph of its own, since a step may depend on it, captured when it is first met. All share one pool
    of memory and one set of static tensors: context and carry are copied in at the start of a run, the result is copied
    out at its end. Each mix of shapes is captured anew and kept as long as the loop lives, so pad to few; a loop that
    `replace` makes has graphs of its own. Weights may change in place. If a mode changes, or an attribute of a module,
    graphs are captured again; what a function closes over is not seen. A step that waits for the device cannot be
    captured: loops inside the body take `Unrolled()`.

    Args:
        look: k, steps between two looks at the device.
        check: raise where a real position of the state is not finite, at a look or at the end.
        capture: makes a `Capture` for one loop and one mix of shapes.

    Raises:
        FloatingPointError: as `Eager`.
        RuntimeError: the device is no GPU, gradients are enabled, or what a part remembers changes its shape.
        TypeError: the context is a thing whose tensors are not seen (when it runs).
        ValueError: `look` is below one.

    >>> Graphed(look=8)
    Graphed(look=8, check=True)
    """

    captures = True  # the body's Python is not run at every step, so that what it notes down is not noted
    look: int = 4
    check: bool = True
    capture: Callable[[], Capture] = field(default=CUDAGraphs, repr=False)

    def __post_init__(self):
        bounded("look", self.look, "1 looks at every step.")

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        if torch.compiler.is_compiling():
            return Unrolled()(advance, carry, steps)
        device = carry.alive.device
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients must be off for execute.Graphed, got them enabled. Call the loop under torch.no_grad(), or "
                "take execute.Eager() or execute.Compiled()."
            )
        if self.capture is CUDAGraphs and device.type != "cuda":
            raise RuntimeError(
                f"the device must be a GPU with CUDA for execute.Graphed, got {device}. Move the loop and its input "
                "there, or take execute.Eager() or execute.Compiled()."
            )
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # static tensors outlive the mode they are made in
            stack.enter_context(torch.no_grad())
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            return self.replayed(captured(self, advance, carry), advance, carry, steps)

    def replayed(self, graphs: Graphs, advance: Advance, carry: Carry, steps: int) -> Carry:
        looking = Eager(self.check)
        now = graphs.enter(advance.context, carry)
        for taken in range(steps):
            if taken % self.look == 0 and not looking.look(now):
                return graphs.leave(now, carry)
            now = graphs.step(advance, now)
        looking.look(now)
        return graphs.leave(now, carry)


class Replay(NamedTuple):
    """A captured step: `again` takes it, and leaves what a readout asks for in tensors of its own.

    `moved`: which numbers of the carry it makes anew, in order.
    """

    again: Callable[[], None]
    verdict: Verdict
    alive: Tensor
    moved: tuple[bool, ...]


class Graphs:
    """The captured steps of a loop for one mix of shapes, by index, and the static tensors they read and write."""

    def __init__(self, capture: Capture, context: Context, carry: Carry, shelf: Shelf):
        self.capture, self.shelf = capture, shelf
        self.context, self.carry = tree.map(torch.clone, (context, plain(carry)))
        self.used = storages((self.context, self.carry))
        self.replays: dict[int, Replay] = {}
        self.moved = [False] * len(tree.leaves(self.carry))

    def enter(self, context: Context, carry: Carry) -> Carry:
        """Copy a run's context and carry in. Out: the static carry, with the run's readout and index."""
        self.moved = [False] * len(self.moved)
        write((self.context, self.carry), (context, plain(carry)))
        return self.carry._replace(readout=carry.readout, index=carry.index)

    def step(self, advance: Advance, now: Carry) -> Carry:
        if now.index not in self.replays:
            self.replays[now.index] = self.captured(advance, now.index)
            self.shelf.held = noticed(advance, now)  # capturing runs modules, and they may count that
        replay = self.replays[now.index]
        replay.again()
        self.moved = [one or other for one, other in zip(self.moved, replay.moved, strict=True)]
        folded = advance.readout.fold(now.readout, self.carry.state, replay.verdict, replay.alive)
        return now._replace(readout=apart(folded, self.used), index=now.index + 1)

    def captured(self, advance: Advance, index: int) -> Replay:
        step, now = advance._replace(context=self.context, readout=KEPT), self.carry._replace(index=index)

        def run() -> Stepped:
            out = step(now)
            # What a step hands on as it is stays where it is; anything else must not lie where something is written.
            carry = tree.map(
                lambda old, new: new if new is old else apart(new, self.used), self.carry, same_kind(out, self.carry)
            )
            return Stepped(apart(out.readout, self.used), now.alive.clone(), carry)

        again, out = self.capture(run, lambda out: write(self.carry, out.carry))
        self.used |= storages((out.verdict, out.alive))
        pairs = zip(tree.leaves(self.carry), tree.leaves(out.carry), strict=True)
        return Replay(again, out.verdict, out.alive, tuple(new is not old for old, new in pairs))

    def leave(self, now: Carry, entered: Carry) -> Carry:
        """The carry in tensors of its own; what no step has made anew is the caller's."""
        moved = iter(self.moved)
        carry = tree.map(lambda static, old: static.clone() if next(moved) else old, self.carry, plain(entered))
        return carry._replace(rows=entered.rows, readout=now.readout, index=now.index)


def plain(carry: Carry) -> Carry:
    """A carry as it is held: without what is folded and counted outside."""
    return carry._replace(readout=None, index=0)


def write(static: Any, values: Any) -> None:
    """Copy a tree into another one of the same kind."""
    tree.map(lambda place, value: place if place is value else place.copy_(value), static, values)


def storages(values: Any) -> set[int]:
    """Which memory a tree lies in."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(values) if leaf.numel()}


def apart(values: Any, used: set[int]) -> Any:
    """The tree, with copies of what lies in memory that is used for something else."""
    return tree.map(lambda leaf: leaf.clone() if storages(leaf) & used else leaf, values)


def same_kind(out: Carry, static: Carry) -> Carry:
    """The carry after a step, if it can be written over the one before."""
    if kind(plain(out)) != kind(static):
        raise RuntimeError(
            f"what a step remembers must keep its shapes for execute.Graphed, got {tree.describe(plain(out))} after "
            f"{tree.describe(static)}. Take execute.Eager()."
        )
    return plain(out)


def kind(values: Any) -> Any:
    """What graphs depend on: structure, shapes, dtypes, devices, and all that is no tensor.

    Raises:
        TypeError: a thing whose tensors are not seen.
    """
    if isinstance(values, Tensor):
        return values.shape, values.dtype, values.device
    if isinstance(values, Mapping):
        return {key: kind(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return type(values), [kind(value) for value in values]
    if values is None or isinstance(values, bool | int | float | str):
        return values
    raise TypeError(
        f"context and carry must be made of tensors, tuples and mappings for execute.Graphed, got "
        f"{type(values).__name__}. Pass a mapping, or take execute.Eager()."
    )


@dataclass
class Shelf:
    """What was captured of one loop as it is now, by the kind of input. Holds no loop: a loop holds this."""

    held: list[Any]
    graphs: list[tuple[Any, Graphs]] = field(default_factory=list)


def captured(rule: Graphed, advance: Advance, carry: Carry) -> Graphs:
    """The graphs of this loop for this kind of input, or room for new ones."""
    held, loop, asked = noticed(advance, carry), owner(advance), (rule.capture, kind((advance.context, plain(carry))))
    shelf: Shelf | None = SHELVES.get(loop)
    if shelf is None or not same(shelf.held, held):
        SHELVES[loop] = shelf = Shelf(held)
    for key, graphs in shelf.graphs:
        if key == asked:
            return graphs
    graphs = Graphs(rule.capture(), advance.context, carry, shelf)
    shelf.graphs.append((asked, graphs))
    return graphs


def owner(advance: Advance) -> Any:
    """The loop whose step it is."""
    return getattr(advance.step, "__self__", advance.step)


def noticed(advance: Advance, carry: Carry) -> list[Any]:
    """What graphs have taken from a loop besides its input: its modules, what they hold, and where weights lie."""
    loop, device = owner(advance), carry.alive.device.type
    modules = list(loop.modules()) if isinstance(loop, nn.Module) else []
    tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    values = [value for module in modules for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    return [
        *(tensor.data_ptr() for tensor in tensors if tensor is not None),
        *(noted(value) for value in (*modules, *values) if value is not advance.readout),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    ]


def noted(value: Any) -> Any:
    """A number or word; a weak reference to anything else, so that nothing is kept alive, the loop least of all."""
    if isinstance(value, bool | int | float | str):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def same(values: list[Any], others: list[Any]) -> bool:
    """Whether all are the same things, or equal numbers and words."""
    simple = bool | int | float | str
    return len(values) == len(others) and all(
        one is two or (isinstance(one, simple) and isinstance(two, simple) and one == two)
        for one, two in zip(values, others, strict=True)
    )
