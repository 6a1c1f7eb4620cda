"""What a loop returns: the last state, a mix of all, or every one.

In: after each step the state, the verdict and which rows took the step. Out: the value. What a fold collects is in the
carry, so a loop may be cut anywhere: folding in two pieces equals folding in one. Deliberately elsewhere: the weights
(`loopaware.halt`), and recordings for people (`loopaware.observe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopaware import tree
from loopaware.protocols import Carry, Memory, Rows, State, Verdict

__all__ = ["Every", "Last", "Stacked", "Tensor2Tensor", "Weighted"]


@dataclass(frozen=True)
class Last:
    """The state in which each row stopped: value = h_T.

    The default. With a rule whose weights are all on the exit step it equals Weighted and costs nothing.

    >>> Last().fold(None, None, None, None) is None
    True
    """

    weighted = False
    settles = True

    def start(self, state: State, rows: Rows) -> None: ...
    def fold(self, folded: None, state: State, verdict: Verdict | None, alive: Tensor | None) -> None: ...
    def finish(self, folded: None, carry: Carry) -> State:
        return carry.state


@dataclass(frozen=True)
class Weighted:
    """The mean of all states under the halting weights: value = sum_t p_t h_t + (1 - sum_t p_t) h_T.

    For rules with soft weights, as in ACT. What is missing to one goes to the last state, at the step cap too, so the
    weights of a row always sum to one.

    References: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983.

    >>> from loopaware import Loop
    >>> Loop(lambda state, context, index: state + 1, max_steps=3, readout=Weighted())(torch.zeros(1, 1)).value
    tensor([[3.]])
    """

    weighted = True
    settles = True

    def start(self, state: State, rows: Rows) -> Memory:
        return tree.map(blank, state), rows.zeros(state)

    def fold(self, folded: Memory, state: State, verdict: Verdict, alive: Tensor) -> Memory:
        return added(folded[0], verdict.weight, state), folded[1] + verdict.weight

    def finish(self, folded: Memory, carry: Carry) -> State:
        whole = added(folded[0], 1 - folded[1], carry.state)
        return tree.map(lambda sum_, h: sum_.to(h.dtype), whole, carry.state)


@dataclass(frozen=True)
class Tensor2Tensor:
    """tensor2tensor's recursive mix: value_t = p_t h_t + (1 - p_t) value_{t-1}, value_0 = 0.

    To reproduce its Universal Transformers with `halt.ACT`, and for nothing else: later steps take from earlier ones,
    and nothing is given back at the bound, so the weights do not sum to one. Shares of .3, .3, .3 and .1 end as .132,
    .189, .270 and .100, which sum to .69.

    References: A. Vaswani et al., "Tensor2Tensor for Neural Machine Translation", 2018, arXiv 1803.07416
    (models/research/universal_transformer_util.py).

    >>> from loopaware import Loop
    >>> Loop(lambda state, context, index: state + 1, max_steps=3, readout=Tensor2Tensor())(torch.zeros(1, 1)).value
    tensor([[0.]])
    """

    weighted = True
    settles = True

    def start(self, state: State, rows: Rows) -> State:
        return tree.map(blank, state)

    def fold(self, folded: State, state: State, verdict: Verdict, alive: Tensor) -> State:
        return added(tree.map(lambda v: v * tree.expand(1 - verdict.weight, v), folded), verdict.weight, state)

    def finish(self, folded: State, carry: Carry) -> State:
        return tree.map(lambda v, h: v.to(h.dtype), folded, carry.state)


@dataclass(frozen=True)
class Every:
    """The state after every step, as a tuple: value = (h_1, ..., h_T).

    For losses on several exits, where steps have use one by one. Rows that have stopped repeat their last state.

    >>> from loopaware import Loop
    >>> len(Loop(lambda state, context, index: state + 1, max_steps=3, readout=Every())(torch.zeros(1, 1)).value)
    3
    """

    weighted = True

    def start(self, state: State, rows: Rows) -> tuple[State, ...]:
        return ()

    def fold(self, folded: tuple[State, ...], state: State, verdict: Verdict, alive: Tensor) -> tuple[State, ...]:
        return (*folded, state)

    def finish(self, folded: tuple[State, ...], carry: Carry) -> Any:
        return folded


@dataclass(frozen=True)
class Stacked:
    """The states of all steps in one tensor, steps first: value[t] = h_{t+1}.

    Shapes: state (*rows, ...) -> (T, *rows, ...), where T counts the steps that were run.

    >>> from loopaware import Loop
    >>> Loop(lambda state, context, index: state + 1, max_steps=3, readout=Stacked())(torch.zeros(1, 2)).value.shape
    torch.Size([3, 1, 2])
    """

    weighted = True

    def start(self, state: State, rows: Rows) -> tuple[State, ...]:
        return ()

    def fold(self, folded: tuple[State, ...], state: State, verdict: Verdict, alive: Tensor) -> tuple[State, ...]:
        return (*folded, state)

    def finish(self, folded: tuple[State, ...], carry: Carry) -> State:
        if not folded:
            return tree.map(lambda h: h[None][:0], carry.state)
        return tree.map(lambda *steps: torch.stack(steps), *folded)


def blank(leaf: Tensor) -> Tensor:
    """Zeros to sum into, in at least float32."""
    return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))


def added(total: State, weight: Tensor, state: State) -> State:
    """The sum total + weight * state, leaf by leaf. Shapes: weight (*rows)."""
    return tree.map(lambda sum_, h: sum_ + tree.expand(weight, sum_).to(sum_.dtype) * h, total, state)
