"""A loop inside a causal model: what attention is given, which rows are alive, and what a rule may read.

In: a loop, its context, a mask of real tokens. Out: the loop's output, with the cache told at every step who is
stepped. Deliberately elsewhere: the model around the loop (`loopaware.lm.model`), the tensors of the cache
(`loopaware.lm.cache`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from loopaware import tree
from loopaware.checks import fitting
from loopaware.execute import Eager
from loopaware.grad import Checkpointed, Full, Truncated
from loopaware.lm.cache import View
from loopaware.loop import Loop
from loopaware.protocols import Advance, Body, Carry, Context, Execute, Grad, Output, Readout, Run

CONTEXT: ContextVar[Context] = ContextVar("the context of the loop that is running, for the rows at hand")


@dataclass(frozen=True)
class Attention:
    """What attention is given besides states: masks, positions, and the keys and values of the past.

    It stands in the loop's context under "attention"; rows that leave the batch take their share along.

    Args:
        mask: as the attention interface wants it, or a mapping of masks by the kind of layer.
        positions: of the tokens, counted without padding.
        rotary: what the model makes of them, for example cos and sin.
        cache: a view, or None.

    Shapes: positions (B or 1, T), rotary (B or 1, T, d) each.
    """

    mask: Any
    positions: Tensor
    rotary: Any = None
    cache: View | None = None

    def at(self, step: int) -> Attention:
        """At a step of the loop: what a body calls first."""
        return self if self.cache is None else replace(self, cache=self.cache.at(step))

    def reading(self) -> Attention:
        """For layers behind the loop while it runs: what a model calls when a rule reads a state."""
        return self if self.cache is None else replace(self, cache=self.cache.reading())

    def among(self, index: Tensor) -> Attention:
        """For some of the rows. Shapes: index (k)."""
        return Attention(
            picked(index, self.mask),
            picked(index, self.positions),
            picked(index, self.rotary),
            None if self.cache is None else self.cache.among(index),
        )


def picked(index: Tensor, leaf: Any) -> Any:
    """The rows of whatever is not shared by all of them."""
    if isinstance(leaf, BlockMask):
        return leaf if leaf.kv_num_blocks.shape[0] == 1 else blocks(index, leaf)
    if isinstance(leaf, Mapping):
        return {key: picked(index, each) for key, each in leaf.items()}
    return tree.map(lambda each: each if len(each) == 1 else each.index_select(0, index), leaf)


def blocks(index: Tensor, mask: BlockMask) -> BlockMask:
    """Some rows of a mask of flex attention, whose function goes on counting rows as before."""
    full = (mask.full_kv_num_blocks, mask.full_kv_indices)
    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks.index_select(0, index),
        mask.kv_indices.index_select(0, index),
        *(None if each is None else each.index_select(0, index) for each in full),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=lambda row, head, query, key: mask.mask_mod(index[row], head, query, key),
        seq_lengths=mask.seq_lengths,
    )


def current() -> Context:
    """The context of the loop that is running, for the rows that are at hand.

    For heads of halting rules, which are given a state and nothing else.

    Raises:
        LookupError: no loop of a language model is running.
    """
    context = CONTEXT.get(None)
    if context is None:
        raise LookupError(
            "a state must be read while the loop of a language model runs, got none running. Use model.predict as the "
            "head of a halting rule of model.loop, and call the model."
        )
    return context


@dataclass(frozen=True)
class Stepped:
    """Run steps as `inner` does, and tell the cache before each who is alive and what is read after it."""

    inner: Execute

    @property
    def gathers(self) -> bool:
        return getattr(self.inner, "gathers", False)

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        def step(carry: Carry, context: Context, body: Body, readout: Readout) -> Carry:
            tell(context["attention"].cache, carry)
            token = CONTEXT.set(context)
            try:
                return advance.step(carry, context, body, readout)
            finally:
                CONTEXT.reset(token)

        return self.inner(advance._replace(step=step), carry, steps)


def tell(view: View | None, carry: Carry) -> None:
    """Who is alive in the step to come, and how many steps stand behind what is read after it."""
    if view is None:
        return
    run, rows = view.run, view.rows
    run.read = carry.index + 1
    run.ran += len(carry.alive) * run.count
    if rows is None:
        run.alive = carry.alive
    else:  # who has left the batch has stopped
        nobody = carry.alive.new_zeros(view.cache.batch, *carry.alive.shape[1:])
        run.alive = nobody.index_copy(0, rows, carry.alive)


@dataclass(frozen=True)
class Rerun:
    """The gradient of `inner`, with every step that it differentiates run again in the backward pass."""

    inner: Grad

    @property
    def complete(self) -> bool:
        return self.inner.complete

    @property
    def final(self) -> bool:
        return self.inner.final

    def __call__(self, run: Run, carry: Carry, steps: int) -> Carry:
        again = run._replace(forward=lambda carry, steps: Checkpointed()(run, carry, steps))
        return self.inner(again, carry, steps)


def rerun(grad: Grad) -> Grad:
    """The rule for gradient checkpointing; rules that keep no activations of many steps stay as they are."""
    return Rerun(grad) if isinstance(grad, Full | Truncated) else grad


def altered(
    loop: Loop, *, readout: Readout | None = None, grad: Grad | None = None, execute: Execute | None = None
) -> Loop:
    """The loop with other parts for one call: its own modules, modes and hooks, which `Loop.replace` would not keep.

    Raises:
        ValueError: parts that do not fit, as where a loop is made.
    """
    twin = copy.copy(loop)
    twin._modules = dict(loop._modules)
    for name, part in (("readout", readout), ("grad", grad), ("execute", execute)):
        if part is not None:
            twin._modules.pop(name, None)
            setattr(twin, name, part)
    fitting(twin)
    return twin


def looped(
    loop: Loop, context: Context, mask: Tensor | None, max_steps: int | None, carry: Carry | None = None
) -> Output:
    """Run the loop of a language model on a context with "x" and "attention", from its start or from a carry.

    Where stopped tokens go on making keys and values, nobody leaves the batch.
    """
    view: View | None = context["attention"].cache
    inner = loop.execute
    if view is not None and view.cache.policy.frozen and getattr(inner, "gathers", False):
        inner = Eager(getattr(inner, "check", True))
    token = CONTEXT.set(context)
    try:
        return altered(loop, execute=Stepped(inner))(context, mask=mask, carry=carry, max_steps=max_steps)
    finally:
        CONTEXT.reset(token)


def settle(loop: Loop, out: Output, context: Context, max_steps: int, read: Callable[[Any], Any]) -> None:
    """Let all tokens, which have stopped, make keys and values for the steps that are left.

    Up to `max_steps`, or up to the deepest step that the cache has seen; `read` is run too if it was run before.
    """
    view: View = context["attention"].cache
    view.run.alive = None
    token = CONTEXT.set(context)
    try:
        for index in range(out.carry.index, max(max_steps, view.cache.depth)):
            loop.body(out.carry.state, context, index)
            view.run.ran += len(context["x"]) * view.run.count
            if view.run.reads:
                view.run.read = index + 1
                read(out.carry.state)
    finally:
        CONTEXT.reset(token)
