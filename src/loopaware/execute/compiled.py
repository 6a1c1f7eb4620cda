"""Steps that are compiled once, while the loop that repeats them stays Python.

In: `advance`, a carry, a number of steps. Out: the carry after them, as `Eager` would have it. What is compiled is a
whole step but for the readout's fold, whose memory may grow; whether to go on is looked at outside. Deliberately
elsewhere: whole loops in one graph (`torch.compile(loop)` with `Unrolled`), CUDA graphs (`loopaware.execute.graphed`).
"""

from __future__ import annotations

import itertools
import math
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from loopaware import tree
from loopaware.execute.eager import Eager, Unrolled, summed
from loopaware.protocols import Advance, Carry, Context, Memory, State, Verdict

__all__ = ["Compiled"]

LIMIT = 64
"""How many graphs the step of one body may have: for each mix of modes, gradients, kinds of shapes, other parts."""

FUNCTIONS: Any = WeakIdKeyDictionary()
"""For each body, as long as it lives, its compiled step by backend."""

NUMBERS = itertools.count()


@dataclass(frozen=True, repr=False)
class Compiled:
    """Run until no row is alive, by a step that `torch.compile` has made one graph: while any(alive): c = step(c).

    The result is that of `Eager` to rounding, gradients included; one and the same seed draws the same numbers. Never
    take it without measuring (`loopaware bench compiled`). On two CPU cores a block of 64 features and one sequence
    took .74 of the time of `Eager`, .84 in training, wider or fuller ones .88 to 1.00: it pays where a step is so small
    that Python is most of it. Compiling took 3 seconds, 9 in training, which hundreds to thousands of runs pay back.

    A graph serves all steps, batches and lengths: one without gradients, two in training, since the first step's state
    has none; the same again for a second size, of which any further one is an instance, and for sizes of one. Bodies
    that differ share nothing, loops of one body what they can, and no weight changes its name. State buffers are not
    made beforehand: that gained nothing. Under `torch.compile` or `torch.export` of a larger model it runs every step,
    as `Unrolled`. The step must be a single graph: a loop inside the body takes `Unrolled()` or `Compiled()`, and
    Python that depends on a tensor's numbers has no place in it; what branches on the index is compiled for each
    branch. In training it switches PyTorch's donated buffers off, for the process; second derivatives need `Eager`, and
    weights that only a rule's score needs receive zeros where `Eager` gives nothing.

    Args:
        backend: that of `torch.compile`; inductor needs a C++ compiler, or a GPU that Triton serves.
        check: raise where a real position of the state is not finite.

    Raises:
        FloatingPointError: as `Eager`.
        RuntimeError: the step is no single graph, the backend fails, or every call needs a graph of its own.

    >>> from loopaware import Loop
    >>> loop = Loop(lambda state, context, index: state / 2, max_steps=3, execute=Compiled(backend="eager"))
    >>> loop(torch.ones(1, 2)).value
    tensor([[0.1250, 0.1250]])
    """

    backend: str | Callable[..., Any] = "inductor"
    check: bool = True

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        if torch.compiler.is_compiling():
            return Unrolled()(advance, carry, steps)
        step, looking = Step(advance, function(advance, self.backend), self.check), Eager(self.check)
        going = looking.look(carry)
        if going:
            carry = apart(carry, advance.context)
        with compiling():
            for _ in range(steps):
                if not going:
                    break
                carry, alive, total = step(carry)
                going = alive if math.isfinite(total) else looking.look(carry)
        return carry

    def __repr__(self) -> str:
        named = getattr(self.backend, "__qualname__", type(self.backend).__name__)
        backend = repr(self.backend) if isinstance(self.backend, str) else named
        return f"Compiled(backend={backend}, check={self.check})"


class Kept:
    """A readout that folds nothing and hands out the verdict, for whoever folds outside."""

    def fold(self, folded: Memory, state: State, verdict: Verdict, alive: Tensor) -> Verdict:
        return verdict


KEPT: Any = Kept()


class Step:
    """One step by a compiled function, and the fold of the loop's readout."""

    def __init__(self, advance: Advance, function: Callable[..., tuple[Carry, Tensor]], check: bool):
        self.advance, self.function, self.check = advance, function, check
        self.inner = advance._replace(readout=KEPT)

    def __call__(self, carry: Carry) -> tuple[Carry, bool, float]:
        """The carry after it; whether a row is alive, and a number that is finite if the state is."""
        out, seen = self.compiled(carry)
        folded = self.advance.readout.fold(carry.readout, out.state, out.readout, carry.alive)
        alive, total = seen.tolist() if self.check else (seen, 0.0)
        return out._replace(readout=folded, index=carry.index + 1), bool(alive), total

    def compiled(self, carry: Carry) -> tuple[Carry, Tensor]:
        from torch._dynamo import exc

        plain = carry._replace(readout=None, index=0)
        try:
            return self.function(self.inner, plain, clock(carry.index), self.check)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            failure = error
        self.advance(carry)  # what is wrong with the step itself is better told by the step
        raise RuntimeError(refusal(failure)) from failure


@contextmanager
def compiling() -> Iterator[None]:
    """PyTorch's settings while steps may be compiled."""
    from torch._dynamo import config
    from torch._functorch import config as differentiated

    if torch.is_grad_enabled():
        # Else a graph's second backward pass is refused, and grad.Implicit makes many. It is read then, not only now.
        differentiated.donated_buffer = False
    with ExitStack() as stack:
        stack.enter_context(config.patch(recompile_limit=max(LIMIT, config.recompile_limit)))
        if any(action == "error" for action, *_ in warnings.filters):
            # PyTorch warns of what it does itself while it compiles, and that would be the end of it.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"torch\.")
        yield


def clock(index: int) -> Tensor:
    """The index as the size of an empty tensor: sizes may vary without a new graph, while 0 and 1 are told apart of
    numbers. Shapes: -> (index + 2, 0).
    """
    time = torch.empty(index + 2, 0, device="cpu")
    torch._dynamo.maybe_mark_dynamic(time, 0)
    return time


def step(advance: Advance, carry: Carry, time: Tensor, check: bool) -> tuple[Carry, Tensor]:
    """What is compiled: a step, and the numbers by which to go on or not. Shapes: time (index + 2, 0), -> (2) or ()."""
    out = advance(carry._replace(index=time.shape[0] - 2))
    alive = out.alive.any()
    if not check:
        return out, alive
    total = summed(out.state)
    return out, torch.stack([alive.to(total), total])


def function(advance: Advance, backend: str | Callable[..., Any]) -> Callable[..., tuple[Carry, Tensor]]:
    """The compiled step of this body."""
    key: Any = advance.body
    try:
        weakref.ref(key)
    except TypeError:  # as an instance with slots
        key = getattr(advance.step, "__self__", advance.step)
    made = FUNCTIONS.setdefault(key, {})
    if backend not in made:
        # Draws are PyTorch's own, so that they are those of a plain run.
        options: Any = {"fallback_random": True} if backend == "inductor" else None
        made[backend] = torch.compile(own(key), fullgraph=True, backend=backend, options=options)
    return made[backend]


def own(key: Any) -> Any:
    """`step` with a code object of its own: graphs, and which sizes vary, are noted by that and by its name."""
    name = f"step_{next(NUMBERS)}_of_{type(key).__name__}"
    return types.FunctionType(step.__code__.replace(co_name=name), step.__globals__, name)


def apart(carry: Carry, context: Context) -> Carry:
    """The same carry, no part of which is another one or the context: which are is a condition of a graph, and is so
    at the first step alone, where a state is the input and its rows the mask.
    """
    carry = tree.map(lambda leaf: leaf, carry._replace(readout=None))._replace(readout=carry.readout)
    seen = {id(leaf) for leaf in tree.leaves((context, carry.update, carry.halt, carry.rows))}

    def other(leaf: Tensor) -> Tensor:
        if id(leaf) in seen:
            return leaf.clone()  # a view would be told from what is none
        seen.add(id(leaf))
        return leaf

    state, alive, halted, steps = tree.map(other, (carry.state, carry.alive, carry.halted, carry.steps))
    return carry._replace(state=state, alive=alive, halted=halted, steps=steps)


def refusal(error: Exception) -> str:
    """What to say where a step cannot be compiled."""
    from torch._dynamo import config, exc

    if isinstance(error, exc.FailOnRecompileLimitHit):
        return (
            f"a body's step must need at most {config.recompile_limit} graphs, got one more. Something is new at every "
            "call: pad to few shapes, keep parts rather than make them anew, and compute with the index rather than "
            "branch on it; or take execute.Eager()."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {' '.join(lines[:2])}"
    if isinstance(error, exc.BackendCompilerFailed):
        return (
            f"the backend of execute.Compiled must be able to compile the step, got {said}. Inductor needs a C++ "
            "compiler on this machine: install one, or take execute.Eager()."
        )
    return (
        f"a step must be a single graph for execute.Compiled, got {said}. Give loops inside the body "
        "execute.Unrolled(), keep Python that depends on a tensor's numbers out of the step, or take execute.Eager()."
    )
