"""The plain transformer: a fixed number of blocks that share nothing. The baseline every recipe compares with.

In: a state (B, T, D). Out: a state of the same shape, behind a final norm. Deliberately elsewhere: embeddings and
heads, which recipes put around it as they do around a loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from loopaware.nn import Block, LayerNorm, Placement
from loopaware.nn.attention import AttentionPositions
from loopaware.nn.norms import local
from loopaware.protocols import partial
from loopaware.tokens import Tokens

__all__ = ["Transformer"]


class Transformer(nn.Module):
    """Unshared blocks, one after the other, then a norm: y = norm(block_L(...block_1(x))).

    Use it as the baseline of a loop over one block: same call, same blocks, `layers` times the parameters. It is a
    body too, so a loop may repeat the whole stack; of tokens that have stopped `execute.Compacted` then leaves out the
    last block alone, since those before it make what the last one attends to.

    Args:
        layers: how many blocks.
        dim: features of the state.
        heads: of every attention; divides dim.
        hidden: width of the feed-forwards; None takes 4 dim.
        causal: no token sees a later one.
        positions: `Rotary`, `Relative` or None; every block gets its own copy.
        placement: where the norms stand; None takes `Pre()`.
        norm: makes a norm from dim.
        dropout: as in `Block`.

    Shapes: x (B, T, D), mask as in `Attention`, with (B, T) for padding -> (B, T, D).

    Raises:
        ValueError: layers is below 1, heads do not divide dim, or a mask is given twice.

    References: A. Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.

    >>> import torch
    >>> Transformer(layers=2, dim=8, heads=2)(torch.ones(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        heads: int,
        *,
        hidden: int | None = None,
        causal: bool = False,
        positions: AttentionPositions | None = None,
        placement: Placement | None = None,
        norm: Callable[[int], nn.Module] = LayerNorm,
        dropout: float = 0.0,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}. Give the number of blocks.")
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                hidden=hidden,
                causal=causal,
                positions=copy.deepcopy(positions),
                placement=placement,
                norm=norm,
                dropout=dropout,
            )
            for _ in range(layers)
        )
        self.norm = norm(dim)

    def forward(
        self, x: Tensor, context: Any = None, index: int | Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        if mask is not None:
            context = masked(context, mask)
        for block in self.blocks:
            x = block(x, context, index)
        return self.norm(x)

    @property
    def partial(self) -> bool:
        """Whether the last block and the norm can run for some tokens; blocks before it are run for all."""
        return partial(self.blocks[-1]) and local(self.norm)

    def some(self, x: Tensor, context: Any, index: int, tokens: Tokens, held: Any = None) -> tuple[Tensor, Any]:
        """`forward` of some tokens. What earlier blocks make of stopped tokens moves, so only one block can hold."""
        *before, last = self.blocks
        assert partial(last)
        for block in before:
            x = block(x, context, index)
        x, held = last.some(x, context, index, tokens.afresh if before else tokens, held)
        return self.norm(x), None if before else held


def masked(context: Any, mask: Tensor) -> dict[str, Any]:
    """The context with the mask in it."""
    entries = dict(context) if isinstance(context, Mapping) else {"x": context}
    if entries.get("mask") is not None:
        raise ValueError("mask must be given once, got one in the call and one in the context. Leave out one of them.")
    return {**entries, "mask": mask}
