"""Graph distances: labels are those of a plain breadth-first search, and graphs are as they were asked for."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from loopaware.tasks import graphs


def plain(adjacency: list[list[bool]], source: int) -> list[int]:
    """Breadth first, one graph, in plain Python."""
    distances, waiting = {source: 0}, deque([source])
    while waiting:
        node = waiting.popleft()
        for other, tied in enumerate(adjacency[node]):
            if tied and other not in distances:
                distances[other] = distances[node] + 1
                waiting.append(other)
    return [distances.get(node, -1) for node in range(len(adjacency))]


@pytest.mark.parametrize(("nodes", "farthest"), [(2, (1, 1)), (3, (1, 2)), (16, (4, 14)), (63, (2, 31))])
def test_labels_are_those_of_a_plain_search(nodes, farthest):
    batch = graphs.sample(31, nodes, farthest, generator=torch.Generator().manual_seed(0))
    for one in range(31):
        expected = plain(batch.adjacency[one].tolist(), int(batch.source[one].long().argmax()))
        assert batch.distances[one].tolist() == expected
        assert batch.eccentricity[one].item() == max(expected)
        classes = [graphs.UNREACHABLE if d < 0 else (graphs.ODD if d % 2 else graphs.EVEN) for d in expected]
        assert batch.labels[one].tolist() == classes
    assert batch.source.sum(-1).eq(1).all() and batch.mask.all()
    assert torch.equal(batch.adjacency, batch.adjacency.mT) and batch.adjacency.diagonal(dim1=1, dim2=2).all()


def test_eccentricities_are_drawn_evenly_and_some_nodes_are_out_of_reach():
    batch = graphs.sample(3000, 16, (4, 14), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(batch.eccentricity, minlength=16)
    assert counts[4:15].min() > 200 and counts[:4].sum() == counts[15:].sum() == 0
    assert 0.05 < (batch.labels == graphs.UNREACHABLE).float().mean() < 0.3


def test_the_order_of_nodes_tells_nothing():
    batch = graphs.sample(4000, 8, (2, 5), generator=torch.Generator().manual_seed(0))
    assert torch.bincount(batch.source.long().argmax(-1), minlength=8).float().std() < 50
    assert batch.distances.float().mean(0).std() < 0.08


def test_graphs_depend_on_the_generator_alone():
    first, again = (graphs.sample(5, 16, (4, 9), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(
        torch.equal(one, other) for one, other in zip(graphs.held_out(3, 16), graphs.held_out(3, 16), strict=True)
    )


def test_packed_graphs_are_padded_with_nodes_that_see_themselves_alone():
    small, large = graphs.held_out(2, 5), graphs.held_out(3, 9)
    both = graphs.pack([small, large])
    assert both.mask.sum(-1).tolist() == [5, 5, 9, 9, 9]
    assert torch.equal(both.adjacency[:2, 5:, :5], torch.zeros(2, 4, 5, dtype=torch.bool))
    assert both.adjacency[:2].diagonal(dim1=1, dim2=2).all()
    assert torch.equal(both.labels[:2, :5], small.labels) and torch.equal(both.labels[2:], large.labels)


def test_a_graph_is_right_if_every_real_node_is():
    both = graphs.pack([graphs.held_out(2, 5), graphs.held_out(1, 9)])
    logits = torch.nn.functional.one_hot(both.labels, 3).float()
    logits[0, 7] = 9 - logits[0, 7]
    assert graphs.right(logits, both).tolist() == [True, True, True]
    logits[1, 2] = -logits[1, 2]
    assert graphs.right(logits, both).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 16, (2, 3)), {}, "count must be at least 1, got 0"),
        ((1, 1, (1, 1)), {}, "nodes must be at least 2, got 1"),
        ((1, 16, (2, 16)), {}, "eccentricity must be a range within 1 and nodes - 1 = 15, got 2 to 16"),
        ((1, 16, (5, 4)), {}, "eccentricity must be a range .* got 5 to 4"),
        ((1, 16, (2, 3)), {"extra": -1.0}, "extra must be at least 0 and unreachable from 0 to 1, got -1.0 and 0.5"),
        ((1, 16, (2, 3)), {"unreachable": 2.0}, "got 1.0 and 2.0"),
    ],
)
def test_graphs_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        graphs.sample(*arguments, generator=torch.Generator(), **options)
