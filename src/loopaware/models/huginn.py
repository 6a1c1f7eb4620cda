"""Huginn, the language model with recurrent depth: J. Geiping et al., "Scaling up Test-Time Compute with Latent
Reasoning: A Recurrent Depth Approach", 2025, arXiv 2502.05171. Released checkpoints load by name.

    x = prelude(sqrt(d) E tokens);  h_0 ~ N(0, 2/5), cut off at three standard deviations
    h_n = core(W [h_{n-1}; x]);  logits = E^T norm(coda(norm(h_N)))
    a layer:  a = norm_2(h + attention(norm_1(h)));  h' = norm_4(a + mlp(norm_3(a)))

In: token ids. Out: logits. `model.loop` is a `Loop` as any other. Deliberately elsewhere: `forward` and `generate`
(`loopaware.lm.model`), exits (`loopaware.halt`), the cache (`loopaware.lm.cache`).

The authors' code (raven_modeling_minimal.py of seal-rg/recurrent-pretraining) differs in what it does with it:
- it ignores attention masks, so that padding is seen; here it is hidden, on either side;
- it draws h_0 anew in evaluation; here the noise of a position is a function of it and a seed, so that answers repeat,
  with a cache and without; for the authors' give `init=` a function of the context;
- its labels are next tokens; here they are the tokens themselves, as everywhere in transformers;
- its cache strategies are `lm.Latest()` ("latest-m4"), `lm.Last()` ("compress-s4") and, at equal depths, "full";
- its exits: "kl" is `halt.KL(model.glance)`, which begins from what h_0 predicts where the authors begin from a uniform
  guess, and `halt.KL(model.predict)` is the one to use; "latent-diff" is `halt.Converged`; "argmax-stability",
  "entropy-diff", "minp-kl" and "cosine" have no counterpart. A row that exits leaves the batch, and neither its answer
  nor its keys and values depend on the others, where the authors' are those of the slowest row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as filled
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models import llama

from loopaware import execute, grad, halt, hub
from loopaware.halt.depths import LogNormalPoisson
from loopaware.lm import Attention, Latest, Noise, RecurrentForCausalLM, current
from loopaware.loop import Loop
from loopaware.models.huginn_config import HuginnConfig
from loopaware.protocols import Context

__all__ = ["HuginnConfig", "HuginnForCausalLM"]

Angles = tuple[Tensor, Tensor]


class Back(nn.Linear):
    """A map back to the state; its first weights are smaller."""


class Gated(nn.Linear):
    """A map to gates and to values, in this order; the latter's first weights are smaller."""


class SelfAttention(nn.Module):
    """Causal attention with queries, keys and values of one map, biases on the first two, and rotary angles.

    Shapes: (B, T, D) -> the same.
    """

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: HuginnConfig, layer: int):
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.shape = (3, config.n_heads, config.head_dim)
        self.scaling = config.head_dim**-0.5
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qk_bias: nn.Parameter | None = nn.Parameter(torch.zeros(2, 1, *self.shape[1:])) if config.qk_bias else None
        self.proj = Back(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        queries, keys, values = self.Wqkv(x).unflatten(-1, self.shape).unbind(2)
        if self.qk_bias is not None:
            queries, keys = queries + self.qk_bias[0], keys + self.qk_bias[1]
        queries, keys = turned(queries, attention.rotary), turned(keys, attention.rotary)
        queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
        if attention.cache is not None:
            keys, values = attention.cache.update(keys, values, self.layer_idx)
        eager = llama.modeling_llama.eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager)
        mixed, _ = attend(self, queries, keys, values, attention.mask, scaling=self.scaling)
        return self.proj(mixed.flatten(2))


def norm(config: HuginnConfig) -> nn.Module:
    """Root mean square, in float32. Llama's code is looked up when it is needed: it loads transformers' tables."""
    return llama.modeling_llama.LlamaRMSNorm(config.n_embd, config.norm_eps)


def turned(x: Tensor, angles: Angles) -> Tensor:
    """Neighbouring features as complex numbers, turned, in float32. Shapes: (B, T, heads, d), (B, T, d / 2) each."""
    cos, sin = (each.unsqueeze(2) for each in angles)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), -1).flatten(-2).to(x.dtype)


class GatedMLP(nn.Module):
    """W (silu(W_1 x) * W_2 x), both inner maps in one. Shapes: (B, T, D) -> the same."""

    def __init__(self, config: HuginnConfig):
        super().__init__()
        self.fc = Gated(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = Back(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc(x).chunk(2, -1)
        return self.proj(nn.functional.silu(gate) * value)


class SandwichBlock(nn.Module):
    """A layer with norms before and behind both halves, the latter on the sum. Shapes: (B, T, D) -> the same."""

    def __init__(self, config: HuginnConfig, layer: int):
        super().__init__()
        self.norm_1 = norm(config)
        self.attn = SelfAttention(config, layer)
        self.norm_2 = norm(config)
        self.mlp = GatedMLP(config)
        self.norm_3 = norm(config)
        self.norm_4 = norm(config)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        x = self.norm_2(x + self.attn(self.norm_1(x), attention))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


@dataclass(frozen=True, eq=False, repr=False)
class Core:
    """The body: h' = core(W [h; x]).

    It is no module, so that its weights have one name, the released one, under `model.transformer`.
    """

    parts: nn.ModuleDict

    def __call__(self, state: Tensor, context: Context, index: int) -> Tensor:
        attention = context["attention"].at(index)
        state = self.parts["adapter"](torch.cat((state, context["x"].to(state.dtype)), -1))
        return through(self.parts["core_block"], state, attention)

    def __repr__(self) -> str:
        return "Core"


def through(layers: nn.Module, x: Tensor, attention: Attention) -> Tensor:
    """One layer after the other."""
    for layer in layers.children():
        x = layer(x, attention)
    return x


class HuginnForCausalLM(RecurrentForCausalLM):
    """Prelude, a core that repeats, coda; the state starts from noise and is shown the prelude's answer at every step.

    In evaluation it takes `mean_recurrence` steps; another number, below or above, is `max_steps` of a call or of
    `generate`. In training the depth is drawn for each batch, n = 1 + Poisson(r) with r of a log-normal distribution,
    and the last `mean_backprop_depth` steps are differentiated: halting rule, start and gradient of `model.loop`, which
    may be replaced. Leave early with `model.loop = model.loop.replace(halt=halt.KL(model.predict))`.

    Args:
        config: a `HuginnConfig`.

    References: J. Geiping et al., as above.

    >>> config = HuginnConfig(n_embd=8, n_heads=2, intermediate_size=16, vocab_size=11, mean_recurrence=4)
    >>> model = HuginnForCausalLM(config).eval()
    >>> model(torch.tensor([[1, 2, 3]]), max_steps=9).steps
    tensor([[9, 9, 9]])
    """

    config_class = HuginnConfig
    config: HuginnConfig
    _no_split_modules = ["SandwichBlock"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = ["^freqs_cis$"]  # noqa: RUF012 - a table of the rotary angles

    def __init__(self, config: HuginnConfig):
        super().__init__(config)
        numbers = iter(range(config.n_layers))

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(SandwichBlock(config, next(numbers)) for _ in range(count))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "prelude": layers(config.n_layers_in_prelude),
                "adapter": nn.Linear(2 * config.n_embd, config.n_embd, bias=config.bias),
                "core_block": layers(config.n_layers_in_recurrent_block),
                "coda": layers(config.n_layers_in_coda),
                "ln_f": norm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.loop = recipe(config, Core(self.transformer))
        self.policy = Latest()
        self.post_init()

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) if tokens.ndim == 2 else tokens
        return x * math.sqrt(self.config.n_embd)

    def before(self, x: Tensor, attention: Attention) -> Tensor:
        return through(self.transformer["prelude"], x, attention)

    def behind(self, state: Tensor, attention: Attention) -> Tensor:
        norm = self.transformer["ln_f"]
        return norm(through(self.transformer["coda"], norm(state), attention))

    def glance(self, state: Tensor) -> Tensor:
        """As `predict`, for which the coda sees past tokens as they were at this step; here it sees what they ended in.

        The authors' head. Only where one token is read at a time: tokens that are read together have no end yet, so
        that text read at once stops elsewhere than text read in pieces.

        Shapes: state (B, T, D) -> (B, T, V).
        """
        return self.lm_head(self.behind(state, current()["attention"]))

    def rotary(self, x: Tensor, positions: Tensor) -> Angles:
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size
        angles = positions[..., None].float() * (1.0 / self.config.rope_base**exponents)
        return angles.cos(), angles.sin()

    def running(self, labels: Tensor | None) -> Loop:
        """The bound of the loop is one of evaluation: a depth that is drawn in training is not cut off by it."""
        loop, rule = super().running(labels), getattr(self.loop.halt, "now", self.loop.halt)
        return loop.replace(max_steps=len(rule.ranks)) if self.training and isinstance(rule, halt.Drawn) else loop

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 2 / 5d), cut off at three standard deviations; maps back to the state less, by sqrt(2 depth)."""
        std = math.sqrt(2 / (5 * self.config.n_embd))
        less = std / math.sqrt(2 * self.config.depth)
        if isinstance(module, nn.Linear | nn.Embedding):
            cut(module.weight, less if isinstance(module, Back) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                filled.zeros_(module.bias)
            if isinstance(module, Gated) and not getattr(module.weight, "_is_hf_initialized", False):
                cut(module.weight.chunk(2)[1], less)
        elif isinstance(module, llama.modeling_llama.LlamaRMSNorm):
            filled.ones_(module.weight)
        elif isinstance(module, SelfAttention) and module.qk_bias is not None:
            filled.zeros_(module.qk_bias)


def cut(weight: Tensor, std: float) -> None:
    """A normal distribution, cut off at three standard deviations."""
    filled.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def recipe(config: HuginnConfig, core: Core) -> Loop:
    """The loop of the released model, and of its training."""
    drawn = halt.Drawn(LogNormalPoisson(config.mean_recurrence, sigma=0.5))
    return Loop(
        core,
        config.mean_recurrence,
        rows=2,
        init=Noise(std=math.sqrt(2 / 5), within=3.0),
        halt=halt.Switched(training=drawn, evaluation=halt.Never()),
        grad=grad.Truncated(config.mean_backprop_depth),
        execute=execute.Compacted(),
    )


hub.complete()
