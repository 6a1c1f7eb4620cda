"""Decoder layers of transformers' own models, as a loop and what stands around it need them.

In: the config of a dense model. Out: its embeddings, layers, norm and rotary module, made by transformers; layers run
one after the other on what `Attention` holds. Deliberately elsewhere: which layers stand in the loop
(`loopaware.models.looped_lm`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from loopaware.lm.frame import Attention
from loopaware.protocols import Context


@dataclass(frozen=True)
class Anatomy:
    """Where a dense model of transformers keeps its parts; None is what it has not.

    >>> anatomy("gpt2").layers
    'h'
    """

    tokens: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    places: str | None = None
    dropout: str | None = None


LLAMA = Anatomy()
GPT2 = Anatomy(tokens="wte", layers="h", norm="ln_f", rotary=None, places="wpe", dropout="drop")

ANATOMIES = dict.fromkeys(("llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3", "smollm3"), LLAMA) | {"gpt2": GPT2}
"""The dense models whose layers can stand in a loop, by transformers' name."""


def anatomy(model_type: str) -> Anatomy:
    """The anatomy of a kind of model.

    Raises:
        ValueError: it is not known.
    """
    if model_type not in ANATOMIES:
        raise ValueError(
            f"base must be one of {', '.join(sorted(ANATOMIES))}, got {model_type!r}. Take a base of these, or add its "
            "anatomy to loopaware.lm.layers."
        )
    return ANATOMIES[model_type]


class Dense(nn.Module):
    """The parts of a dense model, made by transformers from its config, in one place and under one set of names."""

    def __init__(self, config: PreTrainedConfig):
        from transformers import AutoModel  # here, since our models are loaded when its table of models is

        super().__init__()
        names = anatomy(config.model_type)
        self.config = config
        model = AutoModel.from_config(config, attn_implementation=config._attn_implementation)
        self.embed_tokens = getattr(model, names.tokens)
        self.layers = getattr(model, names.layers)
        self.norm = getattr(model, names.norm)
        self.rotary_emb = getattr(model, names.rotary) if names.rotary else None
        self.embed_places = getattr(model, names.places) if names.places else None
        self.dropout = getattr(model, names.dropout) if names.dropout else None


class Layers(nn.Module):
    """Decoder layers one after the other; as the body of a loop, one step of it.

    Args:
        layers: transformers' own; each knows its number, under which the cache keeps its keys and values.
        kinds: of attention, one for each layer, where the model has several (a sliding window).

    Shapes: (B, T, D) -> the same.
    """

    def __init__(self, layers: Iterable[nn.Module], kinds: Iterable[str] | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.kinds = None if kinds is None else tuple(kinds)

    def forward(self, state: Tensor, context: Context, index: int) -> Tensor:
        return self.run(state, context["attention"].at(index))

    def run(self, x: Tensor, attention: Attention) -> Tensor:
        """The layers outside a loop, or at the step that `attention` stands at."""
        for number, layer in enumerate(self.layers):
            mask = attention.mask if self.kinds is None else attention.mask[self.kinds[number]]
            x = layer(
                x,
                attention_mask=mask,
                position_ids=attention.positions,
                past_key_values=attention.cache,
                use_cache=attention.cache is not None,
                position_embeddings=attention.rotary,
            )
        return x

    def __len__(self) -> int:
        return len(self.layers)
