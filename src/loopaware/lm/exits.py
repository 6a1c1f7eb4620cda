"""Losses and exits: what each step's prediction counts, and a gate that learns when to leave.

In: states after every step, their halting weights, labels. Out: a loss; or, in evaluation, a verdict. Deliberately
elsewhere: losses on recorded trajectories of other loops (`loopaware.train.objectives`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, pad

from loopaware.checks import between, logits
from loopaware.halt.measure import wide
from loopaware.protocols import Carry, Halt, Memory, Rows, State, Verdict

IGNORED = -100
"""The label that counts for nothing, as transformers has it."""


class Exit(NamedTuple):
    """The state after a step, and its share in the answer. Shapes: state (B, T, D), weight (B, T) or (B)."""

    state: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Exits:
    """A readout of the state after every step with its halting weight, what is missing to one with the last.

    >>> import torch
    >>> from loopaware import Loop
    >>> out = Loop(lambda state, context, index: state + 1, 2, readout=Exits())(torch.zeros(1, 1))
    >>> [exit.weight.item() for exit in out.value]
    [0.0, 1.0]
    """

    weighted = True

    def start(self, state: State, rows: Rows) -> Memory:
        return ()

    def fold(self, folded: Memory, state: State, verdict: Verdict, alive: Tensor) -> Memory:
        return (*folded, Exit(state, verdict.weight))

    def finish(self, folded: Memory, carry: Carry) -> Any:
        if not folded:
            return (Exit(carry.state, torch.ones_like(carry.rows.zeros(carry.state))),)
        spent = sum(exit_.weight for exit_ in folded)
        return (*folded[:-1], Exit(folded[-1].state, folded[-1].weight + 1 - spent))


class Objective(Protocol):
    """A loss of the predictions of all steps. `every`: it looks at more than the last.

    Shapes: losses (N, B, T), of steps 1 to N and each position's next token; weights the same.
    """

    @property
    def every(self) -> bool: ...
    def __call__(self, losses: Tensor, weights: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class LastExit:
    """The loss of the last state alone.

    >>> LastExit().every
    False
    """

    every = False

    def __call__(self, losses: Tensor, weights: Tensor) -> Tensor:
        return losses[-1]


@dataclass(frozen=True)
class EveryExit:
    """The mean of the losses of all steps: every exit learns to answer.

    >>> EveryExit()(torch.tensor([[[1.0]], [[3.0]]]), torch.ones(2, 1, 1))
    tensor([[2.]])
    """

    every = True

    def __call__(self, losses: Tensor, weights: Tensor) -> Tensor:
        return losses.mean(0)


@dataclass(frozen=True)
class GatedExit:
    """The expected loss under the gate's weights, less its entropy: sum_n p_n L_n - beta H(p).

    The entropy keeps the gate from settling on one depth before the losses say which (a uniform prior).

    Args:
        entropy: beta, at least 0.

    References: R.-J. Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025, arXiv 2510.25741.

    >>> GatedExit(0.0)(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[[0.5]], [[0.5]]]))
    tensor([[2.]])
    """

    every = True
    entropy: float = 0.05

    def __post_init__(self):
        if not self.entropy >= 0:
            raise ValueError(f"entropy must be at least 0, got {self.entropy}. 0 leaves the losses alone.")

    def __call__(self, losses: Tensor, weights: Tensor) -> Tensor:
        sure = torch.where(weights > 0, weights, 1.0)  # 0 log 0 = 0, and its gradient too
        return (weights * losses).sum(0) + self.entropy * (weights * sure.log()).sum(0)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each position's next token; 0 where it is ignored. Shapes: (B, T, V), (B, T) -> (B, T)."""
    following = pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return cross_entropy(wide(logits).transpose(1, 2), following, ignore_index=IGNORED, reduction="none")


def averaged(losses: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """The mean over positions with a next token, or the sum over a number of items. Shapes: (B, T) -> ()."""
    following = pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED
    count = following.sum().clamp(min=1) if items is None else items
    return (losses * following).sum() / count


class ExitGate(nn.Module):
    """Leave where the chance of having left reaches a threshold: p_n = h_n prod_{j<n} (1 - h_j), sum_{j<=n} p_j >= q.

    In training every row runs to the bound with weights p_n, what is left going to the last step, so that losses of all
    exits teach the gate (`GatedExit`). In evaluation it stops; q = 1 never does.

    Args:
        rule: a learned rule whose score is the logit of h, for example `halt.Linear(dim)`.
        threshold: q, above 0 and at most 1.

    Raises:
        ValueError: the rule is not learned, or the threshold is out of range.

    References: R.-J. Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025, arXiv 2510.25741.

    >>> from loopaware import halt
    >>> ExitGate(halt.Linear(8), threshold=0.9).threshold
    0.9
    """

    learned = True
    mixes = False

    def __init__(self, rule: Halt, threshold: float = 1.0):
        super().__init__()
        self.rule = logits(rule, "lm.ExitGate")
        self.threshold = between("threshold", threshold, 0.0, 1.0, "1 never leaves.")

    @property
    def stops(self) -> bool:
        """Not in training, and not at a threshold of 1."""
        return not self.training and self.threshold < 1

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        score, before = wide(verdict.score), memory[1]  # the logarithm of the chance of having stayed
        after = before + logsigmoid(-score)
        stop = (1 - after.exp() >= self.threshold) & self.stops
        weight = torch.where(stop, before, before + logsigmoid(score)).exp()
        return Verdict(stop, weight, verdict.score), (inner, after)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
