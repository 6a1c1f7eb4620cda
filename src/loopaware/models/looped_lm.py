"""A causal language model with a loop in its middle: prelude, a group of layers that repeats, coda.

J. Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning: A Recurrent Depth Approach", 2025, arXiv
2502.05171, of which the layers, the injection and the start are free here; S. McLeish et al., "Teaching Pretrained
Language Models to Think Deeper with Retrofitted Recurrence", 2025, arXiv 2511.07384.

    x = prelude(embed(tokens));  h_0 = start(x);  h_n = core(fuse(h_{n-1}, x));  logits = head(norm(coda(h_N)))

Layers are transformers' own, of any base that `loopaware.lm.layers` knows: at one step, without injection, this is the
dense model itself. In: token ids. Out: logits. Deliberately elsewhere: `forward` and `generate` (`loopaware.lm.model`),
the parts of the loop; `model.loop` is a `Loop` like any other and may be replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loopaware import body, execute, grad, halt, init
from loopaware import nn as blocks
from loopaware.lm import Dense, EveryExit, Exact, ExitGate, First, GatedExit, Last, LastExit, Latest, Layers, Noise
from loopaware.lm.frame import Attention
from loopaware.lm.model import RecurrentForCausalLM
from loopaware.loop import Loop
from loopaware.models.looped_config import LoopedConfig
from loopaware.protocols import Body

__all__ = ["LoopedConfig", "LoopedForCausalLM"]

INJECTED = {"add": blocks.Add, "concat": blocks.Concat, "gated": blocks.Gated, "diagonal": blocks.Diagonal}
SERVING = {"latest": Latest, "exact": Exact, "first": First, "last": Last}


class LoopedForCausalLM(RecurrentForCausalLM):
    """Prelude, loop and coda over the layers of a dense model of transformers.

    Loaded, saved, trained and generated with as any model of transformers. `model.loop` is a plain `Loop`: leave early
    with `model.loop = model.loop.replace(halt=halt.KL(model.predict))`, train with any other parts.

    Args:
        config: a `LoopedConfig`.

    >>> import torch
    >>> base = {"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...     "num_attention_heads": 2, "num_hidden_layers": 3}
    >>> model = LoopedForCausalLM(LoopedConfig(base=base, prelude=1, core=1, coda=1, steps=5)).eval()
    >>> out = model(torch.tensor([[1, 2, 3]]))
    >>> out.logits.shape, out.steps
    (torch.Size([1, 3, 11]), tensor([[5, 5, 5]]))
    """

    config_class = LoopedConfig
    config: LoopedConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        base = config.base
        base._attn_implementation = config._attn_implementation
        dense = Dense(base)
        first, behind = config.prelude, config.prelude + config.core
        self.embed_tokens = dense.embed_tokens
        self.embed_places = dense.embed_places
        self.dropout = dense.dropout
        self.prelude = part(dense, 0, first)
        self.loop = loop(config, part(dense, first, behind))
        self.coda = part(dense, behind, len(dense.layers))
        self.norm = dense.norm
        self.rotary_emb = dense.rotary_emb
        self.lm_head = nn.Linear(base.hidden_size, base.vocab_size, bias=False)
        self.policy = SERVING[config.policy]()
        self.objective = {"last": LastExit(), "every": EveryExit(), "gate": GatedExit(config.entropy)}[config.exits]
        self.post_init()

    @property
    def core(self) -> Layers:
        """The layers in the loop."""
        inside = self.loop.body
        return inside.block if isinstance(inside, body.Injected) else inside  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> list[nn.Module]:
        """All layers, in the base's order."""
        return [*self.prelude.layers, *self.core.layers, *self.coda.layers]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed_tokens(tokens) if tokens.ndim == 2 else tokens
        if self.embed_places is not None:
            x = x + self.embed_places(positions)
        return x if self.dropout is None else self.dropout(x)

    def before(self, x: Tensor, attention: Attention) -> Tensor:
        return self.prelude.run(x, attention)

    def behind(self, state: Tensor, attention: Attention) -> Tensor:
        return self.norm(self.coda.run(state, attention))

    def rotary(self, x: Tensor, positions: Tensor) -> Any:
        return None if self.rotary_emb is None else self.rotary_emb(x, positions)


def part(dense: Dense, start: int, end: int) -> Layers:
    """Some of the layers."""
    kinds = getattr(dense.config, "layer_types", None)
    return Layers(dense.layers[start:end], None if kinds is None else kinds[start:end])


def loop(config: LoopedConfig, core: Layers) -> Loop:
    """The loop that a config describes."""
    dim = config.base.hidden_size
    inside: Body = core
    if config.injection in INJECTED:
        fusion = INJECTED[config.injection]
        inside = body.Injected(core, fusion() if fusion is blocks.Add else fusion(dim))
    starts = {"input": init.FromContext(), "zeros": init.Zeros(), "noise": Noise(config.noise)}
    return Loop(
        inside,
        config.steps,
        rows=2,
        init=starts[config.start],
        halt=ExitGate(halt.Linear(dim), config.threshold) if config.exits == "gate" else halt.Never(),
        grad=grad.Full() if config.truncate is None else grad.Truncated(config.truncate),
        execute=execute.Compacted(),
    )
