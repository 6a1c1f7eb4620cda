"""Which drafted tokens are kept, so that every token is distributed as if nothing had been drafted.

In: logits of drafts and of their verification. Out: how many drafts are kept, and the token behind them. Greedy
decoding is the same rule with all the chance on one token. Deliberately elsewhere: who drafts
(`loopaware.lm.speculative`).

Y. Leviathan, M. Kalman, Y. Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, arXiv 2211.17192;
C. Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023, arXiv 2302.01318.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad
from transformers.generation.logits_process import LogitsProcessorList


@dataclass(frozen=True)
class Sampling:
    """Distributions of the next token: processed logits, drawn from or, if greedy, all on the likeliest token."""

    processor: LogitsProcessorList
    draws: bool

    def distribution(self, logits: Tensor, texts: list[Tensor], drafts: Tensor) -> Tensor:
        """Of n places behind each text, of which the last follows all drafts.

        Shapes: logits (B, n, V), texts B times (1, T), drafts (B, k) -> (B, n, V).
        """
        logits = logits.float()
        first = drafts.shape[1] + 1 - logits.shape[1]
        if self.processor:
            for row, text in enumerate(texts):  # texts differ in length, and processors look at it
                for place in range(logits.shape[1]):
                    own: Any = logits[row : row + 1, place].clone()
                    before: Any = torch.cat((text, drafts[row : row + 1, : first + place]), 1)
                    logits[row, place] = self.processor(before, own)[0]
        return logits.softmax(-1) if self.draws else one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)

    def drawn(self, chances: Tensor) -> Tensor:
        """A token of each row. Shapes: (B, V) -> (B, 1)."""
        return chances.multinomial(1) if self.draws else chances.argmax(-1, keepdim=True)

    def verified(self, drafts: Tensor, quick: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts are kept, and tokens that are right up to the one behind those.

        Shapes: drafts (B, k), quick (B, k, V), full (B, k + 1, V) -> (B), (B, k + 1).
        """
        chance = kept_chance(drafts, quick, full)
        level = torch.rand_like(chance) if self.draws else torch.zeros_like(chance)
        count = (level < chance).long().cumprod(1).sum(1)
        place = count[:, None]
        behind = instead(quick, full).gather(1, place[..., None].expand(-1, 1, full.shape[-1]))[:, 0]
        return count, pad(drafts, (0, 1)).scatter(1, place, self.drawn(behind))


def kept_chance(drafts: Tensor, quick: Tensor, full: Tensor) -> Tensor:
    """The chance that a draft is kept: min(1, p(x) / q(x)). Shapes: (B, k), (B, k, V), (B, k + 1, V) -> (B, k)."""
    q, p = (each.gather(2, drafts[..., None])[..., 0] for each in (quick, full[:, :-1]))
    return (p / q).clamp(max=1.0)


def instead(quick: Tensor, full: Tensor) -> Tensor:
    """What a refused draft is drawn from instead, (p - q)_+ / sum; and p behind the last.

    Shapes: quick (B, k, V), full (B, k + 1, V) -> (B, k + 1, V).
    """
    left = (full[:, :-1] - quick).clamp(min=0.0)
    total = left.sum(-1, keepdim=True)  # 0 where p = q, and a refusal is but rounding
    return torch.cat((torch.where(total > 0, left / total, full[:, :-1]), full[:, -1:]), 1)
