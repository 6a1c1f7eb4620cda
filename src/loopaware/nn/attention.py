"""Attention, the masks that steer it, and positions told inside it.

In: states x (B, T, D), optionally a memory (B, Tk, D) and a boolean mask (True may be attended to). Out: (B, T, D).
Deliberately elsewhere: residuals and norms (`norms`), positions that are added to a state (`positions`).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from loopaware.tokens import Tokens

__all__ = ["Attention", "AttentionPositions", "Relative", "Rotary", "adjacency", "causal", "padding"]


def padding(lengths: Tensor, size: int) -> Tensor:
    """Which positions are real. Shapes: lengths (B) -> (B, size) bool.

    >>> padding(torch.tensor([1, 2]), 2)
    tensor([[ True, False],
            [ True,  True]])
    """
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def causal(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Which keys are not in the future, the last query standing at the last key. Shapes: -> (1, queries, keys) bool.

    >>> causal(1, 3), causal(2, 2)
    (tensor([[[True, True, True]]]), tensor([[[ True, False],
             [ True,  True]]]))
    """
    return torch.ones(1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def adjacency(edges: Tensor) -> Tensor:
    """Let every node attend to itself and along its edges; edges[.., i, j] lets i look at j.

    Shapes: edges (B, N, N) or (N, N) -> (B, N, N) bool, with B = 1 for a single graph.

    >>> adjacency(torch.tensor([[0, 1], [0, 0]]))
    tensor([[[ True,  True],
             [False,  True]]])
    """
    if edges.ndim not in (2, 3) or edges.shape[-1] != edges.shape[-2]:
        raise ValueError(
            f"edges must have shape (N, N) or (B, N, N), got {tuple(edges.shape)}. Pass adjacency matrices."
        )
    edges = edges if edges.ndim == 3 else edges[None]
    return edges.bool() | torch.eye(edges.shape[-1], dtype=torch.bool, device=edges.device)


class AttentionPositions(Protocol):
    """Where tokens stand, told inside attention: by turning queries and keys, by adding to the logits, or both.

    `check` refuses, at construction, an attention it does not fit. Shapes: x (B, H, T, D/H); at, queries, keys (T) or
    (B, T), long; `bias` (H, Tq, Tk) or (B, H, Tq, Tk), or None for no bias.
    """

    def check(self, heads: int, dim_per_head: int) -> None: ...
    def turn(self, x: Tensor, at: Tensor) -> Tensor: ...
    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None: ...


class Rotary(nn.Module):
    """Turn each pair of features by an angle proportional to the position, so that logits depend on differences only.

    (x_2i, x_2i+1) at position p is rotated by p * base^(-2i / dim_per_head); neighbouring features form a pair.

    Use it by default where order matters. It has no parameters and no longest length.

    Args:
        dim_per_head: features of one head, even.
        base: larger turns more slowly, for longer sequences.

    Raises:
        ValueError: dim_per_head is odd, or not that of the attention.

    References: J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv 2104.09864.

    >>> Rotary(2).turn(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([1]))
    tensor([[[[0.5403, 0.8415]]]])
    """

    def __init__(self, dim_per_head: int, base: float = 10000.0):
        super().__init__()
        if dim_per_head < 2 or dim_per_head % 2:
            raise ValueError(f"dim_per_head must be even and positive, got {dim_per_head}. Features turn in pairs.")
        self.dim_per_head = dim_per_head
        self.base = base

    def check(self, heads: int, dim_per_head: int) -> None:
        if dim_per_head != self.dim_per_head:
            raise ValueError(
                f"Rotary's dim_per_head must be the attention's dim / heads = {dim_per_head}, "
                f"got {self.dim_per_head}. Pass Rotary({dim_per_head})."
            )

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, self.dim_per_head, 2, device=x.device, dtype=precise) / self.dim_per_head
        angles = at[..., None, :, None].to(precise) * self.base**-exponents
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        return None

    def extra_repr(self) -> str:
        return f"{self.dim_per_head}, base={self.base}"


class Relative(nn.Module):
    """Learn how much each head likes each distance: logit_hij = q_i k_j / sqrt(D/H) + table[h, clip(j - i, -c, c)].

    The clipping is Shaw's; the bias is one number for each head and distance, added to the logits, as in T5. Shaw's
    vectors on keys and values and T5's logarithmic buckets are not part of it. The table starts at zero.

    Use it where near and far differ and what lies beyond `distance` may look alike; several attentions may share one.

    Args:
        heads: those of the attention.
        distance: c, the largest distance that is told apart.

    Raises:
        ValueError: a number below 1, or heads that are not the attention's.

    References: P. Shaw et al., "Self-Attention with Relative Position Representations", 2018, arXiv 1803.02155;
    C. Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2019, arXiv
    1910.10683.

    >>> Relative(heads=2, distance=3).bias(torch.arange(4), torch.arange(5)).shape
    torch.Size([2, 4, 5])
    """

    def __init__(self, heads: int, distance: int):
        super().__init__()
        if heads < 1 or distance < 1:
            raise ValueError(f"heads and distance must be at least 1, got {heads} and {distance}. Give both as counts.")
        self.heads = heads
        self.distance = distance
        self.table = nn.Parameter(torch.zeros(heads, 2 * distance + 1))

    def check(self, heads: int, dim_per_head: int) -> None:
        if heads != self.heads:
            raise ValueError(
                f"Relative's heads must be the attention's {heads}, got {self.heads}. Pass Relative({heads}, ...)."
            )

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        return x

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        offsets = keys[..., None, :] - queries[..., :, None]
        return self.table[:, offsets.clamp(-self.distance, self.distance) + self.distance].movedim(0, -3)

    def extra_repr(self) -> str:
        return f"{self.heads}, distance={self.distance}"


class Attention(nn.Module):
    """Each query takes a mean of values, weighted by how well it fits their keys.

    y = concat_h(softmax(q_h k_h^T / sqrt(D/H) + bias) v_h) W_o, with q from x and k, v from the memory or x itself

    Use it alone to look at a memory; in a residual layer use `Block`. A query that may attend to nothing gives zeros.
    With other lengths of x and memory, `causal` and `positions` take the last query to stand at the last key.
    Keys have no bias: it would add one number to all logits of a query, which softmax cancels.
    On the CPU, second derivatives need `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call.

    Args:
        dim: features of x, of the memory and of the result.
        heads: how many means are taken side by side; divides dim.
        causal: no query sees a key behind it.
        positions: `Rotary(dim // heads)`, `Relative(heads, distance)` or None for none.
        dropout: share of the weights dropped in training.
        bias: of the query, value and output maps.

    Shapes: x (B, T, D), memory (B, Tk, D); mask bool, True = may attend: (B, Tk) hides keys, (B, T, Tk) or (1, T, Tk)
    hides pairs, four axes broadcast to (B, H, T, Tk). Result (B, T, D).

    Raises:
        ValueError: heads do not divide dim, positions do not fit, or a shape is not one of the above.
        TypeError: mask is not boolean.

    References: A. Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.

    >>> attention = Attention(dim=8, heads=2, positions=Rotary(4))
    >>> attention(torch.ones(1, 3, 8), mask=padding(torch.tensor([2]), 3)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        positions: AttentionPositions | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ):
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads, got {dim} and {heads}. Change one of them.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}. Take 0.0 for none.")
        if positions is not None:
            positions.check(heads, dim // heads)
        self.dim, self.heads, self.causal, self.dropout = dim, heads, causal, dropout
        self.positions = positions
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        self.check("x", x, x.shape[0])
        self.check("memory", memory, x.shape[0])
        query, key, value = self.split(self.query(x)), self.split(self.key(memory)), self.split(self.value(memory))
        queries, keys = x.shape[1], memory.shape[1]
        bias = None
        if self.positions is not None:
            at_keys = torch.arange(keys, device=x.device)
            at_queries = torch.arange(keys - queries, keys, device=x.device)
            query, key = self.positions.turn(query, at_queries), self.positions.turn(key, at_keys)
            bias = self.positions.bias(at_queries, at_keys)
        dropped = self.dropout if self.training else 0.0
        simple = self.causal and mask is None and bias is None and queries == keys
        allowed = None if simple else self.allowed(mask, x.shape[0], queries, keys, x.device)
        if allowed is None:
            mixed = scaled_dot_product_attention(query, key, value, bias, dropped, is_causal=simple)
            return self.out(mixed.transpose(1, 2).flatten(2))
        mixed, seen = masked_attention(query, key, value, allowed, bias, dropped)
        return self.out(mixed.transpose(1, 2).flatten(2)).masked_fill(~seen, 0.0)

    def some(
        self,
        x: Tensor,
        moved: Tensor,
        tokens: Tokens,
        mask: Tensor | None = None,
        held: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Self-attention of some tokens, which look at all: `forward` without the queries of the others.

        `held` are keys and values of all tokens, of an earlier call; those in `tokens.moved` are made anew.

        Shapes: x (1, n, D), what is run; moved (1, m, D), what has moved; mask as in `forward` -> (1, n, D); held
        (B, T, D) each.
        """
        query, bias = self.split(tokens.rows(self.query(x))), None
        key, value = self.key(moved), self.value(moved)
        batch, keys = tokens.mask.shape
        if self.positions is not None:
            every = torch.arange(keys, device=x.device).expand(batch, -1)
            query = self.positions.turn(query, tokens.positions)
            key = self.positions.turn(self.split(key), tokens.positions_moved).transpose(1, 2).flatten(2)
            bias = self.positions.bias(tokens.positions, every)
        kept = held or (None, None)
        held = tokens.renewed(kept[0], key, own=True), tokens.renewed(kept[1], value, own=True)
        key, value = self.split(held[0]), self.split(held[1])
        dropped = self.dropout if self.training else 0.0
        allowed = None if mask is None else tokens.queries(four_axes(mask, (batch, self.heads, keys, keys)))
        if self.causal:
            order = torch.arange(keys, device=x.device) <= tokens.positions[:, None, :, None]
            allowed = order if allowed is None else allowed & order
        if allowed is None:
            mixed = scaled_dot_product_attention(query, key, value, bias, dropped)
            return self.out(tokens.flat(mixed.transpose(1, 2).flatten(2))), held
        mixed, seen = masked_attention(query, key, value, allowed, bias, dropped)
        seen = tokens.flat(seen.expand(batch, query.shape[2], 1))
        return self.out(tokens.flat(mixed.transpose(1, 2).flatten(2))).masked_fill(~seen, 0.0), held

    def split(self, x: Tensor) -> Tensor:
        """One axis for the heads. Shapes: (B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def allowed(self, mask: Tensor | None, batch: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """The mask and the causal order in one, or None. Shapes: -> broadcastable to (B, H, Tq, Tk), keys whole."""
        order = causal(queries, keys, device)[None] if self.causal else None
        if mask is None:
            return order
        mask = four_axes(mask, (batch, self.heads, queries, keys))
        return mask if order is None else mask & order

    def check(self, what: str, tensor: Tensor, batch: int) -> None:
        if tensor.ndim != 3 or tensor.shape[0] != batch or tensor.shape[2] != self.dim:
            raise ValueError(
                f"{what} must have shape (B, T, D) with B = {batch} and D = {self.dim}, got {tuple(tensor.shape)}. "
                "Flatten other leading axes into B, and project other features before."
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, causal={self.causal}, dropout={self.dropout}"


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor | None, dropped: float
) -> tuple[Tensor, Tensor]:
    """Attention under a mask, and which queries see a key. Shapes: -> (B, H, Tq, D/H), (B or 1, Tq or 1, 1)."""
    # Softmax over no key is 0/0 in some kernels: such a query looks at every key, and what it finds is dropped.
    seen = allowed.any(-1, keepdim=True)
    allowed = allowed | ~seen
    if bias is not None:
        allowed = torch.where(allowed, bias, -math.inf)
    return scaled_dot_product_attention(query, key, value, allowed, dropped).masked_fill(~seen, 0.0), seen.any(1)


def four_axes(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask of any accepted shape with the four axes (B, H, Tq, Tk), each whole or 1, the last one whole."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean with True = may attend, got {mask.dtype}. Pass mask.bool().")
    batch, _, queries, keys = shape
    if mask.ndim == 2 and mask.shape == (batch, keys):
        return mask[:, None, None, :]
    if mask.ndim == 3 and mask.shape[0] in (1, batch) and mask.shape[1:] == (queries, keys):
        return mask[:, None]
    if mask.ndim == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, shape, strict=True)):
        return mask.expand(-1, -1, -1, keys)
    raise ValueError(
        f"mask must have shape (B, Tk) = {(batch, keys)}, (B, Tq, Tk) = {(batch, queries, keys)} or one that "
        f"broadcasts to (B, H, Tq, Tk) = {shape}, got {tuple(mask.shape)}. Two axes always mean keys; give pairs three."
    )
