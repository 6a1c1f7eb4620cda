"""Halting policies with soft weights: the logits of a learned rule become shares of the steps in the answer.

In: any learned rule, whose score z is a logit; h = sigmoid(z). Out: a rule whose weights are spread over the steps and
sum to one, so that gradients reach the rule through the answer itself: with `readout.Weighted`, or with losses on
recorded trajectories (`loopaware.train.objectives`). Three weightings are constantly confused; each has its own name:

- ACT: raw h until their sum reaches 1 - epsilon, the rest to the last step;
- StickBreaking and Ponder: h_n times the chance of not having stopped before;
- tensor2tensor's recursive mix, whose weights do not sum to one: `readout.Tensor2Tensor`, with ACT.

Deliberately elsewhere: the logits (`loopaware.halt.learned`), hard decisions (`loopaware.halt.sampled`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from loopaware.checks import between, logits
from loopaware.halt.measure import closed, hard, wide
from loopaware.halt.sampled import bernoulli
from loopaware.protocols import Halt, Memory, Rows, State, Verdict


class ACT(nn.Module):
    """Adaptive computation time: N = min{n : h_1 + ... + h_n >= 1 - epsilon}; p_n = h_n, p_N the rest.

    The answer is the mean of the states under p (`readout.Weighted`), and one loss is taken of it; add
    `train.objectives.ponder_cost` (N + p_N) so that rows stop at all. N is taken as constant: the gradient of h_N is
    zero. Evidence: with `halt.Linear(bias=0)` or Graves' bias of +1 over 70 % of Universal Transformers with ACT end in
    a shallow equilibrium; -3 mends it, and a ponder cost that grows from zero (`train.Warmup`) then saved 34 % of the
    steps at the same accuracy (arXiv 2604.21999). As p_N may be small, the last states may hardly count: where the
    answer needs the last step, take Ponder or a taught Residual.

    Args:
        rule: a learned rule that gives z, for example `halt.Linear(dim, bias=-3)`.
        epsilon: what may be left for the last step.

    Raises:
        ValueError: the rule is not learned, or epsilon is out of range; in a Loop, a readout of the last state.

    References: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983.

    >>> from loopaware import halt
    >>> ACT(halt.Linear(8, bias=-3.0)).epsilon
    0.01
    """

    learned = True
    stops = True
    mixes = True

    def __init__(self, rule: Halt, epsilon: float = 0.01):
        super().__init__()
        self.rule = logits(rule, "halt.ACT")
        self.epsilon = between("epsilon", epsilon, 0.0, 0.5, "It is what may be left for the last step.")

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        spent, share = memory[1], torch.sigmoid(wide(verdict.score))
        stop = spent + share >= 1 - self.epsilon
        weight = closed(share, stop, spent)
        return Verdict(stop, weight, verdict.score), (inner, spent + weight)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"


class StickBreaking(nn.Module):
    """Break a share off what is left: p_n = h_n prod_{j<n} (1 - h_j), until less than epsilon is left.

    What is left goes to the last step. Unlike ACT's, every weight is differentiable in every h, and h_n is the chance
    to stop at n if not stopped before. Products are kept as sums of logarithms.

    Args:
        rule: a learned rule that gives z.
        epsilon: a row stops when less than this is left.

    Raises:
        ValueError: the rule is not learned, or epsilon is out of range; in a Loop, a readout of the last state.

    References: S. Tan et al., "Sparse Universal Transformer", 2023, arXiv 2310.07096.

    >>> from loopaware import halt
    >>> StickBreaking(halt.Residual(), epsilon=0.05).epsilon
    0.05
    """

    learned = True
    stops = True
    mixes = True

    def __init__(self, rule: Halt, epsilon: float = 0.01):
        super().__init__()
        self.rule = logits(rule, "halt.StickBreaking")
        self.epsilon = between("epsilon", epsilon, 0.0, 0.5, "It is what may be left for the last step.")

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        stop, weight, left = broken(verdict.score, memory[1], self.epsilon)
        return Verdict(stop, weight, verdict.score), (inner, left)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"


class Ponder(nn.Module):
    """PonderNet's halting: exact p_n = h_n prod_{j<n} (1 - h_j) in training, a drawn stop in evaluation.

    In training a row runs until less than epsilon is left, and what is left goes to its last step, at the bound of the
    loop too; the loss of every step is weighted by p_n (`train.objectives.pondernet`, on a recording with states), so
    that the readout does not matter. In evaluation each step stops with chance h_n; with `sampled=False` the row runs
    as in training and `readout.Weighted` gives the expected state. The expected number of steps is exact
    (`train.objectives.expected_steps`). Meant for rows=1: one decision for each input.

    Args:
        rule: a learned rule that gives z.
        epsilon: in training a row stops when less than this is left.
        sampled: draw the stop in evaluation.
        seed: of the draws in evaluation, which depend on it, the step and the place in the sequence alone, so that all
            sequences of a batch share them; None draws each row anew.

    Raises:
        ValueError: the rule is not learned, or epsilon is out of range.

    References: A. Banino et al., "PonderNet: Learning to Ponder", 2021, arXiv 2107.05407.

    >>> from loopaware import halt
    >>> Ponder(halt.Linear(8, bias=-1.0)).sampled
    True
    """

    learned = True
    stops = True
    mixes = False

    def __init__(self, rule: Halt, epsilon: float = 0.05, sampled: bool = True, seed: int | None = 0):
        super().__init__()
        self.rule = logits(rule, "halt.Ponder")
        self.epsilon = between("epsilon", epsilon, 0.0, 0.5, "It is what may be left for the last step.")
        self.sampled = sampled
        self.seed = seed

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        if self.sampled and not self.training:
            return hard(bernoulli(verdict.score, index, self.seed), verdict.score), (inner, memory[1])
        stop, weight, left = broken(verdict.score, memory[1], self.epsilon)
        return Verdict(stop, weight, verdict.score), (inner, left)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, sampled={self.sampled}, seed={self.seed}"


class Before(nn.Module):
    """Judge the state before the step instead of after it, with a signal added: rule(h_{t-1}, h_{t-1} + signal).

    tensor2tensor's order, where the halting probability of a step is computed from its input. Use it to reproduce such
    models, with a rule that looks at one state (`halt.Linear`).

    Args:
        rule: any halting rule.
        signal: `(state, index) -> state`, what the body adds to its input; None adds nothing.

    References: M. Dehghani et al., "Universal Transformers", 2018, arXiv 1807.03819 (appendix C).

    >>> from loopaware import halt
    >>> Before(halt.Linear(8)).learned
    True
    """

    def __init__(self, rule: Halt, signal: Callable[[State, int], State] | None = None):
        super().__init__()
        self.rule = rule
        self.signal = signal
        self.learned, self.stops, self.mixes = rule.learned, rule.stops, rule.mixes

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        return self.rule(old, old if self.signal is None else self.signal(old, index), memory, index)


def broken(score: Tensor, left: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """One break of the stick: whether the row stops, the weight of the step, the logarithm of what is left after it.

    Shapes: score, left (*rows); left = sum_{j<n} log(1 - h_j).
    """
    score = wide(score)
    after = left + logsigmoid(-score)
    stop = after < math.log(epsilon)
    weight = torch.where(stop, left, left + logsigmoid(score)).exp()
    return stop, weight, after.masked_fill(stop, -math.inf)
