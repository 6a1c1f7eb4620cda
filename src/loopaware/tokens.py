"""Some tokens of a batch of sequences: which are run, which have moved since keys and values were made.

In: masks over (B, T). Out: `Tokens`, which takes tokens out of full tensors, puts them back, and lays them out sequence
by sequence where they must be told apart, as queries of attention. Tokens that were taken out stand in one row,
(1, n, D), so that norms and feed-forwards need no new code. Deliberately elsewhere: who is run
(`loopaware.execute`), what is done with them (`loopaware.nn`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Tokens:
    """The tokens that are run in a step, and those that have moved since `held` was made.

    Places count through the batch: token t of sequence b stands at b * T + t.

    Args:
        run: which tokens are run; at least one.
        moved: which tokens are not as they were when what is held was made, those of `run` among them; None is all.

    Shapes: run, moved (B, T) bool. n tokens are run, m have moved, and no sequence has more than K that run.

    >>> tokens = Tokens(torch.tensor([[True, False], [True, True]]))
    >>> tokens.changed(torch.arange(4.0).view(2, 2, 1)).flatten()
    tensor([0., 2., 3., 1.])
    >>> tokens.rows(torch.tensor([[[0.0], [2.0], [3.0]]]))[..., 0]
    tensor([[0., 0.],
            [2., 3.]])
    """

    def __init__(self, run: Tensor, moved: Tensor | None = None):
        self.mask = run
        self.held = moved is not None
        others = ~run if moved is None else moved > run
        self.run = run.flatten().nonzero().flatten()
        self.left = others.flatten().nonzero().flatten()

    @cached_property
    def moved(self) -> Tensor:
        """Those that are run, then those that have moved and are not. Shapes: -> (m)."""
        return torch.cat([self.run, self.left])

    @cached_property
    def afresh(self) -> Tokens:
        """The same tokens, where nothing is held."""
        return Tokens(self.mask) if self.held else self

    @cached_property
    def ranks(self) -> Tensor:
        """The number of each token among those of its sequence that are run. Shapes: -> (n)."""
        return (self.mask.cumsum(1) - 1).flatten().index_select(0, self.run)

    @cached_property
    def most(self) -> int:
        """K. Waits for the device."""
        return int(self.mask.sum(1).max())

    @cached_property
    def slots(self) -> Tensor:
        """Where each token stands in the layout by sequences. Shapes: -> (n), places in (B, K)."""
        return self.run // self.mask.shape[1] * self.most + self.ranks

    @cached_property
    def sources(self) -> Tensor:
        """Which token fills each slot; empty ones repeat the first, and nobody looks at them. Shapes: -> (B * K)."""
        order = torch.arange(len(self.run), device=self.run.device)
        return self.run.new_zeros(len(self.mask) * self.most).index_copy(0, self.slots, order)

    @cached_property
    def positions(self) -> Tensor:
        """The position in its sequence of the token in each slot, 0 in empty ones. Shapes: -> (B, K)."""
        empty = self.run.new_zeros(len(self.mask) * self.most)
        return empty.index_copy(0, self.slots, self.run % self.mask.shape[1]).view(len(self.mask), self.most)

    def put(self, full: Tensor, new: Tensor) -> Tensor:
        """`full` with the tokens that were run in their places. Shapes: (B, T, D), (1, n, D) -> (B, T, D)."""
        return full.flatten(0, 1).index_copy(0, self.run, new[0]).view_as(full)

    def changed(self, full: Tensor) -> Tensor:
        """The tokens that have moved, those that are run first. Shapes: (B, T, D) -> (1, m, D)."""
        return full.flatten(0, 1).index_select(0, self.moved)[None]

    def renewed(self, held: Tensor | None, changed: Tensor, own: bool = False) -> Tensor:
        """What is held, with the tokens that have moved made anew. Shapes: (B, T, D), (1, m, D) -> (B, T, D).

        `own`: nobody else sees what is held, so that it may be written to where no gradient flows.
        """
        assert (held is not None) == self.held, "what has moved is told where something is held"
        full = (*self.mask.shape, changed.shape[-1])
        flat = changed.new_empty(full).flatten(0, 1) if held is None else held.flatten(0, 1)
        copy = torch.Tensor.index_copy_ if own and not torch.is_grad_enabled() else torch.Tensor.index_copy
        return copy(flat, 0, self.moved, changed[0]).view(full)

    @cached_property
    def positions_moved(self) -> Tensor:
        """The positions in their sequences of the tokens that have moved. Shapes: -> (1, m)."""
        return (self.moved % self.mask.shape[1])[None]

    def rows(self, new: Tensor) -> Tensor:
        """The tokens that are run, sequence by sequence. Shapes: (1, n, D) -> (B, K, D)."""
        return new[0].index_select(0, self.sources).view(len(self.mask), self.most, -1)

    def flat(self, rows: Tensor) -> Tensor:
        """The same in one row again, empty slots left out. Shapes: (B, K, D) -> (1, n, D)."""
        return rows.flatten(0, 1).index_select(0, self.slots)[None]

    def queries(self, mask: Tensor) -> Tensor:
        """The mask of the queries that are run, B, H and T whole or 1. Shapes: (B, H, T, Tk) -> (B, H, K or 1, Tk)."""
        if mask.shape[2] == 1:
            return mask
        return torch.take_along_dim(mask, self.positions[:, None, :, None], 2)
