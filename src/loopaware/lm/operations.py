"""Floating-point operations of each token, from the steps it took.

In: a model and the steps of tokens, as a `LoopCache` or an output reports them. Out: operations, token by token. A
multiplication and an addition count as two; matrix products and attention count, elementwise work does not.
Deliberately elsewhere: loops outside language models (`loopaware.observe.cost`), and time, which is measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopaware import execute
from loopaware.counting import counter
from loopaware.lm.cache import LoopCache
from loopaware.lm.model import RecurrentForCausalLM


class TokenCost(NamedTuple):
    """What one token costs: `once`, for each `step`, and either again for each key it looks at.

    Units: operations. What a halting rule reads is in it.
    """

    once: float
    step: float
    once_by_key: float
    step_by_key: float

    def operations(self, steps: Tensor, keys: Tensor | None = None) -> Tensor:
        """Operations of tokens that cost nothing after they have stopped.

        Tokens read together are run together until the last of them stops, unless `execute` leaves some out: that is
        more than this. `LoopCache.ran` counts the tokens that were stepped.

        Args:
            keys: how many tokens each looks at, itself and padding included; None is its place and those before it.

        Shapes: steps (B, T) long; keys (T) or (B, T) -> (B, T) float64.
        """
        if keys is None:
            keys = torch.arange(1, steps.shape[-1] + 1, device=steps.device)
        steps, keys = steps.double(), keys.double()
        taken = self.once + steps * self.step + keys * (self.once_by_key + steps * self.step_by_key)
        return taken * (steps > 0)


@torch.no_grad()
def token_cost(model: RecurrentForCausalLM) -> TokenCost:
    """Ask a model what a token costs: one token is run at one and two steps, behind one token and behind two.

    >>> from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM
    >>> base = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 3}
    >>> cost = token_cost(LoopedForCausalLM(LoopedConfig(base=base, prelude=1, core=1, coda=1)))
    >>> round(cost.step), round(cost.step_by_key)
    (1536, 32)
    """
    training, own = model.training, model.loop
    model.eval()
    model.loop = own.replace(execute=execute.Unrolled())
    try:
        cost = {(steps, keys): counted(model, steps, keys) for steps in (1, 2) for keys in (2, 3)}
    finally:
        model.loop = own
        model.train(training)
    grows = {steps: cost[steps, 3] - cost[steps, 2] for steps in (1, 2)}
    base = {steps: cost[steps, 2] - 2 * grows[steps] for steps in (1, 2)}
    step, step_by_key = base[2] - base[1], grows[2] - grows[1]
    return TokenCost(base[1] - step, step, grows[1] - step_by_key, step_by_key)


def counted(model: RecurrentForCausalLM, steps: int, keys: int) -> int:
    """Operations of one token that takes so many steps and looks at so many tokens."""
    tokens = torch.zeros(1, keys, dtype=torch.long, device=model.device)
    cache = LoopCache()
    model(tokens[:, 1:], past_key_values=cache, max_steps=steps)
    with counter() as seen:
        model(tokens[:, :1], past_key_values=cache, max_steps=steps)
    return seen.get_total_flops()
