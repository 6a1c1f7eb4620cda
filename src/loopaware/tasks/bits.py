"""Bits: running parities of strings of any length, and the parity of sparse vectors.

In: how many, how long, a generator. Out: named tuples of tensors. A prefix sum needs all bits before it, so a net that
looks one place around itself needs as many loops as there are bits. Deliberately elsewhere: nets and losses
(`loopaware.recipes.prefix_sums`, `loopaware.recipes.parity`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopaware.checks import bounded


class Strings(NamedTuple):
    """Strings of bits with their prefix sums modulo 2. Shapes: bits, labels (B, n) long."""

    bits: Tensor
    labels: Tensor


class Vectors(NamedTuple):
    """Sparse vectors of -1, 0 and 1 with the parity of the ones.

    Shapes: x (B, width) float32; label (B) long, 0 or 1; nonzeros (B) long.
    """

    x: Tensor
    label: Tensor
    nonzeros: Tensor


def prefix_sums(count: int, length: int, *, generator: torch.Generator) -> Strings:
    """Draw strings; label i is the sum of the bits 0 to i, modulo 2.

    References: A. Schwarzschild et al., "Can You Learn an Algorithm? Generalizing from Easy to Hard Problems with
    Recurrent Networks", 2021, arXiv 2106.04537.

    Raises:
        ValueError: count or length is below 1.

    >>> prefix_sums(3, 8, generator=torch.Generator().manual_seed(0)).labels.shape
    torch.Size([3, 8])
    """
    shape = bounded("count", count, "Draw at least one string."), bounded("length", length, "A string has bits.")
    bits = torch.randint(0, 2, shape, generator=generator)
    return Strings(bits, bits.cumsum(-1) % 2)


def parity(count: int, width: int, nonzeros: tuple[int, int], *, generator: torch.Generator) -> Vectors:
    """Draw vectors whose first k entries are 1 or -1 and the others 0, k drawn evenly; how many ones, modulo 2?

    The non-zero entries stand in front, as in the references.

    Args:
        nonzeros: the smallest and the largest k, both included.

    Raises:
        ValueError: count or width is below 1, or a range that does not fit the width.

    References: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983;
    A. Banino et al., "PonderNet: Learning to Ponder", 2021, arXiv 2107.05407.

    >>> batch = parity(500, 8, (2, 5), generator=torch.Generator().manual_seed(0))
    >>> batch.nonzeros.min().item(), batch.nonzeros.max().item()
    (2, 5)
    """
    bounded("count", count, "Draw at least one vector.")
    bounded("width", width, "A vector has entries.")
    low, high = nonzeros
    if not 1 <= low <= high <= width:
        raise ValueError(
            f"nonzeros must be a range within 1 and the width {width}, got {low} to {high}. Take a wider vector."
        )
    many = torch.randint(low, high + 1, (count,), generator=generator)
    signs = torch.randint(0, 2, (count, width), generator=generator) * 2 - 1
    x = signs * (torch.arange(width) < many[:, None])
    return Vectors(x.float(), (x == 1).sum(-1) % 2, many)


def held_out(count: int, length: int, *, seed: int = 0) -> Strings:
    """The test strings of a length, by a generator of their own.

    >>> held_out(2, 5).bits.shape
    torch.Size([2, 5])
    """
    return prefix_sums(count, length, generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + length))


def right(logits: Tensor, strings: Strings) -> Tensor:
    """The measure: whether every prefix sum of a string is right. Shapes: logits (..., B, n, 2) -> (..., B) bool.

    >>> strings = held_out(2, 5)
    >>> right(torch.nn.functional.one_hot(strings.labels, 2), strings)
    tensor([True, True])
    """
    return (logits.argmax(-1) == strings.labels).all(-1)
