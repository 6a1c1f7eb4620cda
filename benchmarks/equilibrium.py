"""Places of rest, forward and with their implicit gradient: torchdeq against `Loop` with `grad.Implicit`.

In: shapes. Out: lines for the table. Both are given the same function, start, tolerance (relative, of each sequence)
and bound, in both directions. The sequences of a batch differ: some come to rest in a few steps, some in tens.
Deliberately elsewhere: torchdeq's gradients that are not implicit, and its Broyden solver.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchdeq import get_deq

from loopaware import Loop, execute, grad, halt, init, solve, tree
from loopaware.nn import Block, Post
from loopaware.recipes.overhead import in_turns
from loopaware.recipes.shared import apart

BOUND = 200
TOLERANCE = 1e-4
EQUAL = 1e-2
"""The relative error of values and gradients, against a solve in float64, above which nothing is reported."""

RIVAL, MIXED = "torchdeq, fixed_point_iter", "torchdeq, anderson"
PLAIN, FEWER, ANDERSON = "Loop, Picard", "Loop, Picard, compacted", "Loop, Anderson"

Way = Callable[[nn.Module], tuple[Tensor, list[Tensor]]]
"""From a body to the place of rest (B, ...) and the gradients of all weights."""


class Rest(NamedTuple):
    """One way to one place of rest: seconds, how often a sequence was evaluated each way, how far off it ended."""

    work: str
    way: str
    seconds: float
    forward: float
    backward: float
    residual: float
    value: float
    gradient: float


class Map(nn.Module):
    """z' = tanh(W z + x), W a rotation times .9: rows with a small x contract slowly, those with a large one fast."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.linear.weight, gain=0.9)
        nn.init.zeros_(self.linear.bias)

    def forward(self, state: Tensor, context: Any, index: int = 0) -> Tensor:
        return torch.tanh(self.linear(state) + tree.content(context))


class Layer(nn.Module):
    """z' = .3 z + .7 block(z + x): a transformer block that comes to rest."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.block = Block(dim, heads, placement=Post())
        with torch.no_grad():
            self.block.attention.out.weight.mul_(0.3)
            self.block.feedforward.narrow.weight.mul_(0.3)

    def forward(self, state: Tensor, context: Any, index: int = 0) -> Tensor:
        return torch.lerp(state, self.block(state + tree.content(context)), 0.7)


class Counted(nn.Module):
    """A body that counts for how many sequences it is evaluated, and how often gradients pass through it."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.forwards = self.backwards = 0

    def forward(self, state: Tensor, context: Any, index: int = 0) -> Tensor:
        self.forwards += len(state)
        out = self.body(state, context, index)
        if out.requires_grad:
            out.register_hook(self.passed)
        return out

    def passed(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def equilibria(dim: int, rows: int, width: int, heads: int, batch: int, tokens: int, repeats: int) -> list[Rest]:
    """A map of `dim` features on so many rows, and a block on a batch of sequences."""
    torch.manual_seed(0)
    scales = torch.logspace(-2, 0.5, rows)[:, None], torch.logspace(-1, 0.5, batch)[:, None, None]
    lines = measured("map", Map(dim), torch.randn(rows, dim) * scales[0], repeats)
    return lines + measured("block", Layer(width, heads), torch.randn(batch, tokens, width) * scales[1], repeats)


def measured(work: str, body: nn.Module, x: Tensor, repeats: int) -> list[Rest]:
    ways = {RIVAL: torchdeq("fixed_point_iter", x), MIXED: torchdeq("anderson", x)}
    picard, anderson = solve.Picard(TOLERANCE, BOUND), solve.Anderson(TOLERANCE, BOUND)
    ways[PLAIN] = looped(x, grad.Implicit(picard), execute.Eager())
    ways[FEWER] = looped(x, grad.Implicit(picard), execute.Compacted())
    ways[ANDERSON] = looped(x, grad.Implicit(anderson, forward=anderson), execute.Eager())
    exact = solve.Anderson(1e-10, 10 * BOUND)
    precise = looped(x.double(), grad.Implicit(exact, forward=exact), execute.Eager())
    value, gradients = precise(copy.deepcopy(body).double())
    seconds, lines = in_turns({name: lambda way=way: way(body) for name, way in ways.items()}, repeats), []
    for name, way in ways.items():
        own, found = way(counter := Counted(body))
        with torch.no_grad():
            change, size = ((body(own, x) - own).flatten(1).norm(dim=1), own.flatten(1).norm(dim=1))
        error = apart(own.double(), value)
        slope = apart(*(torch.cat([gradient.double().flatten() for gradient in each]) for each in (found, gradients)))
        if max(error, slope) > EQUAL:
            raise ValueError(f"{name} must come within {EQUAL} of a solve in float64, got {error:.1e} and {slope:.1e}.")
        counts = counter.forwards / len(x), counter.backwards / len(x)
        lines.append(Rest(work, name, seconds[name], *counts, float((change / size).max()), error, slope))
    return lines


def torchdeq(solver: str, x: Tensor) -> Way:
    both = {"solver": solver, "max_iter": BOUND, "tol": TOLERANCE, "stop_mode": "rel"}
    deq = get_deq(ift=True, **{f"{side}_{name}": value for side in "fb" for name, value in both.items()})

    def run(body: nn.Module) -> tuple[Tensor, list[Tensor]]:
        (value,), _ = deq(lambda state: body(state, x), torch.zeros_like(x))
        return value.detach(), list(torch.autograd.grad(value.sin().sum(), list(body.parameters())))

    return run


def looped(x: Tensor, rule: grad.Implicit, part: Any) -> Way:
    def run(body: nn.Module) -> tuple[Tensor, list[Tensor]]:
        stop = halt.Converged(rtol=TOLERANCE)
        bound = BOUND if rule.forward is None else rule.forward.max_steps
        value = Loop(body, bound, init=init.Zeros(), halt=stop, grad=rule, execute=part)(x).value
        return value.detach(), list(torch.autograd.grad(value.sin().sum(), list(body.parameters())))

    return run
