"""Halting rules without parameters: they look at how the state or the prediction moves and need no training.

In: the states before and after a step. Out: a verdict whose weight is all on the exit step.
Deliberately elsewhere: rules that are learned (`loopaware.halt.learned`), and rules made of rules
(`loopaware.halt.combine`).

A head is a callable `state -> logits` that belongs to the model and is trained there: a rule only reads with it,
without gradients. A head that is a module is registered, so that it moves with the loop; it is shared, not copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopaware.checks import between, shown
from loopaware.halt.measure import Head, change, hard, log_probabilities, sizes
from loopaware.protocols import Memory, Rows, State, Verdict


@dataclass(frozen=True)
class Never:
    """No row ever stops: every loop runs to its bound.

    The default, and the baseline of every other rule.

    >>> Never().stops
    False
    """

    learned = False
    stops = False
    mixes = False

    def start(self, state: State, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.zeros(state, torch.bool), rows.zeros(state)

    def __call__(
        self, old: State, new: State, memory: tuple[Tensor, Tensor], index: int
    ) -> tuple[Verdict, tuple[Tensor, Tensor]]:
        return Verdict(memory[0], memory[1], memory[1]), memory


@dataclass(frozen=True)
class Converged:
    """Stop when the state has come to rest: |h_t - h_{t-1}| <= atol + rtol |h_t| at every position of the row.

    Use it where the body contracts. Transformers with residual streams often never come to rest though their
    prediction has; there take KL. Its score is the largest relative change.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        ValueError: a tolerance is negative, or both are zero.

    >>> verdict, _ = Converged(rtol=0.1)(torch.ones(1, 2), torch.ones(1, 2), Rows(), 0)
    >>> verdict.stop
    tensor([True])
    """

    learned = False
    stops = True
    mixes = False
    rtol: float = 1e-3
    atol: float = 0.0

    def __post_init__(self):
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(
                f"rtol and atol must be at least 0 and one of them above it, got {self.rtol} and {self.atol}. "
                "Take halt.Never() if nothing should stop."
            )

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def __call__(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Rows]:
        with torch.no_grad():
            excess = [memory.largest(moved - self.rtol * size) for moved, size in sizes(old, new, memory)]
            stop = torch.stack(excess).amax(0) <= self.atol
            score = change(old, new, memory)
        return hard(stop, score), memory


class Below(nn.Module):
    """Stop when a number read from the state is small enough: measure(h_t) <= tolerance, everywhere in the row.

    Use it where the state itself says how good it is, as a solver's residual: a row that has halted then is as good as
    promised, and one that has not says that it is not. Its score is the largest number of the row.

    Args:
        measure: `state -> numbers`, for example `body.Iterate.relative`.
        tolerance: the largest number that is good enough; nan never is.

    Shapes: measure(h) (*rows, ...).

    Raises:
        ValueError: the tolerance is not above zero.

    >>> rule = Below(torch.abs, 0.1)
    >>> rule(None, torch.tensor([0.2, 0.1]), Rows(), 0)[0].stop
    tensor([False,  True])
    """

    learned = False
    stops = True
    mixes = False

    def __init__(self, measure: Callable[[State], Tensor], tolerance: float):
        super().__init__()
        self.measure = measure
        self.tolerance = between("tolerance", tolerance, 0.0, math.inf, "Rounding alone keeps it from being 0.")

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def forward(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Rows]:
        with torch.no_grad():
            score = memory.largest(self.measure(new))
        return hard(score <= self.tolerance, score), memory

    def __repr__(self) -> str:
        return f"Below(measure={shown(self.measure)}, tolerance={self.tolerance})"


class KL(nn.Module):
    """Stop when the prediction has come to rest: KL(q_{t-1} || q_t) < threshold everywhere, q = softmax(head(h)).

    The safe training-free rule: it matches learned gates in language models and does not mistake an early sureness for
    an answer. The head is run once a step. Its score is the largest divergence, in nats.

    Args:
        head: `state -> logits`, the model's own.
        threshold: in nats.

    Shapes: logits (*rows, ..., classes).

    Raises:
        ValueError: the threshold is not above zero.

    References: J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171.

    >>> rule = KL(lambda state: state, 1e-3)
    >>> rule(None, torch.ones(1, 2), rule.start(torch.ones(1, 2), Rows()), 0)[0].stop
    tensor([True])
    """

    learned = False
    stops = True
    mixes = False

    def __init__(self, head: Head, threshold: float = 5e-4):
        super().__init__()
        self.head = head
        self.threshold = between("threshold", threshold, 0.0, math.inf, "A divergence is never below 0.")

    def start(self, state: State, rows: Rows) -> tuple[Rows, Tensor]:
        with torch.no_grad():
            return rows, log_probabilities(self.head, state)

    def forward(self, old: State, new: State, memory: tuple[Rows, Tensor], index: int) -> tuple[Verdict, Memory]:
        rows, before = memory
        with torch.no_grad():
            now = log_probabilities(self.head, new)
            score = rows.largest((before.exp() * (before - now)).sum(-1))
        return hard(score < self.threshold, score), (rows, now)

    def __repr__(self) -> str:
        return f"KL(head={shown(self.head)}, threshold={self.threshold})"


class Entropy(nn.Module):
    """Stop when the prediction is sharp: H(softmax(head(h))) < threshold at every position.

    Use it on language, where sureness and rightness go together; on algorithmic tasks a loop is often sure and wrong.
    Its score is the largest entropy, in nats.

    Args:
        head: `state -> logits`, the model's own.
        threshold: in nats.

    Shapes: logits (*rows, ..., classes).

    Raises:
        ValueError: the threshold is not above zero.

    References: S. Teerapittayanon et al., "BranchyNet", 2016, arXiv 1709.01686.

    >>> rule = Entropy(lambda state: state, 0.1)
    >>> rule(None, torch.tensor([[9.0, 0.0]]), Rows(), 0)[0].stop
    tensor([True])
    """

    learned = False
    stops = True
    mixes = False

    def __init__(self, head: Head, threshold: float = 0.1):
        super().__init__()
        self.head = head
        self.threshold = between("threshold", threshold, 0.0, math.inf, "An entropy is never below 0.")

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def forward(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Rows]:
        with torch.no_grad():
            logs = log_probabilities(self.head, new)
            score = memory.largest(-(logs.exp() * logs).sum(-1))
        return hard(score < self.threshold, score), memory

    def __repr__(self) -> str:
        return f"Entropy(head={shown(self.head)}, threshold={self.threshold})"


class Confidence(nn.Module):
    """Stop when the prediction is sure: max softmax(head(h)) >= threshold at every position.

    With `margin`, the lead of the first class over the second, as in CALM. Unsafe on algorithmic tasks, where a loop is
    often sure and wrong. Its score is the smallest confidence.

    Args:
        head: `state -> logits`, the model's own.
        threshold: above 0 and at most 1.
        margin: compare the lead over the second class rather than the first alone.

    Shapes: logits (*rows, ..., classes).

    Raises:
        ValueError: the threshold is out of range.

    References: T. Schuster et al., "Confident Adaptive Language Modeling", 2022, arXiv 2207.07061.

    >>> rule = Confidence(lambda state: state, 0.9)
    >>> rule(None, torch.tensor([[9.0, 0.0]]), Rows(), 0)[0].stop
    tensor([True])
    """

    learned = False
    stops = True
    mixes = False

    def __init__(self, head: Head, threshold: float = 0.9, margin: bool = False):
        super().__init__()
        self.head = head
        self.threshold = between("threshold", threshold, 0.0, 1.0, "A probability is compared with it.")
        self.margin = margin

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def forward(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Rows]:
        with torch.no_grad():
            top = log_probabilities(self.head, new).exp().topk(2 if self.margin else 1, dim=-1).values
            score = -memory.largest(-(top[..., 0] - top[..., 1] if self.margin else top[..., 0]))
        return hard(score >= self.threshold, score), memory

    def __repr__(self) -> str:
        return f"Confidence(head={shown(self.head)}, threshold={self.threshold}, margin={self.margin})"
