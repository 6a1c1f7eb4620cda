"""How many steps a request will take, guessed from its input by a small predictor.

In: requests, and the steps they took in recorded runs. Out: predicted steps, for policies that put requests of like
depth together. A guess costs time where it is wrong and never an answer. Deliberately elsewhere: recordings
(`Output.steps`, `observe.record`), batches (`loopaware.serve.batching`), files (`train.save_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.checks import between, bounded
from loopaware.serve.padding import Request, padded

Read = Callable[[Any, Tensor], Tensor]
CHUNK = 256
"""Requests whose features are read at a time."""


class Quality(NamedTuple):
    """How good predictions are on requests that were not fitted.

    `rank`: Spearman's correlation with the steps that were taken, which is what batches depend on; not a number where
    one of them does not vary. `explained`: 1 - (squared error) / (variance) of the logarithm of steps. `number`: of
    requests.
    """

    rank: float
    explained: float
    number: int


class DepthPredictor(nn.Module):
    """Guess how many steps each request takes: steps = exp(w . tanh(W f + c) + b), f = read(request), standardised.

    Use it with `ByDepth`, where inputs tell how deep a loop will go: their length, how sharp they are, how dense their
    mask is. `fit` takes seconds, and says how good the guess is on requests it has not seen; with a rank correlation
    near zero stay with `ByLength`. A module: `train.save_model` and `train.load_model` keep it.

    Args:
        dim: numbers that `read` returns for each request; of `pooled`, 2 D + 1.
        read: `(batch, real) -> (N, dim)`, of requests as `padded` returns them.
        hidden: width of the hidden layer.
        seed: of the first weights and of the split into fitted and held out.

    Shapes: N requests -> (N) float32.

    Raises:
        ValueError: a size is below one; features of another number (when it is called).

    >>> requests = [torch.full((size, 1), 1.0) for size in range(1, 41)]
    >>> predictor = DepthPredictor(dim=3)
    >>> predictor.fit(requests, torch.arange(1, 41)).rank > 0.9
    True
    """

    middle: Tensor
    scale: Tensor

    def __init__(self, dim: int, *, read: Read | None = None, hidden: int = 32, seed: int = 0):
        super().__init__()
        bounded("dim", dim, "Count the features of a request.")
        bounded("hidden", hidden, "Give the width of the hidden layer.")
        self.dim, self.seed = dim, seed
        self.read = pooled if read is None else read
        self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, 1)
        self.register_buffer("middle", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def forward(self, requests: Sequence[Request]) -> Tensor:
        return self.logarithms(self.features(requests)).exp()

    def features(self, requests: Sequence[Request]) -> Tensor:
        """What is read of each request. Shapes: N requests -> (N, dim) float32."""
        parts = [self.read(*padded(requests[at : at + CHUNK])) for at in range(0, len(requests), CHUNK)]
        found = torch.cat(parts).detach().float() if parts else torch.zeros(0, self.dim)
        if found.shape != (len(requests), self.dim):
            raise ValueError(
                f"read must return (N, dim) = {(len(requests), self.dim)}, got {tuple(found.shape)}. "
                "Give the predictor the dim that read returns; of serve.pooled it is 2 D + 1."
            )
        return found

    def logarithms(self, features: Tensor) -> Tensor:
        """The predicted logarithm of steps. Shapes: (N, dim) -> (N)."""
        return self.outer(torch.tanh(self.inner((features - self.middle) / self.scale)))[:, 0]

    def fit(
        self,
        requests: Sequence[Request],
        steps: Tensor | Sequence[int],
        *,
        held_out: float = 0.2,
        updates: int = 200,
        rate: float = 1e-2,
        decay: float = 1.0,
    ) -> Quality:
        """Learn from recorded pairs, and say how good the guess is on a share of them that was held out.

        Starts anew at every call. The same pairs and seed give the same predictor.

        Args:
            steps: of each request in a run of the loop, at least one; of tokens that halt by themselves, the largest.
            held_out: the share that is not learned from.
            updates: of AdamW, on all requests at once.
            rate: its learning rate.
            decay: its weight decay, strong for the few pairs and many features that are usual here.

        Raises:
            ValueError: fewer than four pairs, unequal numbers of them, steps below one, or a share out of range.
        """
        taken = torch.as_tensor(steps)
        if len(requests) < 4 or taken.shape != (len(requests),) or not bool((taken >= 1).all()):
            raise ValueError(
                f"steps must be one number of at least 1 for each of four requests or more, got {tuple(taken.shape)} "
                f"for {len(requests)} requests. Record runs first: their Output.steps."
            )
        between("held_out", held_out, 0.0, 0.5, "A fifth is usual.")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(requests), generator=generator)
        count = max(2, round(held_out * len(requests)))
        unseen, seen = order[:count], order[count:]
        features, goal = self.features(requests), taken.float().log().cpu()
        self.reset(features[seen], goal[seen], generator)
        layers = (self.inner, self.outer)
        groups = [
            {"params": [layer.weight for layer in layers], "weight_decay": decay},
            {"params": [layer.bias for layer in layers], "weight_decay": 0.0},  # they hold the mean
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate)
        with torch.enable_grad():
            for _ in range(bounded("updates", updates, "Learn at least once.")):
                optimizer.zero_grad()
                (self.logarithms(features[seen]) - goal[seen]).square().mean().backward()
                optimizer.step()
        return self.quality([requests[i] for i in unseen.tolist()], taken[unseen])

    @torch.no_grad()
    def reset(self, features: Tensor, goal: Tensor, generator: torch.Generator) -> None:
        """Weights from the generator, features and goal brought to a common size. Shapes: (N, dim), (N)."""
        self.middle.copy_(features.mean(0))
        spread = features.std(0, correction=0)
        self.scale.copy_(torch.where(spread > 1e-6, spread, 1.0))
        for layer in (self.inner, self.outer):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        self.outer.bias.fill_(goal.mean())

    def quality(self, requests: Sequence[Request], steps: Tensor | Sequence[int]) -> Quality:
        """How good predictions are for requests whose steps are known. Shapes: steps (N)."""
        taken = torch.as_tensor(steps).float().cpu()
        guessed = self(requests).cpu()
        error = (guessed.log() - taken.log()).square().mean()
        explained = 1 - error / taken.log().var(correction=0)
        return Quality(correlation(ranks(guessed), ranks(taken)), float(explained), len(requests))


def pooled(batch: Any, real: Tensor) -> Tensor:
    """The mean and the largest of each feature over real positions, and the logarithm of the length.

    For inputs that are numbers. Ids have no features: embed them in a `read` of your own.

    Shapes: x (N, T, D), real (N, T) bool -> (N, 2 D + 1).

    Raises:
        TypeError: x does not hold floating-point features.
    """
    x = tree.content(batch)
    if x.ndim != 3 or not x.is_floating_point():
        raise TypeError(
            f"x must be floating point of shape (N, T, D) to be pooled, got {x.dtype} of {tuple(x.shape)}. "
            "Give DepthPredictor a read function, for example one that embeds ids first."
        )
    outside = ~real[..., None]
    count = real.sum(1, keepdim=True)
    mean = x.masked_fill(outside, 0.0).sum(1) / count
    return torch.cat([mean, x.masked_fill(outside, float("-inf")).amax(1), count.to(x.dtype).log()], -1)


def ranks(values: Tensor) -> Tensor:
    """The rank of each value, equal ones sharing the mean of theirs. Shapes: (N) -> (N) float64.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, not a number where one of them does not vary."""
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
