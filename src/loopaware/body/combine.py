"""Combinators: bodies made from blocks, functions and other bodies.

In: blocks and bodies. Out: a body. Deliberately elsewhere: the blocks and fusions (`loopaware.nn`), and bodies that
solve equations (`loopaware.body.linear`, `loopaware.body.nonlinear`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loopaware import tree
from loopaware.checks import shown
from loopaware.protocols import Body, Context, State, partial
from loopaware.tokens import Tokens

__all__ = ["Called", "Injected", "Relaxed", "Stack", "Surrogate", "Timed"]


class Injected(nn.Module):
    """Show the input to the block at every step: proposal = block(fusion(h, x)).

    Use it whenever the loop may run longer than in training ("recall"): a state that is not reminded of its input
    forgets it. Not needed where the block attends to the context itself.

    Args:
        block: a body.
        fusion: `(state, x) -> state`, for example `nn.Add()`; one with `masked = True` is given the context's mask too.

    Shapes: state (*rows, ..., d), x as the fusion asks.

    References: A. Bansal et al., "End-to-end Algorithm Synthesis with Recurrent Networks", 2022, arXiv 2202.05826.

    >>> import torch
    >>> body = Injected(Called(torch.tanh), lambda state, x: state + x)
    >>> body(torch.zeros(1), torch.ones(1), 0)
    tensor([0.7616])
    """

    def __init__(self, block: Body, fusion: Callable[..., State]):
        super().__init__()
        self.block = block
        self.fusion = fusion

    def forward(self, state: State, context: Context, index: int) -> State:
        return self.block(self.fused(state, context), context, index)

    def fused(self, state: State, context: Context) -> State:
        """What the block is given."""
        x = tree.content(context)
        if getattr(self.fusion, "masked", False) and isinstance(context, Mapping):
            return self.fusion(state, x, context.get("mask"))
        return self.fusion(state, x)

    @property
    def partial(self) -> bool:
        """Whether the block can run for some tokens; the fusion need not."""
        return partial(self.block)

    def some(self, state: Tensor, context: Context, index: int, tokens: Tokens, held: Any) -> tuple[Tensor, Any]:
        """The proposals of some tokens. The fusion is run for those that moved if it declares `local`, else for all."""
        x, block = tree.content(context), self.block
        assert partial(block)
        if not (getattr(self.fusion, "local", False) and isinstance(state, Tensor) and state.shape == x.shape):
            fused = self.fused(state, context)
            return block.some(fused, context, index, tokens.afresh, None)[0], None
        before, inner = held or (None, None)
        if before is None:
            fused = self.fusion(state, x)
        else:
            fused = tokens.renewed(before, self.fusion(tokens.changed(state), tokens.changed(x)))
        proposal, inner = block.some(fused, context, index, tokens, inner)
        return proposal, (fused, inner)


class Timed(nn.Module):
    """Tell the block which step it is: proposal = block(h + signal(t)).

    Use it where steps must differ, as in the Universal Transformer; leave it out where a fixed point is wanted or more
    steps than in training must work.

    Args:
        block: a body.
        signal: `index -> (d,)`, for example `nn.Sinusoidal(d)` or `nn.LearnedPositions(steps, d)`.

    Shapes: state (*rows, ..., d).

    References: M. Dehghani et al., "Universal Transformers", 2018, arXiv 1807.03819.

    >>> import torch
    >>> body = Timed(Called(torch.nn.Identity()), lambda index: torch.full((2,), float(index)))
    >>> body(torch.zeros(1, 2), None, 3)
    tensor([[3., 3.]])
    """

    def __init__(self, block: Body, signal: Callable[[int], Tensor]):
        super().__init__()
        self.block = block
        self.signal = signal

    def forward(self, state: Tensor, context: Context, index: int) -> State:
        return self.block(state + self.signal(index).to(state), context, index)

    @property
    def partial(self) -> bool:
        """Whether the block can run for some tokens."""
        return partial(self.block)

    def some(self, state: Tensor, context: Context, index: int, tokens: Tokens, held: Any) -> tuple[Tensor, Any]:
        """The proposals of some tokens. The signal moves the keys of all of them, so nothing can be held."""
        assert partial(self.block)
        state = state + self.signal(index).to(state)
        return self.block.some(state, context, index, tokens.afresh, None)[0], None


class Relaxed(nn.Module):
    """Let the weights of each step differ a little: proposal = block(h; W_t), W_t = variants(t, W).

    Use it where a loop takes the place of layers that were not shared: the differences give back what sharing took. Not
    where a fixed point is wanted, since steps differ.

    Args:
        block: a module that is a body.
        variants: `(index, weights) -> weights` by the names of the block's parameters, for example
            `nn.LowRank(block, count, rank)`.

    Shapes: as the block's.

    References: S. Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", 2024,
    arXiv 2410.20672.

    >>> import torch
    >>> block = Called(nn.Linear(2, 2))
    >>> body = Relaxed(block, lambda index, weights: {name: index * weight for name, weight in weights.items()})
    >>> body(torch.ones(1, 2), None, 0)
    tensor([[0., 0.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(self, block: nn.Module, variants: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]):
        super().__init__()
        self.block = block
        self.variants = variants

    def forward(self, state: State, context: Context, index: int) -> State:
        weights = self.variants(index, dict(self.block.named_parameters()))
        return functional_call(self.block, dict(weights), (state, context, index))


class Stack(nn.Module):
    """Several bodies, one after the other, as one step: proposal = b_n(...b_2(b_1(h))).

    Use it to loop over a group of layers that do not share weights.

    Args:
        bodies: in the order in which they run.

    Raises:
        ValueError: no body is given.

    >>> import torch
    >>> Stack(Called(torch.exp), Called(torch.log))(torch.ones(1), None, 0)
    tensor([1.])
    """

    def __init__(self, *bodies: Body):
        super().__init__()
        if not bodies:
            raise ValueError("a Stack must hold at least one body, got none. Pass Stack(first, second, ...).")
        self.bodies = nn.ModuleList(
            body if isinstance(body, nn.Module) else Called(body, whole=True) for body in bodies
        )

    def forward(self, state: State, context: Context, index: int) -> State:
        for body in self.bodies:
            state = body(state, context, index)
        return state

    @property
    def partial(self) -> bool:
        """Whether the last body can run for some tokens; those before it are run for all, which it looks at."""
        return partial(self.bodies[-1])

    def some(self, state: State, context: Context, index: int, tokens: Tokens, held: Any) -> tuple[Tensor, Any]:
        """The proposals of some tokens. What earlier bodies make of stopped tokens moves, so nothing can be held."""
        *before, last = self.bodies
        assert partial(last)
        if not before:
            return last.some(state, context, index, tokens, held)
        for body in before:
            state = body(state, context, index)
        return last.some(state, context, index, tokens.afresh, None)[0], None


class Called(nn.Module):
    """Any callable as a body: proposal = function(h).

    Use it for layers that know neither context nor step, such as `torch.nn.TransformerEncoderLayer`. With `whole`, the
    function is called with all three arguments.

    Args:
        function: a module or function.
        whole: pass (state, context, index) rather than the state alone.

    >>> import torch
    >>> Called(torch.relu)(torch.tensor([-1.0, 2.0]), None, 0)
    tensor([0., 2.])
    """

    def __init__(self, function: Callable[..., State], whole: bool = False):
        super().__init__()
        self.function = function
        self.whole = whole

    def forward(self, state: State, context: Context, index: int) -> State:
        return self.function(state, context, index) if self.whole else self.function(state)

    def extra_repr(self) -> str:
        name = "" if isinstance(self.function, nn.Module) else shown(self.function)
        return ", ".join(filter(None, [name, "whole=True" if self.whole else ""]))


class Surrogate(nn.Module):
    """Take values from one body and derivatives from another: proposal = sg[f(h)] + g(h) - sg[g(h)].

    Use it under `grad.Implicit` where f reaches a fixed point fast but has no useful derivative there, as conjugate
    gradients, and g is a plainer body with the same fixed point. The gradient of the fixed point is then exact. Under
    other gradients it is g's, not f's. Without gradients g is not run.

    Args:
        values: f.
        derivative: g, with the same fixed points and states as f.

    >>> import torch
    >>> body = Surrogate(Called(torch.round), Called(torch.nn.Identity()))
    >>> x = torch.tensor([0.7], requires_grad=True)
    >>> torch.autograd.grad(body(x, None, 0), x)
    (tensor([1.]),)
    """

    def __init__(self, values: Body, derivative: Body):
        super().__init__()
        self.values = values
        self.derivative = derivative

    def forward(self, state: State, context: Context, index: int) -> State:
        if not torch.is_grad_enabled():
            return self.values(state, context, index)
        with torch.no_grad():
            values = self.values(state, context, index)
        carrier = self.derivative(state, context, index)
        return tree.map(lambda value, slope: value + (slope - slope.detach()), values, carrier)

    def extra_repr(self) -> str:
        parts = {"values": self.values, "derivative": self.derivative}
        return ", ".join(f"{name}={shown(part)}" for name, part in parts.items() if name not in self._modules)
