"""The config of Huginn, with the released fields.

In: JSON. Out: a `HuginnConfig`. It stands apart from the model so that a config can be read without one. Deliberately
elsewhere: the model (`loopaware.models.huginn`).
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from loopaware import hub
from loopaware.checks import bounded

__all__ = ["HuginnConfig"]

ONLY = {
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "sampling_scheme": "poisson-lognormal-filling",
    "test_time_noise": 0,
}
"""Fields of the released config that name a part, and the only one there is."""

DERIVED = ("padded_vocab_size", "num_key_value_heads", "head_dim", "effective_expected_depth", "init_values")
"""Fields of the released config that follow from others."""


class HuginnConfig(PreTrainedConfig):
    """The config of a `HuginnForCausalLM`, with the released fields; defaults are the released model's.

    Args:
        n_embd: features.
        n_heads: of attention.
        n_layers: all of them; follows from the next three.
        n_layers_in_prelude, n_layers_in_recurrent_block, n_layers_in_coda: layers before, in and behind the loop.
        mean_recurrence: steps in evaluation, and the mean of r in training, n = 1 + Poisson(r).
        mean_backprop_depth: how many last steps are differentiated.
        qk_bias: whether queries and keys have biases.
        block_size: the longest text of training; longer ones are read, too.
        rope_base: of the rotary angles.

    Raises:
        ValueError: the file is another model's, a number is out of range, or a part is named that there is not.

    >>> HuginnConfig(mean_recurrence=64).num_hidden_layers
    8
    """

    model_type = "huginn_raven"
    attribute_map = {  # noqa: RUF012 - transformers' way
        "num_attention_heads": "n_heads",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layers",
    }
    keys_to_ignore_at_inference = ["past_key_values", "steps", "halted", "exits"]  # noqa: RUF012

    n_embd: int = 5280
    n_heads: int = 55
    n_layers: int = 8
    block_size: int = 4096
    vocab_size: int = 65536
    padding_multiple: int = 4096
    tie_embeddings: bool = True
    intermediate_size: int = 17920
    bias: bool = False
    architecture_class_name: str = "RecurrentGPT"
    block_class_name: str = "SandwichBlock"
    norm_class_name: str = "RMSNorm_llama"
    norm_eps: float = 1e-6
    mlp_class_name: str = "GatedMLP"
    nonlin_name: str = "SiLU"
    init_strategy: str = "takase"
    init_orthogonal: bool = False
    state_init: str = "like-init"
    injection_type: str = "linear"
    n_layers_in_recurrent_block: int = 4
    mean_recurrence: int = 32
    sampling_scheme: str = "poisson-lognormal-filling"
    mean_backprop_depth: int = 8
    n_layers_in_prelude: int = 2
    n_layers_in_coda: int = 2
    qk_bias: bool = True
    activation_checkpoint_impl: str = "per-iteration"
    rope_base: float = 50_000.0
    test_time_noise: float = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def _filled(self, **more: Any) -> None:
        """What follows from the fields; `more` is what a file holds besides them, which transformers takes."""
        hub.own(type(self), more)
        super().__post_init__(**{name: value for name, value in more.items() if name not in DERIVED})
        self.tie_word_embeddings = self.tie_embeddings
        checked(self)
        self.n_layers = self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda
        self.head_dim = self.n_embd // self.n_heads

    __post_init__ = _filled

    @property
    def depth(self) -> int:
        """Layers that a token goes through on average, to which the first weights are scaled."""
        outside = self.n_layers_in_prelude + self.n_layers_in_coda
        return outside + self.n_layers_in_recurrent_block * self.mean_recurrence


def checked(config: HuginnConfig) -> None:
    """Refuse what there is not."""
    for name, only in ONLY.items():
        if getattr(config, name) != only:
            raise ValueError(
                f"{name} must be {only!r}, as in the released Huginn, got {getattr(config, name)!r}. Build another "
                "model of loopaware.models.looped_lm."
            )
    numbers = ("n_embd", "n_heads", "n_layers_in_recurrent_block", "mean_recurrence", "mean_backprop_depth")
    for name in numbers:
        bounded(name, getattr(config, name), "It counts features, layers or steps.")
    for name in ("n_layers_in_prelude", "n_layers_in_coda"):
        bounded(name, getattr(config, name), "It counts layers.", least=0)
    if config.n_embd % (2 * config.n_heads):
        raise ValueError(
            f"n_heads must divide n_embd into heads of an even size, got {config.n_heads} and {config.n_embd}. Rotary "
            "angles turn pairs."
        )


hub.complete()
