"""Random numbers that are a function of a seed and a place: the same whatever else is drawn, and traceable.

In: integers (places) and a seed. Out: a number for each place. For evaluation, where no row's answer may depend on
its neighbours in the batch. Deliberately elsewhere: training, which draws from PyTorch's generators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal(place: Tensor, seed: int) -> Tensor:
    """A standard normal number for each integer.

    >>> normal(torch.arange(2), seed=0).shape
    torch.Size([2])
    """
    return math.sqrt(2) * torch.erfinv(2 * uniform(place, seed) - 1)


def uniform(place: Tensor, seed: int) -> Tensor:
    """A number of (0, 1) for each integer, in float64."""
    start = scramble(torch.full_like(place, seed) + 0x9E3779B9)
    return (2 * scramble(place * 0x9E3779B1 + start).double() + 1) / 2**33


def scramble(bits: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on the low 32 bits (A. Appleby, public domain)."""
    bits = bits & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits
