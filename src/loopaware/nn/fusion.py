"""Ways to show an input to a state again: modules `(state, x) -> fused`.

In: two tensors of one shape (..., dim). Out: a third of that shape. Any such function is a fusion; a new one needs
nothing but a class here. Deliberately elsewhere: when it happens (`loopaware.body`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from loopaware.nn.attention import Attention

__all__ = ["Add", "Concat", "CrossAttention", "Diagonal", "Gated"]


class Add(nn.Module):
    """The plainest: fused = state + x.

    Use it first; no parameters. The share of the state is never less than one, so a body must keep it in bounds.

    Shapes: state, x (..., dim) -> (..., dim).

    Raises:
        ValueError: state and x differ in shape.

    References: A. Bansal et al., "End-to-end Algorithm Synthesis with Recurrent Networks", 2022, arXiv 2202.05826.

    >>> Add()(torch.ones(2), torch.ones(2))
    tensor([2., 2.])
    """

    local = True

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        paired(state, x)
        return state + x


class Concat(nn.Module):
    """Let a linear map choose: fused = W [state; x].

    Use it where the state starts from noise, as Huginn's adapter; nothing bounds W, so long loops may grow.

    Args:
        dim: features of state and x.

    Shapes: state, x (..., dim) -> (..., dim).

    Raises:
        ValueError: state and x differ in shape.

    References: J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171.

    >>> Concat(2)(torch.ones(5, 2), torch.ones(5, 2)).shape
    torch.Size([5, 2])
    """

    local = True

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        paired(state, x)
        return self.linear(torch.cat((state, x), -1))


class Gated(nn.Module):
    """Between state and input, feature by feature: fused = g * state + (1 - g) * x, g = sigmoid(W [state; x] + b).

    Use it where the input matters in some steps only. Never larger than the larger of the two.

    Args:
        dim: features of state and x.

    Shapes: state, x (..., dim) -> (..., dim).

    Raises:
        ValueError: state and x differ in shape.

    References: R. K. Srivastava et al., "Highway Networks", 2015, arXiv 1505.00387.

    >>> Gated(2)(torch.ones(2), torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    local = True

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Linear(2 * dim, dim)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        paired(state, x)
        gate = torch.sigmoid(self.gate(torch.cat((state, x), -1)))
        return gate * state + (1 - gate) * x


class CrossAttention(nn.Module):
    """Let each position of the state look at all of x: fused = state + attention(norm(state), memory=x).

    Use it where a position needs other places of the input than its own. A mask hides padding of x, and
    `body.Injected` passes that of the context; without one, padding is seen. x may have another length.

    Args:
        dim: features of state and x.
        heads: of the attention.

    Shapes: state (B, T, dim), x (B, Tk, dim); mask as in `Attention` -> (B, T, dim).

    Raises:
        ValueError: heads do not divide dim, or x has other features.

    References: A. Jaegle et al., "Perceiver: General Perception with Iterative Attention", 2021, arXiv 2103.03206.

    >>> CrossAttention(4, heads=2)(torch.ones(1, 3, 4), torch.ones(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    masked = True

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)

    def forward(self, state: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return state + self.attention(self.norm(state), x, mask)


class Diagonal(nn.Module):
    """Forget at a learned rate: fused = decay * state + gain * x, decay = exp(-softplus(a)) < 1 whatever a is.

    Use it in long loops: this path can never blow up. Decay is Parcae's exp(-rate), a stable linear system sampled
    at steps of one; Parcae writes x through a full matrix, here the gain is one number for each feature. Both start
    at 1/2.

    Args:
        dim: features of state and x.

    Shapes: state, x (..., dim) -> (..., dim).

    Raises:
        ValueError: state and x differ in shape.

    References: H. Prairie et al., "Parcae: Scaling Laws For Stable Looped Language Models", 2026, arXiv 2604.12946.

    >>> Diagonal(2)(torch.ones(2), torch.zeros(2))
    tensor([0.5000, 0.5000], grad_fn=<AddBackward0>)
    """

    local = True

    def __init__(self, dim: int):
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.full((dim,), 0.5))

    @property
    def decay(self) -> Tensor:
        # exp(-softplus(a)) rounds to 1 for a < -17 in float32; one more epsilon of rate keeps it below in every dtype.
        return torch.exp(-softplus(self.rate) - torch.finfo(self.rate.dtype).eps)

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        paired(state, x)
        return self.decay * state + self.gain * x


def paired(state: Tensor, x: Tensor) -> None:
    if state.shape != x.shape:
        raise ValueError(
            f"x must have the state's shape {tuple(state.shape)}, got {tuple(x.shape)}. "
            "Project or expand one of them before fusing."
        )
