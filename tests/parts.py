"""One row for every exported part: how to make it, and whatever its checks need. A meta-test misses none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from loopaware import body, execute, grad, halt, init, models, readout, update
from loopaware import nn as blocks

DIM = 6


class Part(NamedTuple):
    slot: str
    name: str
    make: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.slot}.{self.name}"


def head() -> nn.Module:
    """A head that belongs to a model: read by rules, trained elsewhere."""
    return nn.Linear(DIM, 3).requires_grad_(False)


def mixing() -> nn.Module:
    """A body in which the tokens of a sequence see each other, and which comes to rest."""
    return body.Injected(body.Called(Mixer()), lambda state, x: state + x)


class Mixer(nn.Module):
    """tanh(W (h_i + mean_j h_j)), small enough to contract; padding-free by construction of the tests."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        nn.init.normal_(self.linear.weight, std=0.12)

    def forward(self, state: Any) -> Any:
        return torch.tanh(self.linear(state + state.mean(1, keepdim=True)))


def relaxed() -> nn.Module:
    """A body whose first three steps differ from each other."""
    block = body.Called(Mixer())
    variants = blocks.LowRank(block, count=3, rank=2)
    for weight in variants.left.values():
        nn.init.normal_(weight, std=0.02)
    return body.Relaxed(block, variants)


def switched() -> nn.Module:
    """A rule that is taught on all steps of training, and stops rows in evaluation."""
    rule = halt.Linear(DIM, bias=0.1)
    return halt.Switched(halt.Watched(rule), rule)


def half() -> nn.Module:
    """A body on one half of a state."""
    return body.Called(nn.Sequential(nn.LayerNorm(DIM // 2), nn.Linear(DIM // 2, DIM // 2), nn.Tanh()))


PARTS = [
    Part("init", "FromContext", init.FromContext),
    Part("init", "Zeros", lambda: init.Zeros(DIM)),
    Part("init", "Learned", lambda: init.Learned(DIM)),
    Part("init", "Gaussian", lambda: init.Gaussian(std=0.5)),
    Part("init", "Projected", lambda: init.Projected(DIM, DIM)),
    Part("init", "Halves", lambda: init.Halves(init.Projected(DIM, DIM))),
    Part("body", "Injected", mixing),
    Part("body", "Timed", lambda: body.Timed(body.Called(Mixer()), lambda index: torch.ones(DIM) * index)),
    Part("body", "Stack", lambda: body.Stack(body.Called(Mixer()), body.Called(Mixer()))),
    Part("body", "Called", lambda: body.Called(Mixer())),
    Part("body", "Relaxed", relaxed),
    Part("body", "Surrogate", lambda: body.Surrogate(body.Called(torch.sin), body.Called(Mixer()))),
    Part("body", "Coupled", lambda: body.Coupled(half(), half())),
    Part("update", "Replace", update.Replace),
    Part("update", "Residual", lambda: update.Residual(DIM, gain=0.7)),
    Part("update", "Damped", lambda: update.Damped(0.6)),
    Part("update", "Gated", lambda: update.Gated(DIM, chrono=8)),
    Part("update", "GRU", lambda: update.GRU(DIM, chrono=8)),
    Part("update", "LSTM", lambda: update.LSTM(DIM, chrono=8)),
    Part("update", "Momentum", lambda: update.Momentum(0.3)),
    Part("update", "Quantized", lambda: update.Quantized(update.Damped(0.5), 8)),
    Part("update", "Dropout", lambda: update.Dropout(update.Residual(DIM, gain=0.7), rate=0.3)),
    Part("halt", "Never", halt.Never),
    Part("halt", "Converged", lambda: halt.Converged(rtol=0.05)),
    Part("halt", "Below", lambda: halt.Below(lambda state: state.norm(dim=-1), 1.1)),
    Part("halt", "KL", lambda: halt.KL(head(), 1e-4)),
    Part("halt", "Entropy", lambda: halt.Entropy(head(), 1.08)),
    Part("halt", "Confidence", lambda: halt.Confidence(head(), 0.4)),
    Part("halt", "Residual", halt.Residual),
    Part("halt", "Linear", lambda: halt.Linear(DIM, bias=0.1)),
    Part("halt", "ACT", lambda: halt.ACT(halt.Linear(DIM, bias=-0.5))),
    Part("halt", "StickBreaking", lambda: halt.StickBreaking(halt.Linear(DIM, bias=0.5), epsilon=0.1)),
    Part("halt", "Ponder", lambda: halt.Ponder(halt.Linear(DIM, bias=0.0), epsilon=0.1)),
    Part("halt", "Sampled", lambda: halt.Sampled(halt.Linear(DIM, bias=-1.0))),
    Part("halt", "StraightThrough", lambda: halt.StraightThrough(halt.Linear(DIM, bias=0.1))),
    Part("halt", "Gumbel", lambda: halt.Gumbel(halt.Linear(DIM, bias=0.1))),
    Part("halt", "Before", lambda: halt.Before(halt.Linear(DIM, bias=0.1))),
    Part("halt", "Any", lambda: halt.Any(halt.Residual(level=-6.0), halt.Converged(rtol=0.05))),
    Part("halt", "All", lambda: halt.All(halt.Linear(DIM, bias=3.0), halt.Converged(rtol=0.05))),
    Part("halt", "Patience", lambda: halt.Patience(halt.Converged(rtol=0.1), times=2)),
    Part("halt", "Grouped", lambda: halt.Grouped(halt.Converged(rtol=0.05), size=2)),
    Part("halt", "Watched", lambda: halt.Watched(halt.Residual())),
    Part("halt", "Switched", switched),
    Part("halt", "Drawn", lambda: halt.Drawn(halt.depths.Uniform(2, 5), axes=1)),
    Part("halt", "Written", lambda: halt.Written(torch.tensor(3))),
    Part("readout", "Last", readout.Last),
    Part("readout", "Weighted", readout.Weighted),
    Part("readout", "Tensor2Tensor", readout.Tensor2Tensor),
    Part("readout", "Every", readout.Every),
    Part("readout", "Stacked", readout.Stacked),
    Part("grad", "Full", grad.Full),
    Part("grad", "Checkpointed", lambda: grad.Checkpointed(every=3)),
    Part("grad", "Truncated", lambda: grad.Truncated(last=2)),
    Part("grad", "OneStep", grad.OneStep),
    Part("grad", "Phantom", lambda: grad.Phantom(count=2)),
    Part("grad", "Implicit", grad.Implicit),
    Part("grad", "Reversible", grad.Reversible),
    Part("execute", "Unrolled", execute.Unrolled),
    Part("execute", "Eager", execute.Eager),
    Part("execute", "Compacted", lambda: execute.Compacted(break_even=0)),
    Part("execute", "Compiled", lambda: execute.Compiled(backend="eager")),
    Part("nn", "Add", blocks.Add),
    Part("nn", "Concat", lambda: blocks.Concat(DIM)),
    Part("nn", "Gated", lambda: blocks.Gated(DIM)),
    Part("nn", "Diagonal", lambda: blocks.Diagonal(DIM)),
    Part("nn", "CrossAttention", lambda: blocks.CrossAttention(DIM, 2)),
    Part("nn", "Attention", lambda: blocks.Attention(DIM, 2)),
    Part("nn", "FeedForward", lambda: blocks.FeedForward(DIM)),
    Part("nn", "SwiGLU", lambda: blocks.SwiGLU(DIM)),
    Part("nn", "LayerNorm", lambda: blocks.LayerNorm(DIM)),
    Part("nn", "RMSNorm", lambda: blocks.RMSNorm(DIM)),
    Part("nn", "Block", lambda: blocks.Block(DIM, 2)),
    Part("models", "Transformer", lambda: models.Transformer(2, DIM, 2)),
]
