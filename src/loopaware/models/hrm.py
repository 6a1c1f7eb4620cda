"""The Hierarchical Reasoning Model: G. Wang et al., "Hierarchical Reasoning Model", 2025, arXiv 2506.21734. A slow
state z_H and a fast one z_L, each with a net of its own; a loop repeats their cycles under deep supervision.

    a cycle:    z_L <- f_L(z_L + z_H + x), so many times;   z_H <- f_H(z_H + z_L)
    a step:     several cycles, all without a gradient but the last update of z_L and the last of z_H
    the halt:   sigmoid(w . mean_positions(z_H) + b) >= 1/2; or q_halt > q_continue, learned as values (`QHalt`)

Every step starts from states that are cut from the graph, so memory and gradient are those of two updates. What differs
from the authors' code: rows stop in evaluation too, each by itself (there all run to the bound); in training all rows
take all steps, none is halted early to explore, and one optimiser step follows the sum of their losses (there each step
has its own); the halting head reads the mean over the positions (there the first); attention has biases.

In: tokens, or whatever the embedding takes. Out: an `Output` whose value is the logits. Deliberately elsewhere: losses,
on a recording (`observe.record`) with states, as for `TRM`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from loopaware import halt as halts
from loopaware import tree
from loopaware.checks import bounded
from loopaware.halt.measure import hard
from loopaware.loop import Loop
from loopaware.models.trm import Fixed, supervised
from loopaware.protocols import Body, Carry, Context, Halt, Output, Rows, State, Verdict

__all__ = ["HRM", "QHalt", "q_learning"]


class Levels(NamedTuple):
    """The state: a slow part and a fast one. Shapes: (B, T, dim) each."""

    high: Tensor
    low: Tensor


class Cycles(nn.Module):
    """One step, as a body: cycles of the fast state within cycles of the slow one.

    Args:
        high_net: f_H, a body.
        low_net: f_L, a body.
        high_cycles: updates of the slow state in a step.
        low_cycles: updates of the fast state for each of the slow one.

    Shapes: the state `Levels` of (B, T, dim), x the same.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, high_net: Body, low_net: Body, high_cycles: int, low_cycles: int):
        super().__init__()
        self.high_net = high_net
        self.low_net = low_net
        self.high_cycles = bounded("high_cycles", high_cycles, "The paper takes 2.")
        self.low_cycles = bounded("low_cycles", low_cycles, "The paper takes 2.")

    def forward(self, state: State, context: Context, index: int) -> Levels:
        (high, low), x = tree.detach(state), tree.content(context)
        updates = self.high_cycles * self.low_cycles
        with torch.no_grad():
            for update in range(1, updates):
                low = self.low_net(low + high + x, context, index)
                if update % self.low_cycles == 0:
                    high = self.high_net(high + low, context, index)
        low = self.low_net(low + high + x, context, index)
        return Levels(self.high_net(high + low, context, index), low)

    def extra_repr(self) -> str:
        return f"high_cycles={self.high_cycles}, low_cycles={self.low_cycles}"


class HRM(nn.Module):
    """Two nets at two paces, with a rule that stops each row when it holds the answer for right.

    In training every row takes all steps and the rule only watches; in evaluation it stops rows, and the loop ends with
    the last one. `TRM` has one net, fewer weights and the gradient of a whole recursion: try it first.

    Args:
        embedding: tokens -> x of (B, T, dim), of size 1; it tells positions, unless the nets do.
        high_net: f_H, a body, such as `models.trm.tiny_net(dim, heads, layers=4)`.
        low_net: f_L, another of its kind.
        dim: of the states.
        classes: of the answer at each position.
        max_steps: of supervision.
        cycles: updates of the slow state in a step, and of the fast one for each of those.
        halt: None takes `halt.Linear` on the slow state; the paper's is `QHalt(dim)`.

    Shapes: tokens (B, T), mask (B, T) bool, True = real -> value (B, T, classes), steps and halted (B).

    Raises:
        ValueError: a number below 1.

    References: G. Wang et al., as above.

    >>> from loopaware.models.trm import tiny_net
    >>> model = HRM(nn.Embedding(7, 8), tiny_net(8, 2), tiny_net(8, 2), dim=8, classes=6, max_steps=2)
    >>> model(torch.zeros(2, 36).long()).value.shape
    torch.Size([2, 36, 6])
    """

    def __init__(
        self,
        embedding: nn.Module,
        high_net: Body,
        low_net: Body,
        dim: int,
        classes: int,
        max_steps: int = 16,
        *,
        cycles: tuple[int, int] = (2, 2),
        halt: Halt | None = None,
    ):
        super().__init__()
        self.embedding = embedding
        self.head = nn.Linear(dim, classes)
        rule = halts.Linear(dim, read=slow) if halt is None else halt
        self.loop = Loop(Cycles(high_net, low_net, *cycles), max_steps, init=Fixed(dim, Levels), halt=rule)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, *, carry: Carry | None = None, max_steps: int | None = None
    ) -> Output:
        out = supervised(self.loop, self.embedding(tokens), mask, carry, max_steps)
        return out._replace(value=self.head(out.value.high))


def slow(state: Levels) -> Tensor:
    return state.high


class QHalt(nn.Module):
    """Stop where stopping is worth more than going on: q_halt > q_continue, both linear in the mean of z_H.

    The score is q_halt - q_continue. Its two values are learned by `q_learning`; `objectives.halting` would teach the
    difference alone. `halt.Linear`, taught by correctness alone, is simpler and does as well in TRM.

    Args:
        dim: features of z_H.
        bias: of both values before training; far below zero, so that neither is wanted at first.

    Shapes: the state `Levels` of (*rows, T, dim).

    References: G. Wang et al., as above.

    >>> rule, state = QHalt(2), Levels(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
    >>> rule.values(state, Rows()).detach()
    tensor([[-5., -5.]])
    """

    learned = True
    stops = True
    mixes = False

    def __init__(self, dim: int, bias: float = -5.0):
        super().__init__()
        self.head = nn.Linear(bounded("dim", dim, "Give the features of the slow state."), 2)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, bias)

    def values(self, state: Levels, rows: Rows) -> Tensor:
        """The logits of both values, halt first. Shapes: -> (*rows, 2)."""
        return self.head(rows.mean(state.high))

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def forward(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Any]:
        halt, proceed = self.values(new, memory).unbind(-1)
        return hard(halt > proceed, halt - proceed), memory


def q_learning(values: Tensor, right: Tensor) -> Tensor:
    """The loss of both values at each step: to halt is worth being right now, to go on what the next step is worth.

    BCE(q_halt_t, right_t) + BCE(q_continue_t, max(h_{t+1}, c_{t+1})),   h, c = sigmoid(q_halt), sigmoid(q_continue)

    At the bound a row has to stop: the last q_continue is not taught, and the one before looks at h_T alone. The next
    step's values are those of the recording, so that no further forward pass is needed; they have no gradient.

    Args:
        values: `rule.values(state, rows)` of the state after each step.
        right: whether each answer was right.

    Shapes: values (T, *rows, 2), right (T, *rows) bool -> (T, *rows).

    Raises:
        ValueError: the shapes do not fit.

    >>> q_learning(torch.zeros(2, 1, 2), torch.ones(2, 1, dtype=torch.bool))
    tensor([[1.3863],
            [0.6931]])
    """
    if values.shape != (*right.shape, 2):
        raise ValueError(
            f"values must have the shape of right and two values for each, {(*right.shape, 2)}, got "
            f"{tuple(values.shape)}. Stack rule.values(state, rows) over the steps."
        )
    halt, proceed = values.unbind(-1)
    worth = torch.cat([values[1:-1].amax(-1), halt[1:][-1:]]).detach().sigmoid()
    losses = binary_cross_entropy_with_logits(halt, right.to(halt.dtype), reduction="none")
    ahead = binary_cross_entropy_with_logits(proceed[:-1], worth, reduction="none")
    return losses + torch.cat([ahead, torch.zeros_like(losses[-1:])])
