"""Which layers to repeat: how far a group of layers turns the state, and what running it twice does to the prediction.

In: a looped model of all layers, tokens. Out: a line for each group of neighbouring layers. Deliberately elsewhere: the
conversion (`loopaware.convert.dense`).

References: A. Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv 2403.17887 (angular
distance between what goes into a group and what comes out); X. Men et al., "ShortGPT: Layers in Large Language Models
are More Redundant Than You Expect", 2024, arXiv 2403.03853 (block influence, one minus the cosine of the same two).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from transformers import PreTrainedModel

from loopaware.checks import bounded
from loopaware.convert.dense import Split, looped
from loopaware.lm import Layers
from loopaware.models.looped_encoder import LoopedEncoder, LoopedForMaskedLM


class Group(NamedTuple):
    """Neighbouring layers, and what they do to a text.

    Args:
        first: number of the first layer.
        size: how many there are.
        angle: between the state before and behind them, in half turns, the mean over tokens: 0 is the same direction.
        influence: one minus the cosine of that angle, the mean over tokens.
        divergence: of the prediction when they run twice from that when they run once, KL in nats, the mean over
            tokens; not a number for models without a head.
    """

    first: int
    size: int
    angle: float
    influence: float
    divergence: float

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.size)


@torch.no_grad()
def groups(dense: PreTrainedModel, tokens: Tensor, size: int, *, prelude: int = 1, coda: int = 1) -> list[Group]:
    """Every group of `size` neighbouring layers that leaves at least so many before and behind it.

    Args:
        tokens: a text like those that the model is for; random tokens say less.
        prelude: layers at the beginning that are left out, `coda` at the end; both do other work than those between.

    Shapes: tokens (B, T) long.

    Raises:
        ValueError: no group is left.
    """
    layers = dense.config.num_hidden_layers
    bounded("size", size, "It counts layers.")
    if layers - prelude - coda < size:
        raise ValueError(
            f"size must be at most the {layers - prelude - coda} layers between prelude and coda, got {size}. Take "
            "smaller groups."
        )
    run = Run(dense, tokens)
    once = run.predicted(run.states[-1])
    found = []
    for first in range(prelude, layers - coda - size + 1):
        before, behind = run.states[first], run.states[first + size]
        twice = run.through(run.through(behind, first, first + size), first + size, layers)
        cosine = cosine_similarity(before.float(), behind.float(), dim=-1).clamp(-1, 1)
        angle, influence = (cosine.acos() / math.pi).mean().item(), (1 - cosine).mean().item()
        found.append(Group(first, size, angle, influence, divergence(once, run.predicted(twice))))
    return found


def least(found: list[Group], by: str) -> Group:
    """The most loopable group, by similarity of the state or by what repetition does to the prediction.

    Raises:
        ValueError: it is asked of a model without a prediction.
    """
    if by == "similarity":
        return min(found, key=lambda group: group.angle)
    if any(math.isnan(group.divergence) for group in found):
        raise ValueError("layers must be chosen by similarity in a model without a head, got repetition. Choose that.")
    return min(found, key=lambda group: group.divergence)


class Run:
    """One pass of a model over a text, layer by layer. Shapes: states (B, T, D), the first before all layers."""

    def __init__(self, dense: PreTrainedModel, tokens: Tensor):
        layers = dense.config.num_hidden_layers
        model: Any = looped(dense, Split((), tuple(range(layers)), ())).eval()
        inside = model.encoder if isinstance(model, LoopedForMaskedLM) else model
        self.model, self.core = model, inside.core
        if isinstance(inside, LoopedEncoder):
            context, self.attention, _ = inside.surroundings(tokens)
        else:
            context, self.attention, _ = inside.surroundings(tokens, None, None, None, False)
        self.states = [context["x"]]
        for number in range(layers):
            self.states.append(self.through(self.states[-1], number, number + 1))

    def through(self, state: Tensor, first: int, last: int) -> Tensor:
        """Some layers, `last` not among them."""
        kinds = self.core.kinds
        part = Layers(self.core.layers[first:last], None if kinds is None else kinds[first:last])
        return part.run(state, self.attention)

    def predicted(self, state: Tensor) -> Tensor | None:
        """Logits, if there is a head."""
        if isinstance(self.model, LoopedForMaskedLM):
            return self.model.head(state)
        if isinstance(self.model, LoopedEncoder):
            return None
        return self.model.lm_head(self.model.behind(state, self.attention))


def divergence(one: Tensor | None, other: Tensor | None) -> float:
    """KL(one || other) of predictions, in nats, the mean over tokens. Shapes: (B, T, V)."""
    if one is None or other is None:
        return math.nan
    wanted, given = (logits.float().log_softmax(-1) for logits in (one, other))
    return kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mean().item()
