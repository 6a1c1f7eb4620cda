"""The config of a causal model with a loop in its middle, under the name that transformers' Auto classes know it by.

In: JSON. Out: a `LoopedConfig`. It stands apart from the model so that a config can be read without one. Deliberately
elsewhere: the model (`loopaware.models.looped_lm`).
"""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from loopaware import hub
from loopaware.checks import bounded

__all__ = ["LoopedConfig"]

INJECTIONS = ("none", "add", "concat", "gated", "diagonal")
STARTS = ("input", "zeros", "noise")
POLICIES = ("latest", "exact", "first", "last")
EXITS = ("last", "every", "gate")


class LoopedConfig(PreTrainedConfig):
    """The config of a `LoopedForCausalLM`.

    Args:
        base: config of the dense model whose layers these are, or a dict of it with its `model_type`.
        prelude: layers before the loop; `core` layers are in it, `coda` behind it; together all layers of the base.
        steps: how often the core runs at most.
        injection: how x enters every step: none, add, concat, gated or diagonal (`loopaware.nn`).
        start: h_0: input, zeros or noise.
        noise: standard deviation of the noise.
        policy: which keys and values serve later tokens: latest, exact, first or last (`loopaware.lm.policies`).
        truncate: how many last steps are differentiated; None is all.
        exits: what is taught: last, every, or gate, which adds a learned exit gate.
        threshold: the gate's, in evaluation; 1 never leaves.
        entropy: what the gate's entropy counts in the loss.

    Raises:
        ValueError: an option is out of range, or the layers do not add up.

    >>> config = LoopedConfig(base={"model_type": "llama", "num_hidden_layers": 4}, prelude=1, core=2, coda=1, steps=8)
    >>> config.base.num_hidden_layers, config.steps
    (4, 8)
    """

    model_type = "looped"
    sub_configs_defaults = {"base": SubConfigSpec(config_class=AutoConfig, model_type="llama")}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "steps", "halted", "exits"]  # noqa: RUF012

    base: Any = None
    prelude: int = 2
    core: int = 4
    coda: int = 2
    steps: int = 4
    injection: str = "none"
    start: str = "input"
    noise: float = 0.02
    policy: str = "latest"
    truncate: int | None = None
    exits: str = "last"
    threshold: float = 1.0
    entropy: float = 0.05
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def _filled(self, **more: Any) -> None:
        """What transformers calls with whatever else a config.json holds."""
        hub.own(type(self), more)
        self.base = copy.deepcopy(self.base)  # whose attention is set with this model's
        super().__post_init__(**more)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.base, name, None))
        self.tie_word_embeddings = self.tie_word_embeddings or self.base.tie_word_embeddings
        checked(self)

    __post_init__ = _filled

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Sizes and attention are the base's."""
        return self.base


def checked(config: LoopedConfig) -> None:
    """Refuse options that are out of range."""
    for name, least in (("prelude", 0), ("core", 1), ("coda", 0), ("steps", 1)):
        bounded(name, getattr(config, name), "It counts layers or steps.", least)
    layers = config.prelude + config.core + config.coda
    if layers != config.base.num_hidden_layers:
        raise ValueError(
            f"prelude, core and coda must add up to the base's {config.base.num_hidden_layers} layers, got {layers}. "
            "Set num_hidden_layers of the base to what you want in all."
        )
    for name, least, most in (("noise", 0.0, math.inf), ("threshold", 0.0, 1.0), ("entropy", 0.0, math.inf)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least} to {most}, got {value!r}. Set it in the config.")
    choices = {"injection": INJECTIONS, "start": STARTS, "policy": POLICIES, "exits": EXITS}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}. Choose one.")
    seen(config)


def seen(config: LoopedConfig) -> None:
    """Refuse loops that never see the text, or whose prelude is never taught."""
    if config.truncate is not None:
        bounded("truncate", config.truncate, "Without a differentiated step nothing is learned.")
    if config.injection != "none":
        return
    if config.start != "input":
        raise ValueError(
            f"start must be 'input' where nothing is injected, got {config.start!r}. The loop would never see the "
            "text: take injection='add' or another."
        )
    if config.truncate is not None and config.truncate < config.steps:
        raise ValueError(
            f"truncate must be None where nothing is injected, got {config.truncate}. Prelude and embeddings would "
            "learn nothing: take injection='add' or another."
        )


hub.complete()
