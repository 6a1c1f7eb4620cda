"""Small language models with a loop, depths that are written down, and their naive twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from loopaware import execute, lm
from loopaware.halt.measure import hard
from loopaware.lm.frame import Attention
from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM
from loopaware.protocols import Rows, Verdict

VOCABULARY = 31
POLICIES = (lm.Exact(), lm.Latest(), lm.First(), lm.Last())
EXACT = tuple(policy for policy in POLICIES if policy.exact)


def base(kind: str = "llama", layers: int = 4, **more: Any) -> dict[str, Any]:
    """A dense config of a few thousand weights."""
    small: dict[str, Any] = {"model_type": kind, "vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        small |= {"n_embd": 16, "n_layer": layers, "n_head": 4, "n_positions": 64}
        small |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        small |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 4}
        small |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind.startswith("qwen3"):
        small |= {"head_dim": 4}
    return small | more


def model(kind: str = "llama", seed: int = 0, more: dict[str, Any] | None = None, **options: Any) -> LoopedForCausalLM:
    """One layer before a loop of two, one behind it."""
    torch.manual_seed(seed)
    options = {"prelude": 1, "core": 2, "coda": 1, "steps": 5} | options
    layers = options["prelude"] + options["core"] + options["coda"]
    return LoopedForCausalLM(LoopedConfig(base=base(kind, layers, **(more or {})), **options)).eval()


class ByPosition:
    """Stop each token after the steps that a table holds for its position and sequence."""

    learned = False
    stops = True
    mixes = False

    def __init__(self, table: Tensor):
        self.table = table  # (B or 1, positions)

    def start(self, state: Tensor, rows: Rows) -> Tensor:
        attention: Attention = lm.current()["attention"]
        positions = attention.positions.expand(len(state), -1)
        return self.table.expand(len(state), -1).gather(1, positions)

    def __call__(self, old: Tensor, new: Tensor, memory: Tensor, index: int) -> tuple[Verdict, Tensor]:
        return hard(memory <= index + 1, memory.float()), memory


LEAVING = execute.Compacted(break_even=0)


def planned(made: LoopedForCausalLM, table: Tensor, policy: Any, run: Any = LEAVING) -> LoopedForCausalLM:
    """The model with written depths, in which rows leave as soon as they can."""
    made.policy = policy
    made.loop = made.loop.replace(halt=ByPosition(table), execute=run)
    return made


def pieces(made: Any, tokens: Tensor, mask: Tensor | None, cuts: list[int], **options: Any) -> tuple[Tensor, Any]:
    """The logits of a text that is read up to each cut in turn, and the cache."""
    cache, logits = None, []
    for start, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        out = made(tokens[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


class Stored:
    """The one method of a cache that attention calls, on a DynamicCache."""

    def __init__(self, cache: DynamicCache, keep: bool = True):
        self.cache, self.keep = cache, keep

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if self.keep:
            return self.cache.update(key, value, layer)
        return self.cache.layers[layer].keys, self.cache.layers[layer].values


def naive(made: LoopedForCausalLM, tokens: Tensor, depths: list[int]) -> Tensor:
    """Logits of one sequence, read token by token with a plain cache for every step, by the words of the policies."""
    policy, bound = made.policy, made.loop.max_steps
    caches = [DynamicCache() for _ in range(policy.slots(bound))]
    outside, logits = Stored(DynamicCache()), []
    core = [layer.self_attn.layer_idx for layer in made.core.layers]
    for place, depth in enumerate(depths):
        positions = torch.tensor([[place]])
        x = made.embed(tokens[:, place : place + 1], positions)
        rotary = made.rotary(x, positions)
        x = made.before(x, Attention(None, positions, rotary, outside))
        state = made.loop.init({"x": x, "attention": Attention(None, positions, rotary)})
        for step in range(bound):
            if step < depth or policy.frozen:
                slot = Stored(caches[policy.slot(step)], policy.writes(step))
                inside = {"x": x, "attention": At(Attention(None, positions, rotary, slot))}
                proposal = made.loop.body(state, inside, step)
                state = proposal if step < depth else state
            elif isinstance(policy, lm.Latest):
                for layer in core:
                    last = caches[depth - 1].layers[layer]
                    caches[step].update(last.keys[:, :, -1:], last.values[:, :, -1:], layer)
        logits.append(made.lm_head(made.behind(state, Attention(None, positions, rotary, outside))))
    return torch.cat(logits, 1)


class At:
    """What is given to attention, already at its step."""

    def __init__(self, attention: Attention):
        self.attention = attention

    def at(self, step: int) -> Attention:
        return self.attention
