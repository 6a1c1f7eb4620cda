"""Where a language model's loop starts, if not from its input: noise that knows each token's position.

In: a context with "x" and "attention". Out: a state. Deliberately elsewhere: starts that look at the batch alone
(`loopaware.init`): decoding hands over one token at a time, and padding moves it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loopaware import noise
from loopaware.checks import between
from loopaware.protocols import Context

PLACES = 1 << 16
"""More features than a state has: a position's numbers are counted from its multiple of this."""


class Noise(nn.Module):
    """Start each token from noise: h_0 ~ N(0, std^2), cut off at `within` standard deviations.

    In training it is drawn anew (PyTorch's generator of the device). In evaluation it is a function of the seed, the
    token's position without padding, and the feature: the same with a cache and without, in any batch.

    Args:
        std: of the noise before it is cut off.
        within: where it is cut off; None is nowhere.
        seed: of evaluation.

    Shapes: x (B, T, D) -> (B, T, D).

    Raises:
        ValueError: a number is not above 0.

    References: J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning", 2025, arXiv 2502.05171.

    >>> Noise(std=0.5, within=3.0).std
    0.5
    """

    def __init__(self, std: float, within: float | None = None, seed: int = 0):
        super().__init__()
        self.std = between("std", std, 0.0, math.inf, "Take init.Zeros for no noise.")
        self.within = within if within is None else between("within", within, 0.0, math.inf, "3 is usual.")
        self.seed = seed

    def forward(self, context: Context) -> Tensor:
        x, positions = context["x"], context["attention"].positions
        if self.training:
            uniform = torch.rand(x.shape, device=x.device).clamp(min=torch.finfo(torch.float32).tiny)
        else:
            places = positions[..., None] * PLACES + torch.arange(x.shape[-1], device=x.device)
            uniform = noise.uniform(places, self.seed).expand(x.shape)
        low = 0.0 if self.within is None else (1 + math.erf(-self.within / math.sqrt(2))) / 2
        central = 2 * (low + (1 - 2 * low) * uniform) - 1
        edge = 1 - torch.finfo(central.dtype).eps
        return (self.std * math.sqrt(2) * torch.erfinv(central.clamp(-edge, edge))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"std={self.std}, within={self.within}, seed={self.seed}"
