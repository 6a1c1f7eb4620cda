"""Spectral normalisation of whole bodies, by torch's own parametrization.

In: any module. Out: the same module, its linear maps and convolutions bounded. Deliberately elsewhere: penalties that
ask for calm and do not enforce it (`loopaware.train.stability`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

__all__ = ["held", "spectral_norm"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Map = nn.Linear | Convolution

SETTLING = 100
"""Power iterations at the start, so that the bound holds from the first step on; torch makes fifteen."""

Module = TypeVar("Module", bound=nn.Module)


def spectral_norm(module: Module, bound: float = 1.0) -> Module:
    """Bound how far every linear map and convolution inside can stretch a vector: W <- bound W / ||W||_2.

    Each `nn.Linear` has the operator norm `bound`, small ones are scaled up; each convolution at most that: the norm of
    its matrix is divided by the square root of the number of windows a number can be in. Biases stay.

    Use it where a loop must not run away. It bounds maps, not the body: a residual adds one, norms have gains of their
    own, and attention between tokens has no bound on all of space. What is not Linear or a convolution is left alone:
    recurrent cells, embeddings, `in_proj_weight` of torch's `nn.MultiheadAttention`.

    torch estimates ||W||_2 from below by power iteration, one more at each use in training, so that weights change a
    little between the steps of a run; inside `held` they do not. In evaluation they stay as they are.

    Args:
        module: a body, a loop or a whole model; changed in place and returned.
        bound: of every map, above 0.

    Shapes: any.

    Raises:
        ValueError: nothing to bound, the bound is not above 0, a map has been normalised before, is zero, or is a
            convolution that pads with anything but zeros. Nothing is changed then.

    References: T. Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, arXiv 1802.05957.

    >>> _ = torch.manual_seed(0)
    >>> layer = spectral_norm(nn.Linear(3, 3), bound=0.5)
    >>> torch.linalg.matrix_norm(layer.weight, 2).item()
    0.5...
    """
    if not (math.isfinite(bound) and bound > 0.0):
        raise ValueError(f"bound must be above 0 and finite, got {bound}. Below one a map shrinks what it is given.")
    maps = {name: inner for name, inner in module.named_modules() if isinstance(inner, Map)}
    if not maps:
        raise ValueError(
            f"a module must hold a linear map or a convolution to be bounded, got {type(module).__name__}. "
            "Other parameters must be bounded by hand."
        )
    for name, inner in maps.items():
        check(name or type(module).__name__, inner)
    for inner in maps.values():
        parametrizations.spectral_norm(inner, dim=0)
        parametrize.register_parametrization(inner, "weight", Scale(bound / math.sqrt(windows(inner))))
        settle(inner)
    return module


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Compute every normalised weight once and let all steps use it, and replays of them.

    Use it around forward and backward pass of a loop in training: one map for all steps, for checkpoints that run
    steps again, and less work. torch's `parametrize.cached` alone would keep weights without a gradient where a loop
    begins with steps that are not differentiated.

    >>> layer = spectral_norm(nn.Linear(3, 3))
    >>> with held(layer):
    ...     print(layer.weight is layer.weight)
    True
    """
    with parametrize.cached():
        for inner in module.modules():
            if parametrize.is_parametrized(inner):
                for name in cast(nn.ModuleDict, inner.parametrizations):
                    getattr(inner, name)
        yield


class Scale(nn.Module):
    """A fixed factor: W <- factor W."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"factor={self.factor:.4g}"


def windows(module: Map) -> int:
    """In how many windows of a convolution a number can be; one for a linear map.

    Then ||y||^2 = sum over windows |W w|^2 <= ||W||_2^2 windows ||x||^2. A transposed convolution is the adjoint of a
    convolution with the same matrix, input channels first, so the same holds.
    """
    if isinstance(module, nn.Linear):
        return 1
    axes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return math.prod(math.ceil(size * math.gcd(stride, dilation) / stride) for size, stride, dilation in axes)


def check(name: str, module: Map) -> None:
    """Refuse a map that cannot be bounded."""
    if parametrize.is_parametrized(module, "weight"):
        raise ValueError(
            f"the maps of a module must be without parametrization, got one that has it: {name}. "
            "spectral_norm is applied once; undo it by torch.nn.utils.parametrize.remove_parametrizations."
        )
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise ValueError(
            f"a convolution must pad with zeros to be bounded, got {module.padding_mode!r} in {name}. "
            "Other padding repeats numbers, and the bound would not hold."
        )
    if not module.weight.detach().any():
        raise ValueError(f"a map must not be zero to be normalised, got zeros in {name}. Initialise it otherwise.")


@torch.no_grad()
def settle(module: Map) -> None:
    """Let torch's power iteration come to rest; every look at the weight in training is one iteration."""
    parametrization = cast(nn.ModuleDict, module.parametrizations)["weight"]
    training = parametrization.training
    parametrization.train()
    for _ in range(SETTLING):
        _ = module.weight
    parametrization.train(training)
