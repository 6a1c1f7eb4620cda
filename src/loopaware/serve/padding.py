"""One batch from requests of unequal length, and the way back.

In: requests, each a tensor that leads with its positions, or a mapping with such an `x` and a `mask` of what may be
attended to. Out: one padded batch, and which of its positions are real. Deliberately elsewhere: which requests go
together (`loopaware.serve.batching`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopaware import tree

Request = Tensor | Mapping[str, Tensor]
"""A sequence of T positions: x (T, ...), or {"x": (T, ...), "mask": (T) or (T, T) bool, True = may be attended to}."""


def length(request: Request) -> int:
    """How many positions a request has. Shapes: x (T, ...) -> T.

    Raises:
        TypeError, ValueError: it is no request, or is empty.
    """
    x = tree.content(request)
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(
            f"a request must lead with at least one position, got shape {tuple(x.shape)}. Leave empty ones out."
        )
    return len(x)


def padded(requests: Sequence[Request]) -> tuple[Any, Tensor]:
    """Requests side by side, zeros behind the shorter ones, and which positions are real.

    Nobody may attend to padding. In a mask of pairs a padded position attends to itself, so that a softmax has
    something to look at.

    Shapes: N of (T_i, ...) -> (N, T, ...), and (N, T) bool, True = real; T is the largest T_i.

    Raises:
        TypeError, ValueError: no requests, requests of several kinds, shapes or types, an entry other than `x` and
            `mask`.

    >>> batch, real = padded([torch.tensor([1, 2, 3]), torch.tensor([4])])
    >>> batch, real
    (tensor([[1, 2, 3],
            [4, 0, 0]]), tensor([[ True,  True,  True],
            [ True, False, False]]))
    """
    if not requests:
        raise ValueError("requests must be at least one, got none. An empty batch has no shape.")
    lengths = [length(request) for request in requests]
    contents = [tree.content(request) for request in requests]
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    real = real.to(contents[0].device)
    names = [set(request) if isinstance(request, Mapping) else None for request in requests]
    if any(other != names[0] for other in names) or not (names[0] or set()) <= {"x", "mask"}:
        kinds = sorted({"a tensor" if name is None else str(sorted(name)) for name in names})
        raise ValueError(
            f"requests must all be tensors, or all have the entries 'x' and, if any, 'mask', got {', '.join(kinds)}. "
            "Other entries cannot be padded."
        )
    x = filled(contents, max(lengths))
    if names[0] is None:
        return x, real
    return {"x": x, **({"mask": masks(requests, lengths, real)} if "mask" in names[0] else {})}, real


def unpadded(value: Any, real: Tensor) -> list[Any]:
    """The rows of a padded batch without their padding, one for each request.

    Shapes: leaves (N, T, ...), real (N, T) bool -> N trees with leaves (T_i, ...).

    Raises:
        ValueError: a leaf does not lead with (N, T).

    >>> unpadded(*padded([torch.tensor([1, 2, 3]), torch.tensor([4])]))
    [tensor([1, 2, 3]), tensor([4])]
    """
    for leaf in tree.leaves(value):
        if leaf.shape[:2] != real.shape:
            raise ValueError(
                f"a padded value must lead with {tuple(real.shape)}, got {tuple(leaf.shape)}. "
                "Say pooled=True to encode where a request has one answer for all its positions."
            )
    lengths = real.sum(1).tolist()
    return [tree.map(lambda leaf, i=i, end=end: leaf[i, :end], value) for i, end in enumerate(lengths)]


def filled(tensors: Sequence[Tensor], size: int) -> Tensor:
    """Tensors of unequal length in one, zeros behind. Shapes: N of (T_i, ...) -> (N, size, ...)."""
    first = tensors[0]
    found = {(tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors}
    if len(found) > 1:
        raise ValueError(
            f"requests must agree in features and type, got {', '.join(map(str, sorted(found, key=str)))}. "
            "Only their lengths may differ."
        )
    batch = first.new_zeros(len(tensors), size, *first.shape[1:])
    for row, tensor in zip(batch, tensors, strict=True):
        row[: len(tensor)] = tensor
    return batch


def masks(requests: Sequence[Request], lengths: Sequence[int], real: Tensor) -> Tensor:
    """What may be attended to. Shapes: N of (T_i) or (T_i, T_i) -> (N, T) or (N, T, T) bool."""
    given = [request["mask"] for request in requests if isinstance(request, Mapping)]
    axes = given[0].ndim
    for mask, size in zip(given, lengths, strict=True):
        if axes not in (1, 2) or mask.shape != (size,) * axes or mask.dtype != torch.bool:
            raise ValueError(
                f"a request's mask must be boolean, ({size}) or ({size}, {size}) and of one kind for all requests, got "
                f"{tuple(mask.shape)} of {mask.dtype}. True may be attended to."
            )
    if axes == 1:
        return filled(given, real.shape[1])
    batch = torch.diag_embed(~real)
    for row, mask in zip(batch, given, strict=True):
        row[: len(mask), : len(mask)] = mask
    return batch
