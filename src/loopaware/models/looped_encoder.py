"""An encoder with a loop in its middle over BERT's layers, alone and with the head of a masked language model.

J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, arXiv
1810.04805, whose layers these are, made by transformers; one layer that repeats is `loopaware.models.albert`.

    x = prelude(embed(tokens));  h_0 = x;  h_n = core(fuse(h_{n-1}, x));  value = coda(h_N)

At one step, without injection, this is BERT itself. In: token ids, a mask, segments. Out: states, or logits.
Deliberately elsewhere: the config, which causal models share (`loopaware.models.looped_config`), the loop's parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from loopaware import hub
from loopaware.lm import Attention, Layers, current, loading
from loopaware.lm.frame import looped
from loopaware.models.looped_config import LoopedConfig
from loopaware.models.looped_lm import loop, part
from loopaware.protocols import Context

__all__ = ["EncoderOutput", "LoopedConfig", "LoopedEncoder", "LoopedForMaskedLM", "PredictionOutput"]


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """What transformers' encoders return, and what the loop did. Shapes: steps (B, T) long, halted (B, T) bool."""

    steps: Tensor | None = None
    halted: Tensor | None = None


@dataclass
class PredictionOutput(MaskedLMOutput):
    """What transformers' masked language models return, and what the loop did. Shapes: as `EncoderOutput`."""

    steps: Tensor | None = None
    halted: Tensor | None = None


class LoopedPretrained(PreTrainedModel):
    """What the two have in common: their config, and loading all or nothing."""

    config_class = LoopedConfig
    config: LoopedConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    from_pretrained = loading.from_pretrained  # pyright: ignore[reportAssignmentType]


class LoopedEncoder(LoopedPretrained):
    """Prelude, loop and coda over the layers of a BERT, whose tokens look both ways.

    `model.loop` is a plain `Loop` with rows=2 and may be replaced.

    Args:
        config: a `LoopedConfig` whose base is a BERT's.
        pooled: with BERT's pooler of the first token, as `BertModel` has it.

    Raises:
        ValueError: another base, a decoder, or exits that an encoder does not have.

    >>> base = {"model_type": "bert", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...     "num_attention_heads": 2, "num_hidden_layers": 3}
    >>> model = LoopedEncoder(LoopedConfig(base=base, prelude=1, core=1, coda=1, steps=5)).eval()
    >>> out = model(torch.tensor([[1, 2, 3]]))
    >>> out.last_hidden_state.shape, out.steps
    (torch.Size([1, 3, 8]), tensor([[5, 5, 5]]))
    """

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"^pooler\."]  # noqa: RUF012

    def __init__(self, config: LoopedConfig, pooled: bool = True):
        super().__init__(config)
        base = bidirectional(config)
        bert: Any = AutoModel.from_config(base, attn_implementation=config._attn_implementation)
        bert.layers = bert.encoder.layer
        first, behind = config.prelude, config.prelude + config.core
        self.embeddings = bert.embeddings
        self.prelude = part(bert, 0, first)
        self.loop = loop(config, part(bert, first, behind))
        self.coda = part(bert, behind, len(bert.layers))
        self.pooler = bert.pooler if pooled else None
        self.post_init()

    @property
    def core(self) -> Layers:
        """The layers in the loop."""
        return getattr(self.loop.body, "block", self.loop.body)  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> list[nn.Module]:
        """All layers, in the base's order."""
        return [*self.prelude.layers, *self.core.layers, *self.coda.layers]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def surroundings(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Context, Attention, Tensor | None]:
        """The loop's context, what attention is given, and which tokens are real."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.embeddings(input_ids=tokens, token_type_ids=segments, position_ids=positions)
        seen = create_bidirectional_mask(config=self.config.base, inputs_embeds=x, attention_mask=mask)
        attention = Attention(seen, positions)
        return {"x": self.prelude.run(x, attention), "attention": attention}, attention, mask

    def behind(self, state: Tensor, attention: Attention) -> Tensor:
        """The coda. Shapes: (B, T, D) -> the same."""
        return self.coda.run(state, attention)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        max_steps: int | None = None,
    ) -> EncoderOutput:
        """One pass.

        Args:
            attention_mask: True or 1 = real. What stands at padding means nothing.
            token_type_ids: segments; None is all of the first.
            max_steps: bound of the loop in this call; None is the loop's own.
        """
        context, attention, mask = self.surroundings(input_ids, attention_mask, token_type_ids, position_ids)
        out = looped(self.loop, context, None if mask is None else mask.bool(), max_steps)
        state = self.behind(out.value, attention)
        pooled = None if self.pooler is None else self.pooler(state)
        return EncoderOutput(state, pooled, steps=out.steps, halted=out.halted)


class LoopedForMaskedLM(LoopedPretrained):
    """A `LoopedEncoder` with the head of BERT's masked language model.

    Args:
        config: a `LoopedConfig` whose base is a BERT's.

    Raises:
        ValueError: another base, a decoder, or exits that an encoder does not have.

    >>> base = {"model_type": "bert", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...     "num_attention_heads": 2, "num_hidden_layers": 3}
    >>> model = LoopedForMaskedLM(LoopedConfig(base=base, prelude=1, core=1, coda=1)).eval()
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """

    _tied_weights_keys = {  # noqa: RUF012
        "head.predictions.decoder.weight": "encoder.embeddings.word_embeddings.weight",
        "head.predictions.decoder.bias": "head.predictions.bias",
    }

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.encoder = LoopedEncoder(config, pooled=False)
        self.head = AutoModelForMaskedLM.from_config(bidirectional(config)).cls
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head.predictions.decoder = new_embeddings
        self.head.predictions.bias = new_embeddings.bias

    def predict(self, state: Tensor) -> Tensor:
        """What the model would say if the loop stopped here: the head of halting rules that look at the prediction.

        Shapes: state (B, T, D) -> (B, T, V).
        """
        return self.head(self.encoder.behind(state, current()["attention"]))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        max_steps: int | None = None,
    ) -> PredictionOutput:
        """One pass; the arguments are those of the encoder. Labels of -100 are left out."""
        out = self.encoder(input_ids, attention_mask, token_type_ids, position_ids, max_steps=max_steps)
        logits = self.head(out.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return PredictionOutput(loss, logits, steps=out.steps, halted=out.halted)


def bidirectional(config: LoopedConfig) -> Any:
    """The base, if it is a BERT that looks both ways."""
    base: Any = config.base
    if base.model_type != "bert" or base.is_decoder:
        kind = f"{base.model_type}{' as a decoder' if getattr(base, 'is_decoder', False) else ''}"
        raise ValueError(f"the base of an encoder must be bert, got {kind}. Load it with AutoModelForCausalLM.")
    if config.exits != "last":
        raise ValueError(f"exits must be 'last' in an encoder, got {config.exits!r}. Teach others by a loss of yours.")
    base._attn_implementation = config._attn_implementation
    return base


hub.complete()
