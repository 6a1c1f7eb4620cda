"""What `loopaware bench execution` is compared with: adaptive computation time as it is commonly written.

In: a loop of fixed depth, and the steps at which tokens are to stop. Out: a module that is called as a loop is.
Deliberately elsewhere: this library's halting (`loopaware.halt`), and tensor2tensor's model as a loop
(`models.universal.tensor2tensor_act`), with which the baseline must agree.

Most code for adaptive depth follows tensor2tensor's Universal Transformer: a while-loop over the whole batch, a sigmoid
of a linear map as the chance to halt, masks of the tokens that still run, an answer that is mixed by their weights.
Every token is computed at every step, until the last token of the batch has halted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import Loop
from loopaware.models.universal import Step, tensor2tensor_act
from loopaware.protocols import Body
from loopaware.recipes.shared import apart

THRESHOLD = 0.99

AGREE = 1e-3
"""The relative error of values and gradients above which the baseline is refused (float32)."""


class Answer(NamedTuple):
    """Shapes: value (B, T, D); updates, remainder (B, T), whose sum is the ponder cost."""

    value: Tensor
    updates: Tensor
    remainder: Tensor


class Chance(nn.Module):
    """The logit of halting: a linear map, which begins at zero, moved so that tokens halt at steps written down before.

    The chance is .99 / (n - 1/2) at each of n steps, so that the sum passes .99 at the n-th and not before.

    Shapes: ends (B, T) long, n of each token; state (B, T, D) -> (B, T, 1).
    """

    shift: Tensor

    def __init__(self, dim: int, ends: Tensor):
        super().__init__()
        self.linear = nn.Linear(dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("shift", torch.logit((THRESHOLD / (ends - 0.5)).clamp(max=0.999))[..., None])

    def forward(self, state: Tensor) -> Tensor:
        return self.linear(state) + self.shift


class MaskedACT(nn.Module):
    """Adaptive computation time by masks: value <- w h + (1 - w) value with h <- block(h), while a token runs.

    Args:
        block: a body.
        chance: the logit of halting, read from the state before the step.
        max_steps: updates at most.

    Shapes: state (B, T, D).
    """

    def __init__(self, block: Body, chance: Chance, max_steps: int):
        super().__init__()
        self.block = block
        self.chance = chance
        self.max_steps = max_steps

    def forward(self, state: Tensor) -> Answer:
        value = torch.zeros_like(state)
        spent = remainder = updates = torch.zeros_like(state[..., 0])
        step = 0
        while bool(((spent < THRESHOLD) & (updates < self.max_steps)).any()):
            chance = torch.sigmoid(self.chance(state).squeeze(-1))
            running = (spent < 1).to(spent.dtype)
            over = (spent + chance * running > THRESHOLD).to(spent.dtype)
            goes_on, halts = running * (1 - over), running * over
            rest = halts * (1 - spent)
            weight = chance * goes_on + rest
            spent, remainder, updates = spent + weight, remainder + rest, updates + running
            state = self.block(state, None, step)
            value = state * weight.unsqueeze(-1) + value * (1 - weight.unsqueeze(-1))
            step += 1
        return Answer(value, updates, remainder)


def masked_act(loop: Loop, x: Tensor, ends: Tensor) -> MaskedACT:
    """Masked ACT on the block of a loop, every token halting at the step written down for it.

    Shapes: x (B, T, D), ends (B, T) long.

    Raises:
        ValueError: tokens halt at other steps, or values and gradients are not those of `tensor2tensor_act` on the
            same block.
    """
    own = MaskedACT(loop.body, Chance(x.shape[-1], ends), loop.max_steps)
    twin: Any = tensor2tensor_act(Loop(Step(loop.body, None), loop.max_steps, rows=2), x.shape[-1])
    twin.body.head = own.chance
    answer, expected = own(x), twin(x)
    late = int((answer.updates != ends).sum())
    pairs = zip(differentiated(own, answer.value), differentiated(own, expected.value), strict=True)
    error = max(apart(one, other) for one, other in pairs)
    if late or not error <= AGREE:
        raise ValueError(
            f"masked ACT must halt as written down and be within {AGREE} of tensor2tensor_act, got {late} tokens that "
            f"halt at other steps and {error:.1e}. Nothing is reported: mend the baseline, or take fewer steps."
        )
    return own


def differentiated(net: nn.Module, value: Tensor) -> list[Tensor]:
    """The value, and its gradients in one row."""
    direction = torch.linspace(-1, 1, value.numel()).view_as(value)
    found: Any = torch.autograd.grad((value * direction).mean(), list(net.parameters()))
    return [value.detach(), torch.cat([gradient.flatten() for gradient in found])]
