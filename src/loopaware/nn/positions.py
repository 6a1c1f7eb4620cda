"""Vectors that tell a position, to be added to a state: of a token in its sequence, or of a step in a loop.

In: an int, or a long tensor of any shape. Out: (..., dim) on the module's device. Both classes do for both uses.
Deliberately elsewhere: positions told inside attention (`attention.Rotary`, `attention.Relative`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

__all__ = ["LearnedPositions", "Sinusoidal"]


class Sinusoidal(nn.Module):
    """Waves of many lengths: PE(p, 2i) = sin(p / base^(2i/dim)), PE(p, 2i+1) = cos(p / base^(2i/dim)).

    Use it where positions beyond those of training may come. It has no parameters and no last position.

    Args:
        dim: features of the result, even.
        base: the longest wave is about 2 pi base positions long.

    Shapes: positions (...) long, or an int -> (..., dim).

    Raises:
        ValueError: dim is odd or below 2.

    References: A. Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.

    >>> Sinusoidal(4)(1)
    tensor([0.8415, 0.5403, 0.0100, 0.9999])
    """

    like: Tensor

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and positive, got {dim}. Sines and cosines come in pairs.")
        self.dim = dim
        self.base = base
        # Empty: it only follows the module to its device and dtype, so that the waves are computed there, exactly.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, positions: int | Tensor) -> Tensor:
        at = placed(positions, self.like.device)
        precise = torch.promote_types(self.like.dtype, torch.float32)
        exponents = torch.arange(0, self.dim, 2, device=self.like.device, dtype=precise) / self.dim
        angles = at[..., None].to(precise) * self.base**-exponents
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(self.like.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}"


class LearnedPositions(nn.Module):
    """One learned vector for each position: PE(p) = table[min(p, count - 1)].

    Use it for few positions or steps that differ in kind. Positions beyond the table share its last vector, so more
    steps than in training work; they cannot be told apart.

    Args:
        count: vectors in the table.
        dim: features of the result.

    Shapes: positions (...) long and not negative, or an int -> (..., dim).

    Raises:
        ValueError: count or dim is below 1.

    References: J. Gehring et al., "Convolutional Sequence to Sequence Learning", 2017, arXiv 1705.03122.

    >>> signal = LearnedPositions(count=3, dim=4)
    >>> torch.equal(signal(2), signal(100))
    True
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        if count < 1 or dim < 1:
            raise ValueError(f"count and dim must be at least 1, got {count} and {dim}. Give both as counts.")
        self.table = nn.Parameter(torch.randn(count, dim) * 0.02)

    def forward(self, positions: int | Tensor) -> Tensor:
        at = placed(positions, self.table.device)
        return embedding(at.clamp(max=self.table.shape[0] - 1), self.table)

    def extra_repr(self) -> str:
        return f"count={self.table.shape[0]}, dim={self.table.shape[1]}"


def placed(positions: int | Tensor, device: torch.device) -> Tensor:
    """Positions as a tensor. Not by `as_tensor`, which compilers take for a constant: each step would be compiled."""
    return positions.to(device) if isinstance(positions, Tensor) else torch.tensor(positions, device=device)
