"""PonderNet: a recurrent step that is repeated on one input and says after each repetition how likely it is to stop.

A. Banino, J. Balaguer, C. Blundell, "PonderNet: Learning to Ponder", 2021, arXiv 2107.05407.

    h_n = GRU(x, h_{n-1}),  h_0 = 0;   y_n = W_y h_n + b_y;   lambda_n = sigmoid(W_l h_n + b_l)

The answer and the chance to stop are read after the input was seen, from h_1 on. With another rule the same net is
Graves' Repeat-RNN (`halt.Never()`) or his ACT (`halt.ACT(...)`, whose answer is read from the mean state).

In: vectors (B, F). Out: logits (B, C). Deliberately elsewhere: the loss (`train.objectives.pondernet`), which wants the
answers of all steps: record the loop with its states and read them with `head`.
"""

from __future__ import annotations

from torch import Tensor, nn

from loopaware import halt as halts
from loopaware import init, readout, update
from loopaware.loop import Loop
from loopaware.protocols import Context, Halt, State
from loopaware.tree import content

__all__ = ["PonderNet"]


class PonderNet(nn.Module):
    """A GRU cell that sees the same input at every step, with a rule that says when to stop.

    Use it for single vectors; for sequences of tokens take a `Loop` around a `Block` and the same rule.

    Args:
        features: F, of the input.
        dim: of the state.
        classes: C, of the answer.
        max_steps: the paper takes 20 for parity.
        halt: None takes `halt.Ponder` on a linear head whose chance to stop begins at about 1/5.

    Shapes: x (B, F) -> (B, C), read where each row stops, or from the mean state if the rule mixes.

    Raises:
        ValueError: a number below 1.

    >>> import torch
    >>> PonderNet(features=8, dim=16, classes=2, max_steps=20)(torch.ones(3, 8)).shape
    torch.Size([3, 2])
    """

    def __init__(self, features: int, dim: int, classes: int, max_steps: int, halt: Halt | None = None):
        super().__init__()
        rule = ponder(dim) if halt is None else halt
        self.loop = Loop(
            Seen(),
            max_steps,
            init=init.Zeros(),
            update=update.GRU(dim),
            halt=rule,
            readout=readout.Weighted() if rule.mixes else readout.Last(),
        )
        self.embedding = nn.Linear(features, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.loop(self.embedding(x)).value)


class Seen(nn.Module):
    """What the cell is given at every step, as a body: the input."""

    def forward(self, state: State, context: Context, index: int) -> Tensor:
        return content(context)


def ponder(dim: int) -> Halt:
    """The paper's rule."""
    return halts.Ponder(halts.Linear(dim, bias=-1.4))
