"""The config of Ouro, with the released fields.

In: JSON. Out: an `OuroConfig`. It stands apart from the model so that a config can be read without one. Deliberately
elsewhere: the model (`loopaware.models.ouro`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from loopaware import hub
from loopaware.checks import between, bounded

__all__ = ["OuroConfig"]

KINDS = ("full_attention", "sliding_attention")


class OuroConfig(PreTrainedConfig):
    """The config of an `OuroForCausalLM`, with the released fields and the defaults of the authors' class.

    Args:
        num_key_value_heads: None is as many as `num_attention_heads`.
        head_dim: None is hidden_size / num_attention_heads.
        use_sliding_window: whether layers from `max_window_layers` on look back `sliding_window` tokens and no further.
        layer_types: of attention, one for each layer; None follows from the sliding window.
        total_ut_steps: how often all layers are run at most.
        early_exit_threshold: leave when the chance of having left reaches it; 1 never leaves.

    Raises:
        ValueError: the file is another model's, a number is out of range, or a kind of attention is not known.

    >>> OuroConfig(total_ut_steps=3, rope_theta=1e6).rope_parameters
    {'rope_theta': 1000000.0, 'rope_type': 'default'}
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = ["past_key_values", "steps", "halted", "exits"]  # noqa: RUF012 - transformers' way
    attention_bias: ClassVar[bool] = False  # what the layers of Llama ask for
    mlp_bias: ClassVar[bool] = False

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_parameters: dict | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    attention_dropout: float = 0.0
    total_ut_steps: int = 4
    early_exit_threshold: float = 1.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def _filled(self, **more: Any) -> None:
        """What follows from the fields; `more` is what a file holds besides them, which transformers takes."""
        hub.own(type(self), more)
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            full = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
            self.layer_types = [KINDS[number >= full] for number in range(self.num_hidden_layers)]
        super().__post_init__(**more)
        # Written twice: the authors' code reads it here, transformers 5 in `rope_parameters`.
        self.rope_theta = (self.rope_parameters or {})["rope_theta"]
        checked(self)

    __post_init__ = _filled


def checked(config: OuroConfig) -> None:
    """Refuse what there is not."""
    for name in ("num_hidden_layers", "total_ut_steps"):
        bounded(name, getattr(config, name), "It counts layers or loops.")
    between("early_exit_threshold", config.early_exit_threshold, 0.0, 1.0, "It is a probability; 1 never leaves.")
    kinds = config.layer_types or []
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"layer_types must name one of {' and '.join(KINDS)} for each of {config.num_hidden_layers} layers, got "
            f"{kinds}. Leave it out to have it follow from the sliding window."
        )


hub.complete()
