"""Copy and reverse: strings of symbols, to be said again forwards or backwards.

In: how many, how long, a generator. Out: a batch of `Strings`, padded to the longest. The first token that the answer
begins with says what is asked, so one net learns both. Deliberately elsewhere: nets (`loopaware.recipes.copy_reverse`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopaware.checks import bounded

SYMBOLS = 10
END, COPY, REVERSE = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2
VOCABULARY = SYMBOLS + 3


class Strings(NamedTuple):
    """A batch of problems.

    Shapes: source (B, n) long, symbols, then one END, which also pads; mask (B, n) bool, True = real, the END with it;
    target (B, n) long, the answer with its END; task, length (B) long, COPY or REVERSE, and symbols of the source.
    """

    source: Tensor
    mask: Tensor
    target: Tensor
    task: Tensor
    length: Tensor

    @property
    def given(self) -> Tensor:
        """What a decoder sees before each token of the target: the task, then the answer so far. Shapes: (B, n)."""
        return torch.cat([self.task[:, None], self.target[:, :-1]], 1)


def sample(count: int, lengths: tuple[int, int], *, generator: torch.Generator) -> Strings:
    """Draw strings whose lengths are drawn evenly, half of them to be copied and half to be reversed.

    Args:
        lengths: the shortest and the longest, both included.

    Raises:
        ValueError: count is below 1, or a range that is none.

    References: M. Dehghani et al., "Universal Transformers", 2018, arXiv 1807.03819 (section 3.3).

    >>> batch = sample(3, (2, 5), generator=torch.Generator().manual_seed(0))
    >>> batch.source.shape == batch.target.shape
    True
    """
    bounded("count", count, "Draw at least one string.")
    low, high = lengths
    if not 1 <= low <= high:
        raise ValueError(f"lengths must be a range from 1 on, got {low} to {high}. Give the shortest and the longest.")
    length = torch.randint(low, high + 1, (count,), generator=generator)
    places = torch.arange(high + 1)
    mask = places <= length[:, None]
    source = torch.randint(0, SYMBOLS, (count, high + 1), generator=generator)
    source = source.masked_fill(places >= length[:, None], END)
    task = torch.where(torch.rand(count, generator=generator) < 0.5, COPY, REVERSE)
    backwards = source.gather(1, (length[:, None] - 1 - places).clamp(min=0)).masked_fill(
        places >= length[:, None], END
    )
    return Strings(source, mask, torch.where((task == COPY)[:, None], source, backwards), task, length)


def held_out(count: int, length: int, *, seed: int = 0) -> Strings:
    """The test strings of a length, by a generator of their own.

    >>> held_out(2, 40).source.shape
    torch.Size([2, 41])
    """
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + length)
    return sample(count, (length, length), generator=generator)


def right(said: Tensor, strings: Strings) -> Tensor:
    """Which tokens are right, the END among them; padding counts as right. Shapes: said (B, n) long -> (B, n) bool.

    >>> strings = held_out(2, 3)
    >>> bool(right(strings.target, strings).all())
    True
    """
    return (said == strings.target) | ~strings.mask
