"""The one place where tolerances live: how equal is equal, by dtype."""

from __future__ import annotations

from typing import Any

import torch

from loopaware import tree

TOLERANCES = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}


def assert_close(actual: Any, expected: Any, law: str) -> None:
    """Two trees are equal within the tolerance of their dtype; booleans and integers exactly.

    Raises:
        AssertionError: they are not; begins with the law.

    >>> assert_close(torch.ones(2), torch.ones(2) + 1e-9, "nothing moved")
    """
    assert tree.describe(actual) == tree.describe(expected), (
        f"{law}: shapes {tree.describe(actual)}, expected {tree.describe(expected)}"
    )
    for one, other in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
        rtol, atol = TOLERANCES.get(one.dtype, (0.0, 0.0))
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda text: f"{law}: {text}")


def rows_of(value: Any, start: int, stop: int, axis: int = 0) -> Any:
    """A slice of the batch of a tree."""
    return tree.map(lambda leaf: leaf.narrow(axis, start, stop - start), value)


def batch_size(value: Any) -> int:
    return tree.leaves(value)[0].shape[0]
