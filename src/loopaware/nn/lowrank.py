"""Variants of a module's weights that differ from shared ones by matrices of low rank.

In: shared weights, the number of a variant. Out: that variant's weights, for `torch.func.functional_call`. Deliberately
elsewhere: who chooses the variant, a step of a loop for example.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loopaware.checks import bounded

__all__ = ["LowRank"]


class LowRank(nn.Module):
    """Weights of several variants of a module: W_i = W + U_i V_i for matrices, w_i = w + u_i for everything else.

    Use it where weights are shared and the sharers may still differ a little. Vectors (norms, biases) are few numbers
    and have differences of full size. It begins as no difference; `take` begins from given weights instead. The
    products are made anew at each call, which costs rank / tokens of what the matrices themselves cost.

    Args:
        module: whose weights are shared; it is only asked for their names and shapes.
        count: how many variants there are.
        rank: of the differences of matrices, cut where a matrix has less.

    Shapes: U (count, out, rank), V (count, rank, in).

    Raises:
        ValueError: count or rank is below one.

    References: S. Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", 2024,
    arXiv 2410.20672; E. J. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.

    >>> layer = nn.Linear(3, 2)
    >>> variants = LowRank(layer, count=4, rank=1)
    >>> weights = variants(3, dict(layer.named_parameters()))
    >>> torch.equal(weights["weight"], layer.weight)
    True
    """

    def __init__(self, module: nn.Module, count: int, rank: int):
        super().__init__()
        self.count = bounded("count", count, "Give the number of variants.")
        self.rank = bounded("rank", rank, "Share the weights as they are for none.")
        left, right, whole = {}, {}, {}
        for name, weight in module.named_parameters():
            if weight.ndim == 2:
                size = min(rank, *weight.shape)
                left[key(name)] = nn.Parameter(weight.new_zeros(count, weight.shape[0], size))
                noise = torch.randn_like(weight.new_empty(count, size, weight.shape[1]))
                right[key(name)] = nn.Parameter(weight.shape[1] ** -0.5 * noise)
            else:
                whole[key(name)] = nn.Parameter(weight.new_zeros(count, *weight.shape))
        self.left, self.right, self.whole = (nn.ParameterDict(each) for each in (left, right, whole))

    def forward(self, variant: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a variant; numbers beyond the last one are given the last."""
        index = min(variant, self.count - 1)
        return {name: weight + self.difference(name, index) for name, weight in weights.items()}

    def difference(self, name: str, index: int) -> Tensor:
        own = key(name)
        return self.whole[own][index] if own in self.whole else self.left[own][index] @ self.right[own][index]

    @torch.no_grad()
    def take(self, variant: int, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Bring a variant as near to the `wanted` weights as its rank allows: the largest singular values stay."""
        for name, weight in weights.items():
            own, difference = key(name), wanted[name].double() - weight.double()
            if own in self.whole:
                self.whole[own][variant] = difference
                continue
            u, s, v = torch.linalg.svd(difference, full_matrices=False)
            size, root = self.left[own].shape[-1], s.sqrt()
            self.left[own][variant] = u[:, :size] * root[:size]
            self.right[own][variant] = root[:size, None] * v[:size]

    def extra_repr(self) -> str:
        return f"count={self.count}, rank={self.rank}"


def key(name: str) -> str:
    """A parameter's name as that of a child, which has no dots.

    >>> key("attention.query.weight")
    'attention/query/weight'
    """
    return name.replace(".", "/")
