"""Operations on a state: one tensor, or tuples, named tuples and dicts of tensors, nested at will.

In: any such tree. Out: a tree of the same structure. Leaves that are no tensors (None, numbers) are constants
and are left as they are. Every tensor of a tree leads with the row axes (see `loopaware.protocols`).
Deliberately elsewhere: what the leaves mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:  # noqa: A001 - the field's word
    """Apply `function` to every tensor of `tree`, together with the leaves at the same place in `others`.

    >>> map(lambda x: x + 1, (torch.zeros(2), {"h": torch.ones(1)}))
    (tensor([1., 1.]), {'h': tensor([2.])})
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, tuple):
        parts = [map(function, leaf, *(other[i] for other in others)) for i, leaf in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, Mapping):
        return {key: map(function, leaf, *(other[key] for other in others)) for key, leaf in tree.items()}
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, left to right.

    >>> [leaf.item() for leaf in leaves({"a": torch.tensor(1), "b": (torch.tensor(2), None)})]
    [1, 2]
    """
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    return [tensor for part in tree for tensor in leaves(part)] if isinstance(tree, tuple) else []


def expand(mask: Tensor, tensor: Tensor) -> Tensor:
    """View a mask of the leading axes so that it broadcasts against `tensor`."""
    return mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim))


def where(mask: Tensor, yes: Any, no: Any) -> Any:
    """Rows of `yes` where `mask` is True, of `no` elsewhere. Shapes: mask (*rows), leaves (*rows, ...).

    >>> where(torch.tensor([True, False]), torch.ones(2, 1), torch.zeros(2, 1)).flatten()
    tensor([1., 0.])
    """
    return map(lambda y, n: y if y is n else torch.where(expand(mask, y), y, n), yes, no)


def gather(index: Tensor, tree: Any) -> Any:
    """The rows `index` of every tensor, along the first axis. Shapes: index (k,), leaves (rows, ...) -> (k, ...)."""
    return map(lambda leaf: leaf.index_select(0, index), tree)


PER_SEQUENCE = ("x", "mask", "memory", "memory_mask")
"""Entries of a context that belong to sequences if their first axis is the batch."""


def among(index: Tensor, context: Any, batch: int, shared: tuple[str, ...] | None = None, name: str = "x") -> Any:
    """The context of some sequences: what leads with the batch is gathered, everything else is shared by all.

    `shared` names the entries of mappings that lead with the batch by chance; given, even empty, it is believed. A
    thing with a method `among(index)` is asked for its own part.

    Shapes: index (k); tensors (batch, ...) -> (k, ...), others as they are.

    Raises:
        ValueError: a tensor could be either, because it is a square of the batch's size.
        TypeError: the context is a thing whose tensors are not seen.

    >>> among(torch.tensor([1]), {"x": torch.arange(2), "table": torch.zeros(5)}, batch=2)
    {'x': tensor([1]), 'table': tensor([0., 0., 0., 0., 0.])}
    """
    if isinstance(context, Mapping):
        return {
            key: leaf if key in (shared or ()) else among(index, leaf, batch, shared, key)
            for key, leaf in context.items()
        }
    if isinstance(context, tuple):
        parts = [among(index, leaf, batch, shared, name) for leaf in context]
        return type(context)(*parts) if hasattr(context, "_fields") else tuple(parts)
    if not isinstance(context, Tensor):
        if context is None or isinstance(context, bool | int | float | str):
            return context
        if callable(getattr(context, "among", None)):
            return context.among(index)
        raise TypeError(
            f"a context must be made of tensors, tuples and mappings where sequences leave the batch, got "
            f"{type(context).__name__} in {name!r}. Pass a mapping, give it a method `among(index)`, or take "
            "execute.Eager()."
        )
    if batch == 1 or context.ndim == 0 or context.shape[0] != batch:
        return context
    if shared is None and name not in PER_SEQUENCE and context.shape == (batch, batch):
        raise ValueError(
            f"the context's {name!r} must not be square and of the batch's size, got {tuple(context.shape)}. If all "
            f"sequences share it, say execute.Compacted(shared=({name!r},)); if each has a row, say shared=()."
        )
    return context.index_select(0, index)


def detach(tree: Any) -> Any:
    """The same values, cut from the graph."""
    return map(Tensor.detach, tree)


def finite(tree: Any) -> Tensor:
    """Whether every floating-point number is finite; a scalar tensor, so that reading it is the caller's choice."""
    # The largest size is nan or infinite if a number is; found in a tenth of the time of looking at each.
    floats = [leaf.detach() for leaf in leaves(tree) if leaf.is_floating_point() and leaf.numel()]
    found = [leaf.abs().amax() < math.inf for leaf in floats]
    if len(found) == 1:
        return found[0]
    return torch.stack(found).all() if found else torch.tensor(True)


def only(tree: Any, user: str) -> Tensor:
    """The one tensor of a state that is a single tensor.

    Raises:
        TypeError: the state has several tensors, so `user` cannot know which one is meant.
    """
    if isinstance(tree, Tensor):
        return tree
    raise TypeError(
        f"the state read by {user} must be one tensor, got {type(tree).__name__}. "
        "Give the part a `read` function that picks the tensor out of the state."
    )


def content(context: Any) -> Tensor:
    """The input `x` of a context: the context itself if it is a tensor, else its entry "x".

    Raises:
        TypeError: the context is neither.
    """
    if isinstance(context, Tensor):
        return context
    if isinstance(context, Mapping) and isinstance(context.get("x"), Tensor):
        return context["x"]
    raise TypeError(
        f"a context must be a tensor or a mapping with a tensor under 'x', got {type(context).__name__}. "
        "Pass the input as loop(x) or loop({'x': x, 'mask': mask})."
    )


def describe(tree: Any) -> Any:
    """The shapes of a tree, for messages."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape)
    if isinstance(tree, Mapping):
        return {key: describe(leaf) for key, leaf in tree.items()}
    return tuple(describe(leaf) for leaf in tree) if isinstance(tree, tuple) else tree
