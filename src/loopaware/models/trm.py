"""The Tiny Recursive Model: A. Jolicoeur-Martineau, "Less is More: Recursive Reasoning with Tiny Networks", 2025, arXiv
2510.04871. One small net improves an answer y and a latent z in turn; a loop repeats that under deep supervision.

    a recursion:   z <- net(x + y + z), n times;   y <- net(y + z)
    a step:        T - 1 recursions without a gradient, then one with it, from y and z cut from the graph
    the halt:      sigmoid(w . mean_positions(y) + b) >= 1/2, taught by "is the whole answer right now?"

What differs from the authors' code: rows stop in evaluation too, each by itself (there all run to the bound); in
training all rows take all steps, and one optimiser step follows the sum of their losses (there each step has its own,
and rows that stop make room for new ones); the halting head reads the mean over the positions (there the first);
attention has biases.

In: tokens, or whatever the embedding takes. Out: an `Output` whose value is the logits. Deliberately elsewhere: losses,
on a recording (`observe.record`) with states: cross-entropy of `head(state.answer)` of every step, and
`train.objectives.halting`; averaged weights (`train.Average`), which the paper needs too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import body, tree
from loopaware import halt as halts
from loopaware.checks import bounded
from loopaware.loop import Loop
from loopaware.nn import Block, Post, Rotary, SwiGLU
from loopaware.protocols import Body, Carry, Context, Halt, Output, State

__all__ = ["TRM", "tiny_net"]


def tiny_net(dim: int, heads: int, layers: int = 2, *, hidden: int | None = None, rotary: bool = True) -> body.Stack:
    """The net of TRM and HRM: layers of attention and SwiGLU, root-mean-square norms without weights on the sums.

    Args:
        layers: 2 in TRM; HRM has 4 in each of its two nets.
        hidden: of the SwiGLU; None takes 8/3 dim.
        rotary: tell positions inside attention; the embedding tells them otherwise.

    >>> sum(weight.numel() for weight in tiny_net(64, 4).parameters())
    100736
    """

    def norm(features: int) -> nn.Module:
        return nn.RMSNorm(features, eps=1e-5, elementwise_affine=False)

    return body.Stack(
        *(
            Block(
                dim,
                heads,
                positions=Rotary(dim // heads) if rotary else None,
                placement=Post(),
                norm=norm,
                feedforward=SwiGLU(dim, hidden),
            )
            for _ in range(layers)
        )
    )


class Thought(NamedTuple):
    """The state: an answer y and a latent z. Shapes: (B, T, dim) each."""

    answer: Tensor
    latent: Tensor


class Fixed(nn.Module):
    """Where a state of several parts starts: a vector each for all positions, drawn once and never trained.

    They are buffers, so that they are saved with the weights.

    Args:
        dim: of each part.
        parts: the named tuple that the state is.

    Shapes: x (B, T, dim) -> parts of (B, T, dim).
    """

    def __init__(self, dim: int, parts: Any):
        super().__init__()
        self.parts = parts
        for name in parts._fields:
            self.register_buffer(name, nn.init.trunc_normal_(torch.empty(dim)))

    def forward(self, context: Context) -> State:
        x = tree.content(context)
        return self.parts(*(vector.expand_as(x) for vector in self.buffers()))


class Recursion(nn.Module):
    """One step, as a body: T recursions, the last with its gradient.

    Args:
        net: one body for both updates.
        inner: n, updates of the latent in a recursion.
        outer: T, recursions in a step.

    Shapes: the state a `Thought` of (B, T, dim), x the same.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, net: Body, inner: int, outer: int):
        super().__init__()
        self.net = net
        self.inner = bounded("inner", inner, "The paper takes 6.")
        self.outer = bounded("outer", outer, "The paper takes 3; 1 has no recursions without a gradient.")

    def forward(self, state: State, context: Context, index: int) -> Thought:
        thought = tree.detach(state)
        with torch.no_grad():
            for _ in range(self.outer - 1):
                thought = self.once(thought, context, index)
        return self.once(thought, context, index)

    def once(self, thought: Thought, context: Context, index: int) -> Thought:
        (y, z), x = thought, tree.content(context)
        for _ in range(self.inner):
            z = self.net(x + y + z, context, index)
        return Thought(self.net(y + z, context, index), z)

    def extra_repr(self) -> str:
        return f"inner={self.inner}, outer={self.outer}"


class TRM(nn.Module):
    """A tiny net that recurs on an answer and a latent, and stops each row when it holds the answer for right.

    In training every row takes all steps and the rule only watches; in evaluation it stops rows, and the loop ends with
    the last one. For other parts: `model.loop = model.loop.replace(...)`.

    Args:
        embedding: tokens -> x of (B, T, dim); it tells positions, unless the net does.
        net: a body, such as `tiny_net(dim, heads)`.
        dim: of the state.
        classes: of the answer at each position.
        max_steps: of supervision.
        inner: n, updates of the latent in a recursion.
        outer: T, recursions in a step.
        halt: None takes the paper's, `halt.Linear` on the answer at 1/2. On Sudoku (`recipes.sudoku`) that stops too
            early and costs a sixth of the answers, where .9 costs next to none.

    Shapes: tokens (B, T), mask (B, T) bool, True = real -> value (B, T, classes), steps and halted (B).

    Raises:
        ValueError: a number below 1.

    References: A. Jolicoeur-Martineau, as above.

    >>> TRM(nn.Embedding(7, 64), tiny_net(64, 4), dim=64, classes=6)(torch.zeros(2, 36).long()).value.shape
    torch.Size([2, 36, 6])
    """

    def __init__(
        self,
        embedding: nn.Module,
        net: Body,
        dim: int,
        classes: int,
        max_steps: int = 16,
        *,
        inner: int = 6,
        outer: int = 3,
        halt: Halt | None = None,
    ):
        super().__init__()
        self.embedding = embedding
        self.head = nn.Linear(dim, classes)
        rule = halts.Linear(dim, read=answer) if halt is None else halt
        self.loop = Loop(Recursion(net, inner, outer), max_steps, init=Fixed(dim, Thought), halt=rule)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, *, carry: Carry | None = None, max_steps: int | None = None
    ) -> Output:
        out = supervised(self.loop, self.embedding(tokens), mask, carry, max_steps)
        return out._replace(value=self.head(out.value.answer))


def supervised(loop: Loop, x: Tensor, mask: Tensor | None, carry: Carry | None, max_steps: int | None) -> Output:
    """Run the loop: in training its rule only watches, in evaluation it stops rows."""
    loop = loop.replace(halt=halts.Watched(loop.halt)) if loop.training else loop
    return loop({"x": x, "mask": mask}, mask=mask if carry is None else None, carry=carry, max_steps=max_steps)


def answer(state: Thought) -> Tensor:
    return state.answer
