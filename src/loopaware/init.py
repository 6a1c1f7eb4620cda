"""Where a loop starts: from the context, from zeros, from a learned vector, from noise, or from a projection.

In: the context. Out: a state with the context's rows, each row's start independent of the other rows.
Deliberately elsewhere: the loop; any function `context -> state` serves as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopaware import noise, tree
from loopaware.checks import between, bounded
from loopaware.protocols import Context, Init, State

__all__ = ["FromContext", "Gaussian", "Halves", "Learned", "Projected", "Zeros"]


@dataclass(frozen=True)
class FromContext:
    """Start from the input: h_0 = x.

    The default; right for a stack of tied layers. Where the input is injected at every step, Zeros or Gaussian forget
    it less willingly.

    >>> FromContext()({"x": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """

    def __call__(self, context: Context) -> Tensor:
        return tree.content(context)


@dataclass(frozen=True)
class Zeros:
    """Start from nothing: h_0 = 0.

    Use it with an injected input (`body.Injected`); without one, the body never sees the context.

    Args:
        dim: features of the state; None takes those of x.

    Shapes: x (*rows, ..., d) -> (*rows, ..., dim).

    >>> Zeros(3)(torch.ones(2, 5)).shape
    torch.Size([2, 3])
    """

    dim: int | None = None

    def __post_init__(self):
        if self.dim is not None:
            bounded("dim", self.dim, "Give the number of features of the state.")

    def __call__(self, context: Context) -> Tensor:
        x = tree.content(context)
        return x.new_zeros(*x.shape[:-1], x.shape[-1] if self.dim is None else self.dim)


class Learned(nn.Module):
    """Start every position from one learned vector: h_0 = v, v ~ N(0, std^2) before training.

    Use it where a fixed point should be reached from a good place; like Zeros, it needs an injected input.

    Args:
        dim: features of the state.
        std: spread of the vector before training.

    Shapes: x (*rows, ..., d) -> (*rows, ..., dim).

    >>> Learned(3)(torch.ones(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(self, dim: int, std: float = 0.02):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(bounded("dim", dim, "Give the state's features.")) * std)

    def forward(self, context: Context) -> Tensor:
        x = tree.content(context)
        return self.vector.to(x.dtype).expand(*x.shape[:-1], -1).clone()

    def extra_repr(self) -> str:
        return f"dim={self.vector.numel()}"


class Gaussian(nn.Module):
    """Start from noise of an own generator: h_0 ~ N(0, std^2).

    Use it to train loops whose answer must not depend on where they start (path independence). In training every call
    and row draws anew, and the generator is part of the state_dict, so a resumed run goes on with the same numbers. In
    evaluation the noise of a position is a function of the seed and the position alone: neither the batch nor padding
    behind it changes a row.

    Args:
        std: spread of the noise.
        dim: features of the state; None takes those of x.
        seed: of the generator.

    Shapes: x (*rows, ..., d) -> (*rows, ..., dim).

    References: J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171.

    >>> start = Gaussian(std=0.5).eval()
    >>> noise = start(torch.zeros(2, 3, 4))
    >>> torch.equal(noise[0], noise[1])
    True
    """

    def __init__(self, std: float = 0.02, dim: int | None = None, seed: int = 0):
        super().__init__()
        self.std = between("std", std, 0.0, math.inf, "Take init.Zeros for no noise.")
        self.dim = dim if dim is None else bounded("dim", dim, "Give the number of features of the state.")
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, context: Context) -> Tensor:
        x = tree.content(context)
        dim = x.shape[-1] if self.dim is None else self.dim
        if self.training:
            drawn = torch.randn(*x.shape[:-1], dim, generator=self.generator)
            return (self.std * drawn).to(x)
        count = math.prod(x.shape[1:-1]) * dim
        drawn = noise.normal(torch.arange(count, device=x.device), self.seed).view(*x.shape[1:-1], dim)
        return (self.std * drawn).to(x).expand(*x.shape[:-1], dim).clone()

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        return f"std={self.std}, dim={self.dim}, seed={self.seed}"


class Projected(nn.Module):
    """Start from a linear map of the input: h_0 = W x + b.

    Use it where the state has other features than the input.

    Args:
        in_features: features of x.
        dim: features of the state.

    Shapes: x (*rows, ..., in_features) -> (*rows, ..., dim).

    >>> Projected(5, 3)(torch.ones(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(self, in_features: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(bounded("in_features", in_features, "Give x's features."), bounded("dim", dim, ""))

    def forward(self, context: Context) -> Tensor:
        return self.linear(tree.content(context))


class Halves(nn.Module):
    """Start from two halves of a state: h_0 = (s[..., :d/2], s[..., d/2:]), s = inner(context).

    For `body.Coupled`. To give both halves the whole input, take a function: `lambda context: (context, context)`.

    Args:
        inner: makes the state that is split; None takes the input.

    Shapes: x (*rows, ..., d) -> two of (*rows, ..., d / 2).

    Raises:
        ValueError: d is odd (when it is called).

    >>> [half.tolist() for half in Halves()(torch.tensor([[1.0, 2.0]]))]
    [[[1.0]], [[2.0]]]
    """

    def __init__(self, inner: Init | None = None):
        super().__init__()
        self.inner = FromContext() if inner is None else inner

    def forward(self, context: Context) -> State:
        whole = tree.only(self.inner(context), "init.Halves")
        if whole.shape[-1] % 2:
            raise ValueError(f"features must be even to be halved, got {whole.shape[-1]}. Project to an even number.")
        one, two = whole.chunk(2, -1)
        return one, two

    def extra_repr(self) -> str:
        return "" if isinstance(self.inner, nn.Module) else repr(self.inner)
