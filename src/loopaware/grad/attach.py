"""What gradient rules do to the graph besides running steps: links, packing, random numbers that come again.

In: carries. Out: carries. Deliberately elsewhere: the rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopaware import tree
from loopaware.protocols import Carry, State


def linked(out: Carry, start: Carry) -> Carry:
    """`out`, with a gradient of zero for whatever `start` came from.

    The rule has cut it off; so a learned start, an encoder in front of the loop and the like receive a zero, and not
    nothing, which data-parallel training would wait for and fail.
    """
    return grafted(out, out.state, start)


def grafted(out: Carry, state: State, start: Carry) -> Carry:
    """The values of `out`, its state with the graph of `state`, and a zero gradient for what `start` came from."""
    sources = [leaf for leaf in tree.leaves(start.state) if leaf.requires_grad]
    values, graph = tree.leaves(out.state), tree.leaves(state)
    fresh = iter(Grafted.apply(len(values), *(leaf.detach() for leaf in values), *graph, *sources))
    return out._replace(state=tree.map(lambda _: next(fresh), out.state))


class Grafted(torch.autograd.Function):
    """The first `count` tensors, with the gradient of the next `count`; zeros as the gradient of all others."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count = count
        ctx.shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors[2 * count :]]
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes]
        return None, *[None] * ctx.count, *gradients, *zeros


def differentiable(moving: Any) -> list[Tensor]:
    """The leaves that derivatives exist for."""
    return [leaf for leaf in tree.leaves(moving) if leaf.is_floating_point()]


def refilled(moving: Any, leaves: list[Tensor]) -> Any:
    """The tree with other differentiable leaves."""
    fresh = iter(leaves)
    return tree.map(lambda leaf: next(fresh) if leaf.is_floating_point() else leaf, moving)


def packed(leaves: list[Tensor]) -> Tensor:
    """One row of numbers for each sequence. Shapes: leaves (B, ...) -> (B, N)."""
    return torch.cat([leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None] for leaf in leaves], 1)


def unpacked(rows: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The leaves again. Shapes: (B, N) -> as `like`."""
    sizes = [leaf[0].numel() for leaf in like]
    return [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(rows.split(sizes, 1), like, strict=True)]


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the generators a body on `device` draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
