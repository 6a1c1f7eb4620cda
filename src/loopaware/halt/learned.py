"""Halting rules with parameters. Their score is a logit that carries a gradient; the stop is hard.

In: the states before and after a step. Out: a verdict whose weight is all on the exit step; a row stops when
sigmoid(score) >= threshold. They learn from a loss on the recorded scores (`observe.record`), for example binary
cross-entropy against "is the answer right now?", usually under `halt.Watched`, which lets every step run.
Deliberately elsewhere: rules without parameters (`loopaware.halt.free`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.checks import between, bounded
from loopaware.halt.measure import change, hard
from loopaware.protocols import Rows, State, Verdict


class Residual(nn.Module):
    """Stop when the change is small, how small being learned: logit = -a (log max |h_t - h_{t-1}| / |h_t| - b).

    Two numbers, a = softplus(raw) and b. It reads how the state moves and not what the state is, so it carries over to
    inputs far longer than those of training, where a head on the state stops too early. Its gradient reaches the body
    through the residual and draws the state to rest when the answer is right; `detach` cuts it. On graph distances
    both stop as they should (docs/recipes.md).

    Args:
        threshold: stop at this probability.
        slope: raw before training, a = softplus(slope).
        level: b before training, the log of the relative change at which p = 1/2.
        detach: let no gradient flow into the body.

    Shapes: states (*rows, ..., d).

    Raises:
        ValueError: the threshold is out of range.

    >>> Residual()(torch.ones(1, 2), torch.ones(1, 2), Rows(), 0)[0].stop
    tensor([True])
    """

    learned = True
    stops = True
    mixes = False

    def __init__(self, threshold: float = 0.5, slope: float = 1.0, level: float = -3.0, detach: bool = False):
        super().__init__()
        self.detach = detach
        self.cut = logit(threshold)
        self.slope = nn.Parameter(torch.tensor(float(slope)))
        self.level = nn.Parameter(torch.tensor(float(level)))

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def forward(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Rows]:
        if self.detach:
            old, new = tree.detach((old, new))
        residual = change(old, new, memory).clamp(min=1e-8).log()
        score = -nn.functional.softplus(self.slope) * (residual - self.level)
        return hard(score >= self.cut, score), memory

    def extra_repr(self) -> str:
        return f"threshold={1 / (1 + math.exp(-self.cut)):.4g}, detach={self.detach}"


class Linear(nn.Module):
    """Stop by a linear head on the state: logit = w . mean_positions(h_t) + b.

    The head of ACT and PonderNet. It learns what states look like when they are done, and so may not carry over to
    longer inputs; there take Residual. Over 70 % of Universal Transformers with ACT and a halting bias of zero or above
    settle at a shallow depth that they never leave, where -3 trains (G. Sapunov, arXiv 2604.21999): hence the default.

    Args:
        dim: features of what is read.
        threshold: stop at this probability.
        bias: b before training; below zero, so that a row first runs long.
        warmup: for so many runs in training, b is lowered further, by `hold` at first and then ever less; rows run
            long until the answer is worth stopping for. Counted in the state_dict, so a resumed run goes on.
        hold: how far b is lowered at first.
        read: `state -> (*rows, ..., dim)`, for states that are trees.

    Shapes: state (*rows, ..., dim); positions behind the row axes are averaged, padding left out.

    Raises:
        ValueError: the threshold is out of range, or warmup is negative.

    References: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983.

    >>> rule, state = Linear(2), torch.zeros(1, 2)
    >>> rule(state, state, rule.start(state, Rows()), 0)[0].score.detach()
    tensor([-3.])
    """

    learned = True
    stops = True
    mixes = False

    runs: Tensor

    def __init__(
        self,
        dim: int,
        threshold: float = 0.5,
        bias: float = -3.0,
        *,
        warmup: int = 0,
        hold: float = 5.0,
        read: Callable[[State], Tensor] | None = None,
    ):
        super().__init__()
        self.cut = logit(threshold)
        self.head = nn.Linear(bounded("dim", dim, "Give the features of the state."), 1)
        nn.init.constant_(self.head.bias, bias)
        self.warmup = bounded("warmup", warmup, "0 is none.", least=0)
        self.hold = hold
        self.read = read
        if warmup:
            self.register_buffer("runs", torch.zeros((), dtype=torch.long))

    def start(self, state: State, rows: Rows) -> tuple[Rows, Tensor | None]:
        if not (self.warmup and self.training):
            return rows, None
        self.runs += 1
        left = 1 - (self.runs - 1) / self.warmup
        return rows, rows.zeros(state) + self.hold * left.clamp(min=0)

    def forward(
        self, old: State, new: State, memory: tuple[Rows, Tensor | None], index: int
    ) -> tuple[Verdict, tuple[Rows, Tensor | None]]:
        rows, lowered = memory
        seen = tree.only(new, "halt.Linear") if self.read is None else self.read(new)
        score = self.head(rows.mean(seen)).squeeze(-1)
        if lowered is not None:
            score = score - lowered
        return hard(score >= self.cut, score), memory

    def extra_repr(self) -> str:
        held = f", warmup={self.warmup}, hold={self.hold}" if self.warmup else ""
        return f"threshold={1 / (1 + math.exp(-self.cut)):.4g}{held}"


def logit(threshold: float) -> float:
    """The logit at which a probability reaches the threshold."""
    between("threshold", threshold, 0.0, 1.0 - 1e-9, "A row stops when its probability reaches it.")
    return math.log(threshold / (1 - threshold))
