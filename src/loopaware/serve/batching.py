"""Which requests go into a batch together.

In: a list of requests. Out: batches, as lists of places in it. A batch lasts as long as its deepest row and is as wide
as its longest, so requests of like depth and length belong together. Deliberately elsewhere: how deep a request will go
(`loopaware.serve.depth`), running the batches (`loopaware.serve.encode`), leaving out rows of a batch that have
stopped (`execute.Compacted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loopaware.checks import bounded
from loopaware.serve.padding import Request, length


class Policy(Protocol):
    """Which requests go together? Law: every request is in exactly one batch, and no batch is empty."""

    def __call__(self, requests: Sequence[Request], /) -> list[list[int]]: ...


@dataclass(frozen=True)
class InOrder:
    """Batches in the order of the requests: (0, ..., size - 1), (size, ...), ...

    Where requests must be answered as they come, and the baseline of the others.

    Args:
        size: requests in a batch, at most.
        tokens: positions in a batch, padding included, at most; None does not bound them.

    Raises:
        ValueError, TypeError: a bound below one; a request that is longer than `tokens` (when it is called).

    >>> import torch
    >>> InOrder(2)([torch.ones(3), torch.ones(1), torch.ones(3)])
    [[0, 1], [2]]
    """

    size: int
    tokens: int | None = None

    def __post_init__(self):
        checked(self.size, self.tokens)

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        return cut(range(len(requests)), lengths(requests), self.size, self.tokens)


@dataclass(frozen=True)
class ByLength:
    """Batches of requests of like length, which need the least padding; the longest come first.

    Where depth does not differ much, or nothing is known of it.

    Args:
        size: requests in a batch, at most.
        tokens: positions in a batch, padding included, at most; None does not bound them.

    Raises:
        ValueError, TypeError: as `InOrder`.

    >>> import torch
    >>> ByLength(2)([torch.ones(3), torch.ones(1), torch.ones(3)])
    [[0, 2], [1]]
    """

    size: int
    tokens: int | None = None

    def __post_init__(self):
        checked(self.size, self.tokens)

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        found = lengths(requests)
        return cut(sorted(range(len(found)), key=lambda i: -found[i]), found, self.size, self.tokens)


@dataclass(frozen=True)
class ByDepth:
    """Batches of like predicted depth and length, which keep the sum of |batch| * longest * deepest small.

    The requests are halved, by depth or by length, whichever leaves less to do, and each half again, until a half fits
    into a batch; where all have one length, that is an order by depth. Use it where depth differs much and can be
    guessed from the input. Where rows that have stopped leave their batch (`execute.Compacted`), depth costs little and
    `ByLength` may be as good: measure both.

    Args:
        predict: how many steps each request will take, for example a `DepthPredictor`.
        size: requests in a batch, at most.
        tokens: positions in a batch, padding included, at most; None does not bound them.

    Raises:
        ValueError, TypeError: as `InOrder`; predictions that are not one number for each request (when it is called).

    >>> import torch
    >>> requests = [torch.ones(3), torch.ones(1), torch.ones(3), torch.ones(2)]
    >>> ByDepth(lambda requests: torch.tensor([2.0, 9.0, 8.0, 3.0]), size=2)(requests)
    [[1, 2], [3, 0]]
    """

    predict: Callable[[Sequence[Request]], Tensor]
    size: int
    tokens: int | None = None

    def __post_init__(self):
        checked(self.size, self.tokens)

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        found = lengths(requests)
        if not found:
            return []
        depths = self.predict(requests)
        if depths.shape != (len(found),):
            raise ValueError(
                f"predictions must be one for each of {len(found)} requests, got shape {tuple(depths.shape)}. "
                "Let predict return a tensor (N)."
            )
        parts = halved(list(range(len(found))), found, depths.tolist(), self.size)
        return [batch for part in parts for batch in cut(part, found, self.size, self.tokens)]


def halved(places: list[int], lengths: Sequence[int], depths: Sequence[float], size: int) -> list[list[int]]:
    """Halves of halves of these places, none larger than `size`, nearly all as large."""
    if len(places) <= size:
        return [places]
    middle = size * math.ceil(len(places) / (2 * size))

    def work(part: list[int]) -> float:
        return len(part) * max(lengths[i] for i in part) * max(depths[i] for i in part)

    orders = [
        sorted(places, key=lambda i: (depths[i], lengths[i]), reverse=True),
        sorted(places, key=lambda i: (lengths[i], depths[i]), reverse=True),
    ]
    first, second = min(((order[:middle], order[middle:]) for order in orders), key=lambda pair: sum(map(work, pair)))
    return halved(first, lengths, depths, size) + halved(second, lengths, depths, size)


def lengths(requests: Sequence[Request]) -> list[int]:
    return [length(request) for request in requests]


def checked(size: int, tokens: int | None) -> None:
    bounded("size", size, "A batch holds at least one request.")
    if tokens is not None:
        bounded("tokens", tokens, "A batch holds at least one position; None does not bound them.")


def cut(order: Iterable[int], lengths: Sequence[int], size: int, tokens: int | None) -> list[list[int]]:
    """Batches in this order, each as full as the bounds allow.

    Raises:
        ValueError: a request alone is longer than `tokens`.
    """
    batches: list[list[int]] = []
    longest = 0
    for place in order:
        longest = max(longest, lengths[place])
        if tokens is not None and lengths[place] > tokens:
            raise ValueError(
                f"a request must have at most tokens = {tokens} positions, got {lengths[place]} in request {place}. "
                "Raise tokens, or leave it out."
            )
        full = not batches or len(batches[-1]) == size
        if full or (tokens is not None and longest * (len(batches[-1]) + 1) > tokens):
            batches.append([])
            longest = lengths[place]
        batches[-1].append(place)
    return batches
