"""Norms, and where they stand around a residual sub-layer.

In: a state and the function that computes a sub-layer's output. Out: the next state.
Deliberately elsewhere: the sub-layers, and the norm behind the last block, which is the model's affair.
`LayerNorm` and `RMSNorm` are torch's own; any `dim -> module` serves in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.nn import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "Placement", "Post", "Pre", "RMSNorm", "Residual", "Sandwich"]

Sublayer = Callable[[Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


class Placement(Protocol):
    """How a sub-layer, a residual and `norms` many norms are put together.

    One that treats each token by itself may declare so by a method `before(x, norms)`: what the sub-layer is given.
    """

    norms: ClassVar[int]

    def __call__(self, x: Tensor, sublayer: Sublayer, norms: Sequence[Norm], /) -> Tensor: ...


@dataclass(frozen=True)
class Pre:
    """Norm the input of the sub-layer: y = x + f(norm(x)).

    The default: trains without warm-up. The state grows with every step, so a model ends with a norm of its own, and a
    loop that shall converge is better served by `Post` or `Sandwich`.

    References: R. Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv 2002.04745.

    >>> import torch
    >>> Pre()(torch.ones(1), lambda h: 3 * h, [lambda h: h / 2])
    tensor([2.5000])
    """

    norms: ClassVar[int] = 1

    def __call__(self, x: Tensor, sublayer: Sublayer, norms: Sequence[Norm], /) -> Tensor:
        return x + sublayer(norms[0](x))

    def before(self, x: Tensor, norms: Sequence[Norm]) -> Tensor:
        return norms[0](x)


@dataclass(frozen=True)
class Post:
    """Norm the sum: y = norm(x + f(x)).

    Use it where the state must keep its size over many steps. Deep stacks of it need warm-up.

    References: A. Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.

    >>> import torch
    >>> Post()(torch.ones(1), lambda h: 3 * h, [lambda h: h / 2])
    tensor([2.])
    """

    norms: ClassVar[int] = 1

    def __call__(self, x: Tensor, sublayer: Sublayer, norms: Sequence[Norm], /) -> Tensor:
        return norms[0](x + sublayer(x))

    def before(self, x: Tensor, norms: Sequence[Norm]) -> Tensor:
        return x


@dataclass(frozen=True)
class Sandwich:
    """Norm the sub-layer's input and output: y = x + norm_2(f(norm_1(x))).

    Use it where one step must not change the state by more than a norm allows.

    References: M. Ding et al., "CogView: Mastering Text-to-Image Generation via Transformers", 2021, arXiv 2105.13290.

    >>> import torch
    >>> Sandwich()(torch.ones(1), lambda h: 3 * h, [lambda h: h / 2, lambda h: h / 3])
    tensor([1.5000])
    """

    norms: ClassVar[int] = 2

    def __call__(self, x: Tensor, sublayer: Sublayer, norms: Sequence[Norm], /) -> Tensor:
        return x + norms[1](sublayer(norms[0](x)))

    def before(self, x: Tensor, norms: Sequence[Norm]) -> Tensor:
        return norms[0](x)


class Residual(nn.Module):
    """The norms and the dropout around one sub-layer: y = placement(x, dropout . f, norms).

    Use it to build other blocks than `Block`. The sub-layer is given with each call, so that it may close over a mask.

    Args:
        dim: features of x.
        placement: `Pre()`, `Post()`, `Sandwich()` or another function of (x, f, norms).
        norm: makes a norm from dim, once for every one that the placement asks for.
        dropout: share of the sub-layer's output dropped in training.

    Shapes: x (..., dim) -> (..., dim).

    >>> import torch
    >>> Residual(2, Post())(torch.tensor([0.0, 2.0]), lambda h: h)
    tensor([-1.0000,  1.0000], grad_fn=<NativeLayerNormBackward0>)
    """

    def __init__(
        self, dim: int, placement: Placement, norm: Callable[[int], nn.Module] = LayerNorm, dropout: float = 0.0
    ):
        super().__init__()
        self.placement = placement
        self.norms = nn.ModuleList(norm(dim) for _ in range(placement.norms))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        return self.placement(x, lambda h: self.dropout(sublayer(h)), list(self.norms))

    def before(self, x: Tensor) -> Tensor:
        """What the sub-layer is given, if tokens are treated each by itself. Shapes: as x."""
        return self.placement.before(x, list(self.norms))  # pyright: ignore[reportAttributeAccessIssue] - `local`

    @property
    def local(self) -> bool:
        """Whether nothing here but the sub-layer lets tokens see each other."""
        return hasattr(self.placement, "before") and all(map(local, self.norms))

    def extra_repr(self) -> str:
        return f"placement={self.placement}"


BY_FEATURE = (nn.Linear, nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus)


def local(part: object) -> bool:
    """Whether a part treats each token by itself: it says so, or is one of torch's that do."""
    if isinstance(part, nn.Sequential):
        return all(map(local, part))
    if isinstance(part, LayerNorm | RMSNorm):
        return len(part.normalized_shape) == 1
    return getattr(part, "local", False) is True or type(part) in BY_FEATURE
