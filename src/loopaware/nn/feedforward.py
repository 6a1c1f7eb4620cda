"""What happens to each token by itself: two linear maps with something curved between them.

In: (..., dim). Out: (..., dim). Deliberately elsewhere: residuals and norms (`norms`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import silu

__all__ = ["FeedForward", "SwiGLU"]


class FeedForward(nn.Module):
    """Widen, bend, narrow: y = W_2 f(W_1 x + b_1) + b_2.

    The default of a block; `SwiGLU` is usually a little better for the same number of parameters.

    Args:
        dim: features of x and of the result.
        hidden: features between; None takes 4 dim.
        activation: f, any module or function; None takes `torch.nn.GELU()`.
        dropout: share of the hidden features dropped in training.

    Shapes: x (..., dim) -> (..., dim).

    Raises:
        ValueError: hidden is below 1.

    References: A. Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762; D. Hendrycks and K. Gimpel,
    "Gaussian Error Linear Units", 2016, arXiv 1606.08415.

    >>> FeedForward(3, activation=nn.ReLU()).narrow.in_features
    12
    """

    local = True

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden = positive(4 * dim if hidden is None else hidden)
        self.widen = nn.Linear(dim, hidden)
        self.activation = nn.GELU() if activation is None else activation
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.dropout(self.activation(self.widen(x))))


class SwiGLU(nn.Module):
    """One half opens or shuts the other: y = W_2 (silu(W_g x) * W_1 x), without biases.

    Use it as a block's `feedforward` where quality counts. With the default width it has the parameters of
    `FeedForward(dim)`.

    Args:
        dim: features of x and of the result.
        hidden: features between; None takes 8/3 dim, rounded up to a multiple of 8.
        dropout: share of the hidden features dropped in training.

    Shapes: x (..., dim) -> (..., dim).

    Raises:
        ValueError: hidden is below 1.

    References: N. Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202.

    >>> SwiGLU(64).narrow.in_features
    176
    """

    local = True

    def __init__(self, dim: int, hidden: int | None = None, dropout: float = 0.0):
        super().__init__()
        hidden = positive(-(-dim // 3) * 8 if hidden is None else hidden)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.widen = nn.Linear(dim, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.dropout(silu(self.gate(x)) * self.widen(x)))


def positive(hidden: int) -> int:
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {hidden}. Leave it out for the usual width.")
    return hidden
