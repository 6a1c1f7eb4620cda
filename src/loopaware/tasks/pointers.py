"""Pointer chasing: every node points to another one or is a root; which colour has the root that a node leads to?

In: how many problems, how many hops, a generator. Out: a batch of `Pointers`, made for all problems at once. There are
four trees of the same depth, so that three roots distract and neither the colours nor the depths tell the answer: each
hop must be made. Deliberately elsewhere: nets and losses (`loopaware.recipes.chase`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopaware.checks import bounded

ROOTS = 4
"""Trees of a problem, one of them the start's; also the number of colours."""

NONE = ROOTS
"""The colour of a node that is no root."""


class Pointers(NamedTuple):
    """A batch of problems.

    Shapes: pointer, depth, label (B, n) long: whom a node points to (a root to itself), how many hops its root is away,
    and that root's colour; colour (B, n) long, a root's colour or NONE; start (B) long, the node that is asked about.
    """

    pointer: Tensor
    colour: Tensor
    start: Tensor
    depth: Tensor
    label: Tensor


def sample(count: int, hops: int, *, generator: torch.Generator, spare: int = 4) -> Pointers:
    """Draw four chains of `hops` hops to four roots of different colours, with further nodes hung in anywhere.

    Every problem has 4 (hops + 1) + spare nodes. The start is the end of the first chain; nodes are then shuffled.

    Args:
        hops: from the start to its root, and of every other chain.
        spare: nodes that point to a random node less deep than the start; with hops = 0 there are none.

    Raises:
        ValueError: a number is out of range.

    >>> batch = sample(5, 3, generator=torch.Generator().manual_seed(0))
    >>> batch.pointer.shape, batch.depth.amax(-1).tolist()
    (torch.Size([5, 20]), [3, 3, 3, 3, 3])
    """
    bounded("count", count, "Draw at least one problem.")
    bounded("hops", hops, "0 asks for the colour of a root itself.", least=0)
    bounded("spare", spare, "0 leaves the four chains alone.", least=0)
    pointer, depth, tree = chained(count, hops)
    for _ in range(spare if hops else 0):
        pointer, depth, tree = hung(pointer, depth, tree, hops, generator)
    colours = torch.rand(count, ROOTS, generator=generator).argsort(-1)
    label = colours.gather(-1, tree)
    order = torch.rand(pointer.shape, generator=generator).argsort(-1)  # who stands at each place
    place = order.argsort(-1)
    depth, label = depth.gather(-1, order), label.gather(-1, order)
    pointer = place.gather(-1, pointer.gather(-1, order))
    return Pointers(pointer, label.where(depth == 0, NONE), place[:, hops], depth, label)


def held_out(count: int, hops: int, *, seed: int = 0) -> Pointers:
    """The test set for a number of hops, by a generator of its own.

    >>> held_out(2, 16).pointer.shape
    torch.Size([2, 72])
    """
    return sample(count, hops, generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + hops))


def right(logits: Tensor, pointers: Pointers) -> Tensor:
    """The measure: whether the start has its root's colour. Shapes: logits (..., B, n, ROOTS) -> (..., B) bool.

    >>> batch = held_out(2, 3)
    >>> right(torch.nn.functional.one_hot(batch.label, ROOTS), batch)
    tensor([True, True])
    """
    hit = logits.argmax(-1) == pointers.label
    return hit.gather(-1, pointers.start[:, None].expand(*hit.shape[:-1], 1))[..., 0]


def chained(count: int, hops: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pointer, depth and tree of the nodes of four chains, each from its root to its end. Shapes: -> (count, n)."""
    node = torch.arange(ROOTS * (hops + 1))
    depth, tree = node % (hops + 1), node // (hops + 1)
    pointer = (node - 1).where(depth > 0, node)
    return pointer.repeat(count, 1), depth.repeat(count, 1), tree.repeat(count, 1)


def hung(pointer: Tensor, depth: Tensor, tree: Tensor, hops: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """One node more, pointing to a random one that is less deep than `hops`."""
    above = torch.multinomial((depth < hops).float(), 1, generator=generator)
    new = above, depth.gather(-1, above) + 1, tree.gather(-1, above)
    return tuple(torch.cat(pair, -1) for pair in zip((pointer, depth, tree), new, strict=True))
