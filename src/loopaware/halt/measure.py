"""What halting rules look at, for each row: how far the state moved, and what the head reads in it.

In: states, rows. Out: one number for each row, over its real positions. Deliberately elsewhere: thresholds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loopaware import tree
from loopaware.protocols import Rows, State, Verdict

Head = Callable[[State], Tensor]


def sizes(old: State, new: State, rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """|h_t - h_{t-1}| and |h_t| of every position, leaf by leaf: Euclidean norms over the features.

    Shapes: leaves (*rows, ..., d) -> (*rows, ...); a leaf of row axes alone has no features and keeps its shape.
    """

    def size(leaf: Tensor) -> Tensor:
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        return torch.linalg.vector_norm(leaf, dim=-1) if leaf.ndim > rows.axes else leaf.abs()

    pairs = zip(tree.leaves(old), tree.leaves(new), strict=True)
    return [(size(after - before), size(after)) for before, after in pairs]


def change(old: State, new: State, rows: Rows) -> Tensor:
    """The largest relative change of a row's positions: max |h_t - h_{t-1}| / |h_t|. Shapes: -> (*rows)."""
    return relative(sizes(old, new, rows), rows)


def changes(old: State, new: State, rows: Rows) -> tuple[Tensor, Tensor]:
    """The largest relative change of a row's positions, and the largest absolute one. Shapes: -> (*rows) each."""
    pairs = sizes(old, new, rows)
    return relative(pairs, rows), torch.stack([rows.largest(moved) for moved, _ in pairs]).amax(0)


def relative(pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
    """The largest of |h_t - h_{t-1}| / |h_t| in each row, from `sizes`."""
    return torch.stack([rows.largest(moved / size.clamp(min=1e-12)) for moved, size in pairs]).amax(0)


def log_probabilities(head: Head, state: State) -> Tensor:
    """The head's log-probabilities, in at least float32. Shapes: state -> (*rows, ..., classes)."""
    logits = head(state)
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def wide(tensor: Tensor) -> Tensor:
    """In at least float32: halting probabilities are summed, and half precision would lose some."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def hard(stop: Tensor, score: Tensor) -> Verdict:
    """The verdict of a rule whose whole weight is on the step at which it stops."""
    return Verdict(stop, wide(stop.to(score.dtype)), score)


def closed(weight: Tensor, stop: Tensor, spent: Tensor) -> Tensor:
    """The weight of a step, or, where the row stops, all that is not yet spent. Shapes: (*rows) each."""
    return torch.where(stop, (1 - spent).clamp(min=0), weight)


def combined(first: Verdict, stop: Tensor, spent: Tensor) -> tuple[Verdict, Tensor]:
    """The verdict of a rule that stops for other reasons than `first`, the rule inside, and what is spent after it.

    Until the row stops its steps weigh what `first` gave them; what `first` kept for its own last step waits for the
    row's. Rules without soft weights so put all on the step at which the row stops.
    """
    weight = closed(wide(first.weight * ~first.stop), stop, spent)
    return Verdict(stop, weight, first.score), spent + weight
