"""Relaxed recursive transformers: a looped model whose steps differ from the shared weights by matrices of low rank.

S. Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", 2024, arXiv
2410.20672.

    h_n = core(h_{n-1}; W + U_n V_n)

It takes the place of a dense model: core layers are the mean of those they replace, the differences begin as the
nearest of their rank (`loopaware.convert.tied`); with enough rank it is that model. In: token ids. Out: logits.
Deliberately elsewhere: everything that is as in `loopaware.models.looped_lm`.
"""

from __future__ import annotations

from loopaware import body
from loopaware import nn as blocks
from loopaware.lm import Layers
from loopaware.models.looped_lm import LoopedForCausalLM
from loopaware.models.relaxed_config import RelaxedConfig

__all__ = ["RelaxedConfig", "RelaxedForCausalLM"]


class RelaxedForCausalLM(LoopedForCausalLM):
    """Prelude, a loop whose steps differ a little, and coda over the layers of a dense model of transformers.

    Args:
        config: a `RelaxedConfig`.

    >>> import torch
    >>> base = {"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...     "num_attention_heads": 2, "num_hidden_layers": 3}
    >>> config = RelaxedConfig(base=base, prelude=1, core=1, coda=1, steps=5, rank=2, differing=5)
    >>> RelaxedForCausalLM(config).eval()(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """

    config_class = RelaxedConfig
    config: RelaxedConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: RelaxedConfig):
        super().__init__(config)
        core = super().core
        inside = body.Relaxed(core, blocks.LowRank(core, config.differing, config.rank))
        if isinstance(self.loop.body, body.Injected):
            inside = body.Injected(inside, self.loop.body.fusion)
        self.loop = self.loop.replace(body=inside)

    @property
    def core(self) -> Layers:
        """The layers in the loop, with the shared weights."""
        return self.relaxed.block  # pyright: ignore[reportReturnType]

    @property
    def relaxed(self) -> body.Relaxed:
        """The layers in the loop, and what each step has of its own."""
        return super().core  # pyright: ignore[reportReturnType]
