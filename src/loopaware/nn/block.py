"""One layer of a transformer: attention, on demand cross-attention, and feed-forward, each in a residual.

In: a state (B, T, D) and a context. Out: a state of the same shape. Deliberately elsewhere: repetition, embeddings,
the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from loopaware.nn.attention import Attention, AttentionPositions, four_axes
from loopaware.nn.feedforward import FeedForward
from loopaware.nn.norms import LayerNorm, Placement, Pre, Residual, local
from loopaware.tokens import Tokens

__all__ = ["Block"]


class Block(nn.Module):
    """A transformer layer that is a loop body as it stands.

    h = x + attention(norm(x));  h = h + cross(norm(h), memory);  y = h + feedforward(norm(h))   (with `Pre`)

    Use it as a body, or several in a stack. The context is None, a tensor, or a mapping. In a mapping, "mask" steers
    self-attention. With `cross`, the memory is the tensor itself or "memory" (masked by "memory_mask"); a mapping
    without "memory" offers its "x" (masked by "mask"). Without `cross`, a tensor is not looked at. The index is part
    of the call of a body and is not looked at: add a step signal outside.

    Args:
        dim: features of the state.
        heads: of every attention; divides dim.
        hidden: width of the default feed-forward; None takes 4 dim.
        causal: no token sees a later one.
        positions: `Rotary`, `Relative` or None, for self-attention.
        placement: where the norms stand; None takes `Pre()`.
        norm: makes a norm from dim.
        feedforward: any module (B, T, D) -> (B, T, D) in place of the default, for example `SwiGLU(dim)`.
        cross: attend to a memory as well.
        dropout: share dropped in training of attention weights, hidden features and sub-layer outputs.

    Shapes: x (B, T, D), mask as in `Attention` with (B, T) for padding, memory (B, Tk, D) -> (B, T, D).

    Raises:
        ValueError: heads do not divide dim, hidden is given along with feedforward, or cross finds no memory.
        TypeError: the context is none of the above.

    References: A. Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.

    >>> import torch
    >>> block = Block(dim=8, heads=2)
    >>> block(torch.ones(2, 3, 8), {"mask": torch.ones(2, 3, dtype=torch.bool)}).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        hidden: int | None = None,
        causal: bool = False,
        positions: AttentionPositions | None = None,
        placement: Placement | None = None,
        norm: Callable[[int], nn.Module] = LayerNorm,
        feedforward: nn.Module | None = None,
        cross: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if feedforward is not None and hidden is not None:
            raise ValueError(
                f"hidden must be None when feedforward is given, got {hidden}. Give the width to the latter."
            )
        placement = Pre() if placement is None else placement
        self.attention = Attention(dim, heads, causal=causal, positions=positions, dropout=dropout)
        self.cross = Attention(dim, heads, dropout=dropout) if cross else None
        self.feedforward = FeedForward(dim, hidden, dropout=dropout) if feedforward is None else feedforward
        self.around_attention = Residual(dim, placement, norm, dropout)
        self.around_cross = Residual(dim, placement, norm, dropout) if cross else None
        self.around_feedforward = Residual(dim, placement, norm, dropout)

    def forward(self, x: Tensor, context: Any = None, index: int | Tensor | None = None) -> Tensor:
        seen = read(context)
        x = self.around_attention(x, lambda h: self.attention(h, mask=seen.mask))
        if self.cross is not None and self.around_cross is not None:
            cross, memory = self.cross, present(seen.memory)
            x = self.around_cross(x, lambda h: cross(h, memory, seen.memory_mask))
        return self.around_feedforward(x, self.feedforward)

    @property
    def partial(self) -> bool:
        """Whether `some` is exact: nothing but attention lets tokens see each other."""
        parts = (self.around_attention, self.around_feedforward, self.feedforward)
        return all(map(local, parts)) and (self.around_cross is None or local(self.around_cross))

    def some(
        self, x: Tensor, context: Any, index: int | Tensor | None, tokens: Tokens, held: Any = None
    ) -> tuple[Tensor, Any]:
        """`forward` of some tokens: queries and feed-forward for them alone, keys and values of all.

        Shapes: x (B, T, D) -> (1, n, D), and what to hold: keys and values (B, T, D) each.
        """
        seen, kept = read(context), [held]
        changed = tokens.changed(x)
        moved = self.around_attention.before(changed)

        def attend(h: Tensor) -> Tensor:
            mixed, kept[0] = self.attention.some(h, moved, tokens, seen.mask, held)
            return mixed

        # What else has moved is wanted for its keys alone.
        x = self.around_attention(changed[:, : len(tokens.run)], attend)
        if self.cross is not None and self.around_cross is not None:
            cross, memory, mask = self.cross, present(seen.memory), seen.memory_mask
            if mask is not None and mask.ndim > 2:
                mask = tokens.queries(
                    four_axes(mask, (len(memory), cross.heads, tokens.mask.shape[1], memory.shape[1]))
                )
            x = self.around_cross(x, lambda h: tokens.flat(cross(tokens.rows(h), memory, mask)))
        return self.around_feedforward(x, self.feedforward), kept[0]


class Seen(NamedTuple):
    """What a block takes from a context."""

    mask: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None


def read(context: Any) -> Seen:
    if context is None:
        return Seen()
    if isinstance(context, Tensor):
        return Seen(memory=context)
    if not isinstance(context, Mapping):
        raise TypeError(
            f"a block's context must be None, a tensor or a mapping, got {type(context).__name__}. "
            "Pass {'x': x, 'mask': mask, 'memory': memory} with the entries you have."
        )
    mask = context.get("mask")
    if context.get("memory") is None:
        return Seen(mask, context.get("x"), mask)
    return Seen(mask, context["memory"], context.get("memory_mask"))


def present(memory: Tensor | None) -> Tensor:
    if memory is None:
        raise ValueError(
            "the context of a block with cross=True must hold a memory, got none. "
            "Pass a tensor, or a mapping with 'memory' or 'x'."
        )
    return memory
