"""Loading a checkpoint, all of it or nothing: one error that names the folder, what is wrong and what to do.

In: a folder or a name, and transformers' options for `from_pretrained`. Out: the model. Deliberately elsewhere: reading
files, which transformers does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

SHOWN = 5
"""How many names of each kind an error lists."""


def _complete(cls: type[PreTrainedModel], folder: Any, *inputs: Any, **options: Any) -> Any:
    """`from_pretrained`, where transformers would go on with what is missing or too much.

    Raises:
        ValueError: weights are missing, unexpected, of another shape or not finite, the file is damaged, or the config
            is another model's or out of range.
    """
    asked = options.pop("output_loading_info", False)
    lenient = options.pop("ignore_mismatched_sizes", False)
    load = PreTrainedModel.from_pretrained.__func__
    kind = f"{folder} must hold a whole {cls.__name__}"
    try:
        model, info = load(cls, folder, *inputs, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{kind}, got: {error} Fetch or save it again, or load it as what it is.") from error
    found = wrong(model, info, lenient)
    if found:
        raise ValueError(
            f"{kind}, got {'; '.join(found)}. Fetch or save it again; weights of parts that the config does not name "
            "are loaded with load_state_dict once the same parts are in model.loop."
        )
    return (model, info) if asked else model


from_pretrained = classmethod(_complete)


def wrong(model: PreTrainedModel, info: dict[str, Any], lenient: bool) -> list[str]:
    """What is wrong with what was loaded, in words."""
    shapes = (
        [] if lenient else [f"{key} {tuple(theirs)} for {tuple(ours)}" for key, theirs, ours in info["mismatched_keys"]]
    )
    broken = [name for name, weight in model.named_parameters() if not finite(weight)]
    lists = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": shapes,
        "with nan or inf": broken,
    }
    return [f"{listed(names)} {what}" for what, names in lists.items() if names]


def finite(weight: torch.Tensor) -> bool:
    """Whether all numbers are; weights that are elsewhere, or no floating-point numbers, are not looked at."""
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return True
    return float(weight.detach().abs().amax()) < math.inf


def listed(names: Any) -> str:
    """The first names, and how many more."""
    first = sorted(names)[:SHOWN]
    return ", ".join(first) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
