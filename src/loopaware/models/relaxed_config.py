"""The config of a causal model whose loop takes the place of layers that were not shared.

In: JSON. Out: a `RelaxedConfig`. Deliberately elsewhere: the model (`loopaware.models.relaxed_lm`).
"""

from __future__ import annotations

from typing import Any

from loopaware import hub
from loopaware.checks import bounded
from loopaware.models.looped_config import LoopedConfig

__all__ = ["RelaxedConfig"]


class RelaxedConfig(LoopedConfig):
    """The config of a `RelaxedForCausalLM`: that of a `LoopedForCausalLM`, and what each step has of its own.

    Args:
        rank: of the differences between a step's matrices and the shared ones.
        differing: how many steps have differences of their own; later ones use those of the last.

    Raises:
        ValueError: an option is out of range, or the layers do not add up.

    >>> base = {"model_type": "llama", "num_hidden_layers": 3}
    >>> RelaxedConfig(base=base, prelude=1, core=1, coda=1, steps=4, rank=2, differing=4).rank
    2
    """

    model_type = "relaxed"

    rank: int = 8
    differing: int = 2

    def _filled(self, **more: Any) -> None:
        """What transformers calls with whatever else a config.json holds."""
        super()._filled(**more)
        bounded("rank", self.rank, "Take a LoopedConfig for no differences.")
        bounded("differing", self.differing, "Take a LoopedConfig for no differences.")

    __post_init__ = _filled


hub.complete()
