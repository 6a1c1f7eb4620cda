"""Ouro, a looped language model: R.-J. Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025, arXiv
2510.25741. Released checkpoints load by name.

    h_0 = E tokens;  h_n = norm(layers(h_{n-1}));  logits = W h_N
    a layer:  a = h + norm_2(attention(norm_1(h)));  h' = a + norm_4(mlp(norm_3(a)))
    a gate:  l_n = sigmoid(g . h_n + b);  p_n = l_n prod_{j<n} (1 - l_j);  leave when p_1 + ... + p_n >= q

In: token ids. Out: logits. Attention and MLP are those of transformers' Llama, of which Ouro's are copies. `model.loop`
is a `Loop` as any other. Deliberately elsewhere: `forward` and `generate` (`loopaware.lm.model`), the gate's rule and
its loss (`loopaware.lm.exits`), the cache (`loopaware.lm.cache`).

The authors' code (modeling_ouro.py beside the released weights) runs every loop and then selects, so that an early exit
saves nothing, and tokens see what others would have become. Here a token that leaves is done, and later ones see the
last keys and values that it made: after the first exit the numbers are others. `Selected` is the authors' way.
Their loss is that of the mean of the logits under p; here it is the paper's, the mean of the losses less the entropy of
p (`lm.GatedExit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models import llama

from loopaware import execute, hub
from loopaware.halt.measure import hard
from loopaware.lm import Attention, ExitGate, GatedExit, Latest, RecurrentForCausalLM
from loopaware.loop import Loop
from loopaware.models.ouro_config import OuroConfig
from loopaware.protocols import Context, Halt, Memory, Rows, State, Verdict

__all__ = ["Gate", "OuroForCausalLM", "Selected"]


class OuroLayer(nn.Module):
    """A layer with norms before and behind both halves, the latter before the sum. Shapes: (B, T, D) -> the same."""

    def __init__(self, config: OuroConfig, number: int):
        super().__init__()
        self.kind = (config.layer_types or [])[number]
        self.window = config.sliding_window if self.kind == "sliding_attention" else None
        # They ask for a Llama's config, and this one has all of its fields that they read.
        self.self_attn = llama.modeling_llama.LlamaAttention(config, number)  # pyright: ignore[reportArgumentType]
        self.mlp = llama.modeling_llama.LlamaMLP(config)
        self.input_layernorm = norm(config)
        self.input_layernorm_2 = norm(config)
        self.post_attention_layernorm = norm(config)
        self.post_attention_layernorm_2 = norm(config)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        mixed, _ = self.self_attn(
            self.input_layernorm(x),
            position_embeddings=attention.rotary,
            attention_mask=attention.mask[self.kind],
            past_key_values=attention.cache,
            sliding_window=self.window,
        )
        x = x + self.input_layernorm_2(mixed)
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


def norm(config: OuroConfig) -> nn.Module:
    """Root mean square, in float32. Llama's code is looked up when it is needed: it loads transformers' tables."""
    return llama.modeling_llama.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class OuroModel(nn.Module):
    """What stands under `model` in released weights: embedding, layers, the norm behind each loop, the gate."""

    def __init__(self, config: OuroConfig):
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(OuroLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = norm(config)
        self.rotary_emb = llama.modeling_llama.LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Stack:
    """The body: h' = norm(layers(h)). No module, so that its weights have one name, the released one."""

    model: OuroModel

    def __call__(self, state: Tensor, context: Context, index: int) -> Tensor:
        attention = context["attention"].at(index)
        for layer in self.model.layers:
            state = layer(state, attention)
        return self.model.norm(state)

    def __repr__(self) -> str:
        return "Stack"


@dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """The released gate as a rule, for `lm.ExitGate`: score = g . h_n + b. No module, for the same reason."""

    learned, stops, mixes = True, True, False
    model: OuroModel

    def start(self, state: State, rows: Rows) -> None: ...
    def __call__(self, old: State, new: State, memory: None, index: int) -> tuple[Verdict, None]:
        score = self.model.early_exit_gate(new).squeeze(-1)
        return hard(score >= 0, score), None

    def __repr__(self) -> str:
        return "Gate"


class Selected(nn.Module):
    """Run every step, and answer with the state at which the rule would have stopped: the authors' early exit.

    To compare with the authors' code; it saves nothing. In training it is the rule itself, stopped nowhere:
    `model.loop = model.loop.replace(halt=Selected(model.loop.halt), readout=readout.Weighted())`.

    Args:
        rule: any halting rule.

    >>> from loopaware import halt
    >>> Selected(halt.Converged()).stops
    False
    """

    stops, mixes = False, True

    def __init__(self, rule: Halt):
        super().__init__()
        self.rule = rule
        self.learned = rule.learned

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state).bool()

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        first = verdict.stop & ~memory[1]
        weight = verdict.weight if self.training else first.to(verdict.weight.dtype)
        return Verdict(torch.zeros_like(first), weight, verdict.score), (inner, memory[1] | first)


class OuroForCausalLM(RecurrentForCausalLM):
    """All layers, run up to `total_ut_steps` times; a gate says after each when a token may leave.

    Another number of loops, below or above, is `max_steps` of a call or of `generate`. With `early_exit_threshold`
    below 1 tokens leave by themselves: each by its own gate, whatever else is in the batch. In training every loop is
    run, and the gate is taught by the losses of all (`model.objective`). Rules that look at the prediction take
    `model.predict`, which here is the head alone.

    Args:
        config: an `OuroConfig`.

    References: R.-J. Zhu et al., as above.

    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> model = OuroForCausalLM(OuroConfig(vocab_size=11, num_hidden_layers=2, **sizes)).eval()
    >>> model(torch.tensor([[1, 2, 3]]), max_steps=6).steps
    tensor([[6, 6, 6]])
    """

    config_class = OuroConfig
    config: OuroConfig
    _no_split_modules = ["OuroLayer"]  # noqa: RUF012 - transformers' way
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OuroConfig):
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loop = Loop(
            Stack(self.model),
            config.total_ut_steps,
            rows=2,
            halt=ExitGate(Gate(self.model), config.early_exit_threshold),
            execute=execute.Compacted(),
        )
        self.policy = Latest()
        self.objective = GatedExit()
        self.post_init()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model.embed_tokens(tokens) if tokens.ndim == 2 else tokens

    def behind(self, state: Tensor, attention: Attention) -> Tensor:
        return state

    def rotary(self, x: Tensor, positions: Tensor) -> Any:
        return self.model.rotary_emb(x, positions)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value


hub.complete()
