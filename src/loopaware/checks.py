"""The checks that stand between bad input and a loop: each raises one error that names the value and the remedy.

In: values from users. Out: the value, or the error. Deliberately elsewhere: run-time facts such as a state that
turns infinite, which `execute` sees.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loopaware import tree


def bounded(what: str, value: Any, remedy: str, least: int = 1) -> int:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, got {value!r}. {remedy}")
    if value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}. {remedy}")
    return value


def between(what: str, value: float, low: float, high: float, remedy: str) -> float:
    """A finite number with low < value <= high."""
    if not (math.isfinite(value) and low < value <= high):
        raise ValueError(f"{what} must be above {low} and at most {high}, got {value}. {remedy}")
    return value


def row_shape(state: Any, rows: int) -> torch.Size:
    """The shape of the row axes, which every leaf of the state shares."""
    leaves = tree.leaves(state)
    if not leaves:
        raise TypeError(f"a state must hold a tensor, got {type(state).__name__}. Let init return a tensor or a tree.")
    shape = leaves[0].shape[:rows]
    if any(leaf.ndim < rows or leaf.shape[:rows] != shape for leaf in leaves):
        raise ValueError(
            f"every tensor of the state must lead with the same {rows} row axes, got {tree.describe(state)}. "
            "Give `rows` the number of leading axes that halt by themselves."
        )
    return shape


def real_positions(mask: Tensor | None, state: Any, rows: int) -> Tensor | None:
    """A mask of the leading axes of the state, at least the row axes, which all of its tensors share; True = real."""
    row_shape(state, rows)
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean with True = real, got {mask.dtype}. Pass mask.bool().")
    leaf = tree.leaves(state)[0]
    if not rows <= mask.ndim <= leaf.ndim or mask.shape != leaf.shape[: mask.ndim]:
        raise ValueError(
            f"mask must have the shape of the first {rows} or more axes of the state {tuple(leaf.shape)}, "
            f"got {tuple(mask.shape)}. True marks what is real, False padding."
        )
    return mask


def same_shape(proposal: Any, state: Any) -> Any:
    """The proposal in the state's dtype, if it has the state's structure and shapes."""
    if isinstance(proposal, Tensor) and isinstance(state, Tensor) and proposal.shape == state.shape:
        return proposal.to(state.dtype)
    if tree.describe(proposal) != tree.describe(state):
        raise ValueError(
            f"the body's proposal must have the shape of the state {tree.describe(state)}, "
            f"got {tree.describe(proposal)}. Project inside the body, or start from init.Projected or init.Zeros(dim)."
        )
    return tree.map(lambda new, old: new.to(old.dtype), proposal, state)


def shown(part: Any) -> str:
    """A part in a repr or a message: a function by its name, everything else as it shows itself, on one line."""
    return getattr(part, "__qualname__", None) or " ".join(repr(part).split())


def logits(rule: Any, user: str) -> Any:
    """A rule whose score is a logit that can be taught."""
    if not rule.learned:
        raise ValueError(
            f"the rule in {user} must be learned, its score a logit, got {shown(rule)}. "
            "Take halt.Linear(dim) or halt.Residual()."
        )
    return rule


def keeps(body: Any, update: Any) -> bool:
    """Whether stopped rows are as they were after a step without being put back: body and update leave them alone."""
    return getattr(body, "keeps", False) is True and getattr(update, "takes_proposal", False)


def fitting(loop: Any) -> None:
    """Refuse pairs of parts that cannot work together, by the traits they declare."""
    if loop.halt.learned and not loop.grad.complete:
        raise ValueError(
            f"grad must differentiate every step when halting is learned, got {loop.grad!r} with {loop.halt!r}. "
            "The halting head would learn nothing: take grad.Full(), grad.Checkpointed() or a rule without parameters."
        )
    if loop.readout.weighted and loop.grad.final:
        raise ValueError(
            f"readout must return the last state when no other carries a gradient, got {loop.readout!r} "
            f"with {loop.grad!r}. Take readout.Last(), or grad.Full()."
        )
    if getattr(loop.grad, "inverts", False):
        invertible(loop)
    if loop.halt.mixes and not loop.readout.weighted:
        raise ValueError(
            f"readout must see the halting weights when they are spread over the steps, got {loop.readout!r} "
            f"with {shown(loop.halt)}. The last state alone teaches the rule nothing: take readout.Weighted()."
        )


def invertible(loop: Any) -> None:
    """Refuse loops whose steps cannot be undone."""
    if not hasattr(loop.body, "inverse"):
        raise ValueError(
            f"body must have an inverse for {loop.grad!r}, got {type(loop.body).__name__}. "
            "Take body.Coupled(first, second), or grad.Checkpointed()."
        )
    if not getattr(loop.update, "takes_proposal", False):
        raise ValueError(
            f"update must take the body's proposal as it is for {loop.grad!r}, got {shown(loop.update)}. "
            "Take update.Replace(), or grad.Checkpointed()."
        )
    if getattr(loop.execute, "gathers", False):
        raise ValueError(
            f"execute must run all rows for {loop.grad!r}, got {shown(loop.execute)}. A step of some rows draws other "
            "random numbers than its inverse: take execute.Eager(), or grad.Checkpointed()."
        )
