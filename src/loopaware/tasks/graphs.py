"""Graph distances: is each node an even or an odd number of edges away from the source, or out of its reach?

In: how many graphs, of how many nodes, how far the farthest node is, a generator. Out: a batch of `Graphs`, made for
all graphs at once. An answer needs as many rounds of looking at neighbours as the farthest node is away, so the depth a
net needs is known for every graph. Deliberately elsewhere: nets and losses (`loopaware.recipes.distances`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopaware.checks import bounded

UNREACHABLE, EVEN, ODD = 0, 1, 2
"""The classes of nodes."""


class Graphs(NamedTuple):
    """A batch of graphs, each with one source.

    Shapes: source, mask (B, n) bool, mask False at padding; adjacency (B, n, n) bool, symmetric, with self loops;
    labels (B, n) long, one of UNREACHABLE, EVEN, ODD; distances (B, n) long, -1 out of reach; eccentricity (B,) long,
    the largest distance from the source.
    """

    source: Tensor
    adjacency: Tensor
    labels: Tensor
    distances: Tensor
    eccentricity: Tensor
    mask: Tensor


def sample(
    count: int,
    nodes: int,
    eccentricity: tuple[int, int],
    *,
    generator: torch.Generator,
    extra: float = 1.0,
    unreachable: float = 0.5,
) -> Graphs:
    """Draw connected layers around a source, and layers that look the same but are cut off from it.

    Every graph draws its eccentricity, and how many nodes are out of reach. A node of layer k is tied to a random node
    of layer k - 1; further edges tie nodes of the same or neighbouring layers. Nodes are then shuffled, so that their
    order tells nothing.

    Args:
        count: how many graphs.
        nodes: of each graph.
        eccentricity: the smallest and the largest, both included, drawn evenly.
        generator: where random numbers come from; on the CPU.
        extra: further edges of a node, at most, on average.
        unreachable: the largest share, of the nodes that are not needed to fill the layers, that is out of reach.

    Raises:
        ValueError: eccentricities that the nodes are too few for, or a number out of range.

    >>> batch = sample(3, 16, (4, 9), generator=torch.Generator().manual_seed(0))
    >>> batch.labels.shape, bool((batch.distances.amax(-1) == batch.eccentricity).all())
    (torch.Size([3, 16]), True)
    """
    low, high = checked(count, nodes, eccentricity, extra, unreachable)
    farthest = torch.randint(low, high + 1, (count, 1), generator=generator)
    layer, cut_off = layers(farthest, nodes, unreachable, generator)
    edges = tied(layer, cut_off, generator) | scattered(layer, cut_off, extra, generator)
    order = torch.rand(count, nodes, generator=generator).argsort(-1)
    adjacency = (edges | edges.mT | torch.eye(nodes, dtype=torch.bool)).gather(1, order[..., None].expand_as(edges))
    return labelled(order == 0, adjacency.gather(2, order[:, None].expand_as(edges)))


def held_out(count: int, nodes: int, *, seed: int = 0) -> Graphs:
    """The test set for a size: eccentricities from 2 to half the nodes, drawn evenly, by a generator of its own.

    >>> int(held_out(500, 64).eccentricity.max())
    32
    """
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + nodes)
    return sample(count, nodes, (min(2, nodes - 1), max(nodes // 2, 1)), generator=generator)


def labelled(source: Tensor, adjacency: Tensor, mask: Tensor | None = None) -> Graphs:
    """A batch from its graphs alone: distances and labels are found by search. Shapes: as in `Graphs`."""
    distances = search(source, adjacency)
    labels = torch.where(distances < 0, UNREACHABLE, torch.where(distances % 2 == 0, EVEN, ODD))
    mask = torch.ones_like(source) if mask is None else mask
    return Graphs(source, adjacency, labels, distances, distances.amax(-1), mask)


def search(source: Tensor, adjacency: Tensor) -> Tensor:
    """Breadth first, all graphs at once: how many edges each node is away from the source, -1 out of reach.

    Shapes: source (B, n) bool, adjacency (B, n, n) bool -> (B, n) long.

    >>> path = torch.tensor([[[0, 1, 0], [1, 0, 0], [0, 0, 0]]]).bool()
    >>> search(torch.tensor([[True, False, False]]), path)
    tensor([[ 0,  1, -1]])
    """
    distances = source.long() - 1
    edges, frontier, step = adjacency.float(), source, 0
    while bool(frontier.any()):
        step += 1
        frontier = (torch.bmm(edges.mT, frontier[..., None].float())[..., 0] > 0) & (distances < 0)
        distances = distances.masked_fill(frontier, step)
    return distances


def pack(parts: Sequence[Graphs]) -> Graphs:
    """One batch from several, of mixed sizes: padding stands behind the nodes of smaller graphs and sees only itself.

    >>> generator = torch.Generator().manual_seed(0)
    >>> pack([sample(2, size, (2, 3), generator=generator) for size in (5, 8)]).mask.sum(-1)
    tensor([5, 5, 8, 8])
    """
    size = max(part.source.shape[-1] for part in parts)
    grown = []
    for part in parts:
        more = size - part.source.shape[-1]
        adjacency = pad(part.adjacency, (0, more, 0, more)) | torch.eye(size, dtype=torch.bool)
        source, labels, mask = (pad(field, (0, more)) for field in (part.source, part.labels, part.mask))
        distances = pad(part.distances, (0, more), value=-1)
        grown.append(Graphs(source, adjacency, labels, distances, part.eccentricity, mask))
    return Graphs(*map(torch.cat, zip(*grown, strict=True)))


def right(logits: Tensor, graphs: Graphs) -> Tensor:
    """The measure: whether every real node of a graph has its class. Shapes: logits (..., B, n, 3) -> (..., B) bool.

    >>> graphs = held_out(2, 5)
    >>> right(torch.nn.functional.one_hot(graphs.labels, 3), graphs)
    tensor([True, True])
    """
    return ((logits.argmax(-1) == graphs.labels) | ~graphs.mask).all(-1)


def layers(farthest: Tensor, nodes: int, unreachable: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each node's layer, and whether it is cut off; node 0 is the source, nodes 1 to the eccentricity fill the layers.

    Shapes: farthest (B, 1) -> (B, nodes) long and bool.
    """
    count, node = len(farthest), torch.arange(nodes)
    spare = nodes - 1 - farthest
    share = unreachable * torch.rand(count, 1, generator=generator)
    cut_off = node >= nodes - (share * (spare + 1)).long().clamp(max=spare)
    drawn = 1 + (torch.rand(count, nodes, generator=generator) * farthest).long()
    return torch.where(node <= farthest, node, torch.minimum(drawn, farthest)), cut_off


def tied(layer: Tensor, cut_off: Tensor, generator: torch.Generator) -> Tensor:
    """An edge from each node to one of the layer before, if there is one. Shapes: (B, n) -> (B, n, n) bool."""
    before = (layer[:, :, None] == layer[:, None] + 1) & (cut_off[:, :, None] == cut_off[:, None])
    chosen = torch.rand(before.shape, generator=generator).masked_fill(~before, -1.0).argmax(-1)
    return torch.zeros_like(before).scatter(2, chosen[..., None], True) & before


def scattered(layer: Tensor, cut_off: Tensor, extra: float, generator: torch.Generator) -> Tensor:
    """Edges within layers and between neighbouring ones, `extra` for each node at most on average, none shortening."""
    near = ((layer[:, :, None] - layer[:, None]).abs() <= 1) & (cut_off[:, :, None] == cut_off[:, None])
    choices = near.sum(-1)
    chance = extra / torch.maximum(choices[:, :, None], choices[:, None])
    return near & (torch.rand(near.shape, generator=generator) < chance / 2)  # a pair is drawn in both directions


def checked(count: int, nodes: int, eccentricity: tuple[int, int], extra: float, unreachable: float) -> tuple[int, int]:
    """The range of eccentricities, if graphs can be drawn."""
    bounded("count", count, "Draw at least one graph.")
    bounded("nodes", nodes, "A graph has a source and something to reach.", least=2)
    low, high = eccentricity
    if not 1 <= low <= high <= nodes - 1:
        raise ValueError(
            f"eccentricity must be a range within 1 and nodes - 1 = {nodes - 1}, got {low} to {high}. "
            "Take more nodes or a smaller range."
        )
    if extra < 0 or not 0 <= unreachable <= 1:
        raise ValueError(
            f"extra must be at least 0 and unreachable from 0 to 1, got {extra} and {unreachable}. "
            "Take 0 for trees, or for graphs in which every node is within reach."
        )
    return low, high
