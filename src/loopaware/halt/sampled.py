"""Hard halting with a gradient: each step stops or does not, and an estimator teaches the rule that says so.

In: any learned rule, whose score z is a logit; h = sigmoid(z). Out: a rule whose weights are one at a single step.
Three estimators of the gradient of an expected loss, to be compared by `loopaware run estimators`:

- `Sampled`, with `train.objectives.reinforce`: unbiased, of high variance, and stopped rows cost nothing in training;
- `StraightThrough`: biased, of low variance, and every step must be run in training;
- `Gumbel`: in between, its temperature trades the one for the other.

Exact, for comparison: `halt.StickBreaking`. Deliberately elsewhere: the logits (`loopaware.halt.learned`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loopaware import noise
from loopaware.checks import between, logits
from loopaware.halt.measure import hard, wide
from loopaware.protocols import Halt, Memory, Rows, State, Verdict


class Sampled(nn.Module):
    """Draw the stop: a row that runs stops at step n with chance h_n.

    In training, teach the rule with `train.objectives.reinforce` over several runs; no gradient flows otherwise.

    Args:
        rule: a learned rule that gives z.
        seed: of the draws in evaluation, which depend on it, the step and the place in the sequence alone, so that all
            sequences of a batch share them; None draws each row anew. In training PyTorch's generator is used.

    Raises:
        ValueError: the rule is not learned.

    References: R. Williams, "Simple Statistical Gradient-Following Algorithms", Machine Learning 8, 1992.

    >>> from loopaware import halt
    >>> Sampled(halt.Residual()).learned
    True
    """

    learned = True
    stops = True
    mixes = False

    def __init__(self, rule: Halt, seed: int | None = 0):
        super().__init__()
        self.rule = logits(rule, "halt.Sampled")
        self.seed = seed

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, memory = self.rule(old, new, memory, index)
        stop = bernoulli(verdict.score, index, None if self.training else self.seed)
        return hard(stop, verdict.score), memory

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


class StraightThrough(nn.Module):
    """Decide hard, differentiate as if soft: d = [u < h], dd/dz := h (1 - h); weights p_n = d_n prod_{j<n} (1 - d_j).

    In training every row runs to the bound, since the gradient asks what later states were worth; its answer is the
    state at the first d = 1, and the steps it would have taken are `train.objectives.expected_steps`. In evaluation the
    rule inside stops by its own threshold. Tokens that halt by themselves see each other run on in training.

    Args:
        rule: a learned rule that gives z.
        drawn: u is uniform; if False it is 1/2, and nothing is explored.
        identity: let dd/dz := 1 instead, for rules far from h = 1/2.

    Raises:
        ValueError: the rule is not learned; in a Loop, a readout of the last state.

    References: Y. Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, arXiv
    1308.3432.

    >>> from loopaware import halt
    >>> StraightThrough(halt.Residual()).drawn
    True
    """

    learned = True
    stops = True
    mixes = True

    def __init__(self, rule: Halt, drawn: bool = True, identity: bool = False):
        super().__init__()
        self.rule = logits(rule, "halt.StraightThrough")
        self.drawn = drawn
        self.identity = identity

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state) + 1

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        if not self.training:
            return hard(verdict.stop, verdict.score), (inner, memory[1])
        score = wide(verdict.score)
        soft = torch.sigmoid(score)
        decision = (torch.rand_like(soft) if self.drawn else 0.5) < soft
        return decided(decision, score if self.identity else soft, verdict.score, inner, memory[1])

    def extra_repr(self) -> str:
        return f"drawn={self.drawn}, identity={self.identity}"


class Gumbel(nn.Module):
    """Decide by noisy logits, differentiate their sigmoid: y = sigmoid((z + g) / temperature), d = [y > 1/2].

    g is logistic noise: the binary Gumbel-softmax with a hard forward pass; otherwise as StraightThrough. A high
    temperature is biased, a low one noisy.

    Args:
        rule: a learned rule that gives z.
        temperature: of the sigmoid that is differentiated.

    Raises:
        ValueError: the rule is not learned, the temperature is not above zero; in a Loop, a readout of the last state.

    References: E. Jang et al., "Categorical Reparameterization with Gumbel-Softmax", 2016, arXiv 1611.01144;
    C. Maddison et al., "The Concrete Distribution", 2016, arXiv 1611.00712.

    >>> from loopaware import halt
    >>> Gumbel(halt.Residual(), temperature=0.5).temperature
    0.5
    """

    learned = True
    stops = True
    mixes = True

    def __init__(self, rule: Halt, temperature: float = 1.0):
        super().__init__()
        self.rule = logits(rule, "halt.Gumbel")
        self.temperature = between("temperature", temperature, 0.0, math.inf, "Around 1 is usual.")

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state) + 1

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        if not self.training:
            return hard(verdict.stop, verdict.score), (inner, memory[1])
        score = wide(verdict.score)
        drawn = torch.rand_like(score).clamp(min=torch.finfo(score.dtype).tiny)
        noisy = score + drawn.log() - torch.log1p(-drawn)
        return decided(noisy > 0, torch.sigmoid(noisy / self.temperature), verdict.score, inner, memory[1])

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def decided(decision: Tensor, soft: Tensor, score: Tensor, inner: Memory, left: Tensor) -> tuple[Verdict, Memory]:
    """The verdict of a hard decision that is differentiated as `soft`; nobody stops. `left` is 1 until then."""
    hard_ = decision.to(soft.dtype) + (soft - soft.detach())
    return Verdict(torch.zeros_like(decision), hard_ * left, score), (inner, left * (1 - hard_))


def bernoulli(score: Tensor, index: int, seed: int | None) -> Tensor:
    """Whether each row stops, with chance sigmoid(score). Shapes: score (B, ...) -> the same, bool."""
    chance = torch.sigmoid(wide(score))
    if seed is None:
        return torch.rand_like(chance) < chance
    places = torch.arange(math.prod(score.shape[1:]), device=score.device).view(score.shape[1:])
    return noise.uniform(places, seed * 1_000_003 + index) < chance
