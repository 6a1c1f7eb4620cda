"""Depths that are set before a loop begins: drawn at its start, or written down.

In: a state whose rows are counted, a distribution (`loopaware.halt.depths`) or numbers of steps. Out: a verdict that
looks at the step alone. Training at random depth is what lets a loop run longer than it was trained for; one of these
rules in training and another in evaluation is `halt.Switched`. Deliberately elsewhere: rules that look at the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopaware import noise, tree
from loopaware.checks import bounded
from loopaware.halt.depths import Depth, Fixed
from loopaware.halt.measure import hard
from loopaware.protocols import Rows, State, Verdict

FINE = 1 << 32
"""How many equally likely numbers a depth is drawn with."""


class Drawn(nn.Module):
    """Stop at a depth drawn before the first step: stop = t >= n, n ~ depth.

    For training: a loop trained at one depth is good at that depth alone. It draws in evaluation too; for another rule
    there, take `halt.Switched`. A depth beyond the loop's bound is cut by it. With `warmup` the depth grows over the
    first runs of training from `first`, between numbers of the same rank: n = n_first + s (n_depth - n_first), rounded,
    s from 0 to 1. Its score is n. `grad.Truncated` takes the last steps of each row, and knows beforehand which.

    Args:
        depth: how likely each number of steps is, for example `halt.depths.LogNormalPoisson(32)`.
        axes: who shares a draw: 0 = the whole batch, 1 = a sequence has its own, 2 = a token; at most the loop's rows.
        first: where a depth that grows begins; None is one step.
        warmup: for so many runs in training the depth grows. Counted in the state_dict, so a resumed run goes on.
        seed: of the draws in evaluation, which depend on it and the place in the sequence alone, so that all sequences
            of a batch share them; None draws anew. In training PyTorch's generator is used, each process its own.

    Raises:
        TypeError: the chances of a distribution are not numbers of one axis.
        ValueError: chances that do not sum to one, `axes` or `warmup` below zero, `first` without warmup; when it runs,
            more axes than rows.

    References: J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171 (one
    draw for a batch); S. McLeish et al., "Teaching Pretrained Language Models to Think Deeper with Retrofitted
    Recurrence", 2025, arXiv 2511.07384 (a depth that grows).

    >>> from loopaware import Loop, halt
    >>> rule = Drawn(halt.depths.Uniform(2, 4), axes=1)
    >>> steps = Loop(lambda state, context, index: state / 2, max_steps=9, halt=rule)(torch.ones(50, 1)).steps
    >>> steps.unique()
    tensor([2, 3, 4])
    """

    learned = False
    stops = True
    mixes = False

    runs: Tensor

    def __init__(
        self, depth: Depth, axes: int = 0, *, first: Depth | None = None, warmup: int = 0, seed: int | None = 0
    ):
        super().__init__()
        self.axes = bounded("axes", axes, "0 lets the whole batch share a draw.", least=0)
        self.warmup = bounded("warmup", warmup, "0 is none.", least=0)
        if first is not None and not warmup:
            raise ValueError(f"first must be None without a warmup, got {first!r}. Say for how many runs depth grows.")
        self.depth, self.first, self.seed = depth, first, seed
        # On the CPU and no buffers: they are constants, which no cast may touch and no checkpoint has to hold.
        self.ranks = ranked(depth)
        self.first_ranks = ranked(Fixed(1) if first is None else first)
        if warmup:
            self.register_buffer("runs", torch.zeros((), dtype=torch.long))

    def start(self, state: State, rows: Rows) -> Tensor:
        zeros = rows.zeros(state)
        if self.axes > zeros.ndim:
            raise ValueError(
                f"axes must be at most the rows of the loop, {zeros.ndim}, got {self.axes}. Rows of a loop are what "
                "halts by itself: give Loop rows=2 for tokens."
            )
        steps = self.drawn(zeros.shape[: self.axes], zeros.device)
        return zeros + tree.expand(steps, zeros)

    def drawn(self, shape: torch.Size, device: torch.device) -> Tensor:
        """A number of steps for each place. Shapes: -> shape, long."""
        if self.training or self.seed is None:
            number = torch.randint(FINE, shape, device=device)
        else:
            places = torch.arange(math.prod(shape[1:]), device=device).view(shape[1:])
            number = (noise.uniform(places, self.seed) * FINE).long().expand(shape).contiguous()
        steps = chosen(self.ranks, number)
        if not (self.warmup and self.training):
            return steps
        self.runs += 1
        share = ((self.runs - 1) / self.warmup).clamp(max=1)
        first = chosen(self.first_ranks, number)
        return first + (share * (steps - first)).round().long()

    def foreseen(self, memory: Tensor) -> Tensor:
        """After how many steps each row stops, known before. Shapes: -> (*rows)."""
        return memory

    def forward(self, old: State, new: State, memory: Tensor, index: int) -> tuple[Verdict, Tensor]:
        return hard(memory <= index + 1, memory), memory

    def __repr__(self) -> str:
        grows = f", first={self.first!r}, warmup={self.warmup}" if self.warmup else ""
        return f"Drawn(depth={self.depth!r}, axes={self.axes}{grows}, seed={self.seed})"


@dataclass(frozen=True)
class Written:
    """Stop each row at a step that was written down before: stop = t >= steps.

    To repeat a run at the depths it took, to compare ways of running on the same work, and in tests. Everybody stops
    after the first step who should before it.

    Args:
        steps: of each row, on the loop's device.

    Shapes: steps long, (*rows) or their last axes, down to a single number.

    Raises:
        TypeError: steps are not whole numbers in a tensor.
        ValueError: they do not fit the rows (when it runs).

    >>> from loopaware import Loop
    >>> rule = Written(torch.tensor([1, 3]))
    >>> Loop(lambda state, context, index: state + 1, max_steps=9, halt=rule)(torch.zeros(2, 1)).value
    tensor([[1.],
            [3.]])
    """

    learned = False
    stops = True
    mixes = False
    steps: Tensor

    def __post_init__(self):
        if not isinstance(self.steps, Tensor) or self.steps.is_floating_point() or self.steps.dtype == torch.bool:
            raise TypeError(
                f"steps must be a tensor of whole numbers, got {self.steps!r}. Pass out.steps of a run, or "
                "torch.tensor(numbers)."
            )

    def start(self, state: State, rows: Rows) -> Tensor:
        zeros = rows.zeros(state)
        shape = tuple(self.steps.shape)
        if shape != tuple(zeros.shape[zeros.ndim - len(shape) :]):
            raise ValueError(
                f"steps must have the shape of the rows {tuple(zeros.shape)}, or of their last axes, got {shape}. "
                "One number serves all."
            )
        return zeros + self.steps

    def foreseen(self, memory: Tensor) -> Tensor:
        """After how many steps each row stops, known before. Shapes: -> (*rows)."""
        return memory

    def __call__(self, old: State, new: State, memory: Tensor, index: int) -> tuple[Verdict, Tensor]:
        return hard(memory <= index + 1, memory), memory


def ranked(depth: Depth) -> Tensor:
    """How many of the numbers below FINE choose at most 1, 2, ... steps. Shapes: -> (N) long."""
    chances = depth.chances()
    if not isinstance(chances, Tensor) or chances.ndim != 1 or not chances.is_floating_point():
        raise TypeError(f"the chances of {depth!r} must be a tensor of one axis, got {chances!r}. One for each depth.")
    if not (chances.numel() and (chances >= 0).all() and abs(chances.sum().item() - 1) < 1e-6):
        raise ValueError(
            f"the chances of {depth!r} must be at least 0 and sum to one, got the sum {chances.sum().item():.6g}. "
            "Divide them by it."
        )
    ranks = (chances.double().cumsum(0) * FINE).round().long()
    ranks[-1] = FINE
    return ranks


def chosen(ranks: Tensor, number: Tensor) -> Tensor:
    """The steps that a number below FINE stands for; the copy of the ranks waits for no device. Shapes: as number."""
    return torch.searchsorted(ranks.to(number.device, non_blocking=True), number, right=True) + 1
