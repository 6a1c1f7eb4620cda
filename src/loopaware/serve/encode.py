"""Answers for a list of requests, batch by batch, each as if its request had been asked alone.

In: a model around a loop, requests of unequal length, a policy that puts batches together. Out: an answer for each
request, in their order. Deliberately elsewhere: padding and policies (`loopaware.serve.padding`, `batching`); whether
rows that have stopped leave their batch is the loop's own `execute`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopaware import tree
from loopaware.loop import Loop
from loopaware.protocols import Output
from loopaware.serve.batching import Policy
from loopaware.serve.padding import Request, padded, unpadded


class Encoded(NamedTuple):
    """The answer to one request.

    Shapes: value (T, ...), or (...) if pooled; steps, halted () if sequences halt by themselves, (T) if tokens do.
    """

    value: Any
    steps: Tensor
    halted: Tensor


def encode(
    model: Callable[..., Output], requests: Sequence[Request], policy: Policy, *, pooled: bool = False
) -> list[Encoded]:
    """Pad, run and take apart each batch of the policy; answers come in the order of the requests.

    No answer and no number of steps depends on the batch a request was in, to rounding, as long as the model's loop
    keeps the law of rows. No gradient is kept. For rows that leave the batch when they stop, give the loop
    `execute.Compacted()`; for free places that are filled again, `serve.Continuous(places)`.

    Args:
        model: a `Loop`, called with {"x", "mask"}, the mask being that of the request or hiding padding; or any other
            model, called as `model(batch, mask=real)` with a batch like its requests, for example a
            `models.UniversalEncoder`. Returns an `Output`.
        policy: such as `ByLength(32)`.
        pooled: the value is one for each request and not for each position.

    Raises:
        ValueError: the model is in training mode; the policy does not keep its law; the value does not lead with the
            shape of the batch.

    >>> loop = Loop(lambda state, context, index: state / 2, max_steps=3).eval()
    >>> from loopaware.serve import ByLength
    >>> [one.value.flatten().tolist() for one in encode(loop, [torch.ones(1, 1), 8 * torch.ones(2, 1)], ByLength(2))]
    [[0.125], [1.0, 1.0]]
    """
    if getattr(model, "training", False):
        raise ValueError(
            f"{type(model).__name__} must be in evaluation mode to answer requests, got training mode. "
            "Call model.eval(): dropout and rules that never stop are for training."
        )
    batches = policy(requests)
    if sorted(place for batch in batches for place in batch) != list(range(len(requests))) or [] in batches:
        raise ValueError(
            f"a policy must put each of {len(requests)} requests into exactly one batch, got {batches[:8]} from "
            f"{policy!r}. Mend the policy."
        )
    answers: dict[int, Encoded] = {}
    with torch.no_grad():
        for batch in batches:
            answers.update(zip(batch, answered(model, [requests[i] for i in batch], pooled), strict=True))
    return [answers[place] for place in range(len(requests))]


def answered(model: Callable[..., Output], requests: Sequence[Request], pooled: bool) -> list[Encoded]:
    """The answers of one batch."""
    batch, real = padded(requests)
    if isinstance(model, Loop):
        batch = {"mask": real, **(batch if isinstance(batch, Mapping) else {"x": batch})}
    out = model(batch, mask=real)
    values = apart(out.value, real, pooled)
    facts = apart((out.steps, out.halted), real, out.steps.ndim == 1)
    return [Encoded(value, steps, halted) for value, (steps, halted) in zip(values, facts, strict=True)]


def apart(value: Any, real: Tensor, whole: bool) -> list[Any]:
    """The rows of a batch: as they are, or without their padding. Shapes: leaves (N, ...) or (N, T, ...)."""
    if not whole:
        return unpadded(value, real)
    for leaf in tree.leaves(value):
        if leaf.shape[:1] != real.shape[:1]:
            raise ValueError(
                f"a pooled value must lead with the {len(real)} requests of its batch, got {tuple(leaf.shape)}. "
                "Take a readout that returns one state, such as readout.Last()."
            )
    return [tree.map(lambda leaf, i=i: leaf[i], value) for i in range(len(real))]
