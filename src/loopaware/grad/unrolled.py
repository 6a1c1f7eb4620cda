"""Gradients by backpropagation through steps that were run: all of them, or the last ones of each row.

In: `run(carry, steps)`, a carry, and how many steps are left. Out: the carry after them, attached to the graph as the
rule says. Deliberately elsewhere: gradients of places of rest (`loopaware.grad.rest`), steps that are undone in the
backward pass (`loopaware.grad.reversible`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from loopaware import tree
from loopaware.checks import bounded
from loopaware.grad.attach import linked, random_state, restore
from loopaware.protocols import Carry, Run

__all__ = ["Checkpointed", "Full", "Truncated"]


@dataclass(frozen=True)
class Full:
    """Differentiate every step: backpropagation through the loop.

    Exact; memory grows with the number of steps. The default.

    >>> Full()(lambda carry, steps: carry + steps, 0, 3)
    3
    """

    complete = True
    final = False

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        return run(carry, steps)


@dataclass(frozen=True)
class Checkpointed:
    """Differentiate every step, keep only every k-th carry: the steps between are run again in the backward pass.

    The gradient of Full for about a third more time and the memory of T/k carries and k steps; random numbers are
    replayed. Not for short loops, where Full is faster. With a budget the first step is weighed, and the loop runs as
    Full if all steps fit, else with the k that takes the least memory.

    Args:
        every: k, steps between two carries that are kept.
        budget: bytes that the loop may keep for the backward pass, in place of `every`; what the loop's parts share
            with the rest of the model is not counted.

    Raises:
        ValueError: `every` or `budget` is below one, both are given, or no k fits the budget (when it runs).

    References: T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174.

    >>> Checkpointed(every=2)(lambda carry, steps: carry + steps, torch.zeros(()), 3)
    tensor(3.)
    """

    complete = True
    final = False
    every: int | None = None
    budget: int | None = None

    def __post_init__(self):
        if self.every is not None:
            bounded("every", self.every, "Keep a carry at least every T steps.")
        if self.budget is not None:
            bounded("budget", self.budget, "It is in bytes.")
            if self.every is not None:
                raise ValueError(f"every must be None when a budget is given, got {self.every}. The budget chooses it.")

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if not torch.is_grad_enabled() or steps < 1:
            return run(carry, steps)
        every = self.every or 1
        if self.budget is not None:
            carry, kept = weighed(run, carry)
            steps -= 1
            every = self.fitting(kept, size(carry), steps)
            if every == 0:
                return run(carry, steps)
        for done in range(0, steps, every):
            carry = checkpoint(run, carry, min(every, steps - done), use_reentrant=False)
        return carry

    def fitting(self, step: int, carry: int, steps: int) -> int:
        """The k with the least memory, ceil(T/k) carries and k steps; 0 if all T steps fit as they are."""
        budget = self.budget or 0
        if step * (steps + 1) <= budget:
            return 0
        bytes_of = {k: step * (k + 1) + carry * math.ceil(steps / k) for k in range(1, steps + 1)}
        least = min(bytes_of, key=lambda k: bytes_of[k]) if bytes_of else 1
        if bytes_of and bytes_of[least] > budget:
            raise ValueError(
                f"budget must be at least {bytes_of[least]} bytes for {steps + 1} steps of this loop, got {budget}. "
                "Take smaller batches, grad.Truncated or grad.Implicit."
            )
        return least


def weighed(run: Run, carry: Carry) -> tuple[Carry, int]:
    """One step, and the bytes it keeps for its backward pass; parameters and shared storages are counted once."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not any(isinstance(owner, torch.nn.Parameter) for owner in (tensor, tensor._base)):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        carry = run(carry, 1)
    return carry, sum(seen.values())


def size(carry: Carry) -> int:
    """Bytes of a carry."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(carry))


@dataclass(frozen=True)
class Truncated:
    """Differentiate the last k steps of every row: dL/dh_{T-k} = 0.

    Memory of k steps, and a biased gradient that forgets what earlier steps did. A row that stops early has its own
    last k steps differentiated, whatever its neighbours do; then the loop is run twice, first without gradients to
    learn where each row stops, unless the rule knows beforehand (`halt.Drawn`, `halt.Written`). Rows of different
    depths so keep more than k steps: all from k before the first row's stop on. With `least`, every run draws k anew
    from `least` to `last` (PyTorch's generator), so that no step is always the first to be taught.

    Args:
        last: how many steps of each row are differentiated, at most.
        least: the smallest window; None always takes `last`.

    Raises:
        ValueError: `last` or `least` is below one, or `least` above `last`.

    References: A. Bansal et al., "End-to-end Algorithm Synthesis with Recurrent Networks", 2022, arXiv 2202.05826;
    J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171.

    >>> Truncated(last=4).complete
    False
    """

    complete = False
    final = False
    last: int = 4
    least: int | None = None

    def __post_init__(self):
        bounded("last", self.last, "Without a differentiated step nothing is learned.")
        if self.least is not None and bounded("least", self.least, "Without a step nothing is learned.") > self.last:
            raise ValueError(f"least must be at most last, got {self.least} and {self.last}. Swap them.")

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        if not torch.is_grad_enabled():
            return run(carry, steps)
        last = self.last if self.least is None else int(torch.randint(self.least, self.last + 1, ()))
        if steps <= last:
            return run(carry, steps)
        ends = known(run, carry, steps)
        out = self.cut(run, carry, steps, last) if ends is None else replayed(run, carry, ends, last)
        return linked(out, carry)

    def cut(self, run: Run, carry: Carry, steps: int, last: int) -> Carry:
        device = carry.alive.device
        before = random_state(device)
        with torch.no_grad():
            probe = run(carry, steps - last)
        if bool((probe.alive == carry.alive).all()):
            out = run(tree.detach(probe), last)
        else:
            with torch.no_grad():
                out = run(probe, last)
        ends = out.steps - carry.steps
        if bool((ends == steps * carry.alive).all()):
            return out
        restore(before, device)
        return replayed(run, carry, ends, last)


def known(run: Run, carry: Carry, steps: int) -> torch.Tensor | None:
    """How many of the next steps each row takes, if its rule knows before. Shapes: -> (*rows) long."""
    ends = None if run.foreseen is None else run.foreseen(carry.halt)
    return None if ends is None else (ends.long() - carry.index).clamp(1, steps) * carry.alive


def replayed(run: Run, carry: Carry, ends: torch.Tensor, last: int) -> Carry:
    """Run so that row r, which takes `ends[r]` steps, is attached from its step `ends[r] - last` on."""
    stepped = ends[ends > 0]
    if stepped.numel() == 0:
        return carry
    shortest, final = int(stepped.min()), int(stepped.max())
    first = max(shortest - last, 0)
    with torch.no_grad():
        carry = run(carry, first)
    if shortest == final:
        return run(tree.detach(carry) if first else carry, final - first)
    for done in range(first, final):
        carry = run(tree.where(done > ends - last, carry, tree.detach(carry)), 1)
    return carry
