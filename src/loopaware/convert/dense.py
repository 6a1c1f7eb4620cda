"""A dense model of transformers as prelude, loop and coda: the same weights under other names.

In: a dense model, which layers stand where. Out: a model with a loop that at one step is the dense one, or one whose
loop takes the place of layers that were not shared. Deliberately elsewhere: which layers to choose
(`loopaware.convert.choose`), folders (`loopaware.convert.folder`), training (`loopaware.convert.heal`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loopaware import body
from loopaware import nn as blocks
from loopaware.checks import bounded
from loopaware.lm.layers import anatomy
from loopaware.models.looped_config import LoopedConfig
from loopaware.models.looped_encoder import LoopedEncoder, LoopedForMaskedLM
from loopaware.models.looped_lm import LoopedForCausalLM
from loopaware.models.relaxed_lm import RelaxedConfig, RelaxedForCausalLM

Looped = LoopedForCausalLM | LoopedEncoder | LoopedForMaskedLM


@dataclass(frozen=True)
class Split:
    """Which layers of a dense model stand before the loop, in it and behind it; those not named are left out.

    >>> Split.of(range(6), prelude=1, core=2, coda=3)
    Split(prelude=(0,), core=(1, 2), coda=(3, 4, 5))
    """

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]

    @classmethod
    def of(cls, layers: Iterable[int], prelude: int, core: int, coda: int) -> Split:
        """So many of these layers each.

        Raises:
            ValueError: they do not add up, or there is no core.
        """
        layers = tuple(layers)
        for name, count, least in (("prelude", prelude, 0), ("core", core, 1), ("coda", coda, 0)):
            bounded(name, count, "It counts layers.", least)
        if prelude + core + coda != len(layers):
            raise ValueError(
                f"prelude, core and coda must add up to the {len(layers)} layers that are kept, got {prelude} + {core} "
                f"+ {coda}. Give other numbers, or drop layers."
            )
        return cls(layers[:prelude], layers[prelude : prelude + core], layers[prelude + core :])

    @property
    def layers(self) -> tuple[int, ...]:
        """All that are kept, in order."""
        return (*self.prelude, *self.core, *self.coda)


def looped(dense: PreTrainedModel, split: Split, steps: int = 1, injection: str = "none") -> Looped:
    """A dense model with its core in a loop. At one step it equals the dense one without the layers left out.

    With an injection too: it begins as what gives x where h_0 is x. Weights are copied.

    Args:
        dense: a causal model that `loopaware.lm.layers` knows, or a BERT.
        steps: of the loop; any number can be asked for later.
        injection: how x enters every step: none, add, concat, gated or diagonal.

    Raises:
        ValueError: another kind of model, layers that it does not have, or that cannot stand elsewhere.
    """
    known(dense)
    config = configured(dense, split.layers)
    start = "zeros" if injection == "add" else "input"
    sizes: dict[str, Any] = {"prelude": len(split.prelude), "core": len(split.core), "coda": len(split.coda)}
    settings = LoopedConfig(base=config, steps=steps, injection=injection, start=start, **sizes)
    return filled(kind(dense)(settings), dense, split.layers)


def tied(
    dense: PreTrainedModel, prelude: int, core: int, coda: int, *, rank: int = 0, shared: int | None = None
) -> LoopedForCausalLM:
    """A dense model whose layers between prelude and coda become a loop over `core` layers, as often as they fit.

    Step t stands for the t-th group of `core` layers. The shared weights are the groups' mean; with a rank each step
    has differences to them, the nearest of that rank. At full rank this is the dense model.

    Args:
        prelude: layers before the loop, `coda` behind it; those between are a multiple of `core`.
        rank: of the differences; 0 is none.
        shared: a group whose weights are shared in place of the mean.

    Raises:
        ValueError: no causal model, layers that do not fit, or groups of different layers.

    References: S. Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA", 2024,
    arXiv 2410.20672.
    """
    known(dense, encoders=False)
    groups = grouped(dense.config.num_hidden_layers, prelude, core, coda)
    alike(dense.config, groups)
    last = range(dense.config.num_hidden_layers - coda, dense.config.num_hidden_layers)
    kept = (*range(prelude), *groups[0], *last)
    settings: dict[str, Any] = {"prelude": prelude, "core": core, "coda": coda, "steps": len(groups)}
    settings["base"] = configured(dense, kept)
    if rank:
        config = RelaxedConfig(**settings, rank=bounded("rank", rank, "0 is none."), differing=len(groups))
        model: LoopedForCausalLM = RelaxedForCausalLM(config)
    else:
        model = LoopedForCausalLM(LoopedConfig(**settings))
    filled(model, dense, kept)
    layers = parts(dense).layers
    own = [named(nn.ModuleList(layers[number] for number in group)) for group in groups]
    common = mean(own) if shared is None else own[chosen(shared, len(own))]
    model.core.layers.load_state_dict(common)
    if isinstance(model, RelaxedForCausalLM):
        for step, wanted in enumerate(own):
            fit(model.relaxed, step, common, wanted)
    return model


def fit(relaxed: body.Relaxed, step: int, common: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    variants = relaxed.variants
    assert isinstance(variants, blocks.LowRank)
    prefixed = [{f"layers.{name}": weight for name, weight in each.items()} for each in (common, wanted)]
    variants.take(step, *prefixed)


def grouped(layers: int, prelude: int, core: int, coda: int) -> list[range]:
    """The layers that each step takes the place of."""
    for name, count, least in (("prelude", prelude, 0), ("core", core, 1), ("coda", coda, 0)):
        bounded(name, count, "It counts layers.", least)
    between = layers - prelude - coda
    if between < core or between % core:
        raise ValueError(
            f"the layers between prelude and coda must be a multiple of the core's {core}, got {between} of {layers}. "
            "Move layers into the prelude or the coda, or take another core."
        )
    return [range(first, first + core) for first in range(prelude, layers - coda, core)]


def chosen(number: int, groups: int) -> int:
    if not 0 <= number < groups:
        raise ValueError(f"shared must be a group from 0 to {groups - 1}, got {number}. None takes their mean.")
    return number


def alike(config: PreTrainedConfig, groups: Sequence[Sequence[int]]) -> None:
    """Refuse groups whose layers attend in different ways."""
    for name, values in per_layer(config).items():
        if len({tuple(values[number] for number in group) for group in groups}) > 1:
            raise ValueError(
                f"groups of layers must be alike to share weights, got {name} {values}. Take a core that is a multiple "
                "of the pattern's length."
            )


def per_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The entries of a config that say something of each layer."""
    entries = {name: value for name, value in vars(config).items() if "layer" in name}
    lists = {name: list(value) for name, value in entries.items() if isinstance(value, list | tuple)}
    return {name: values for name, values in lists.items() if len(values) == config.num_hidden_layers}


def configured(dense: PreTrainedModel, layers: Sequence[int]) -> PreTrainedConfig:
    """The config of the dense model with these layers alone.

    Raises:
        ValueError: a layer that it does not have, or one that moves although it depends on its number.
    """
    config: Any = copy.deepcopy(dense.config)
    have = config.num_hidden_layers
    missing = [number for number in layers if not 0 <= number < have]
    if missing or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"layers must be some of 0 to {have - 1}, each once and in order, got {list(layers)}. Name others."
        )
    if list(layers) == list(range(have)):
        return config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "layers must not depend on their number where some are left out or tied, got "
            "scale_attn_by_inverse_layer_idx. Keep them all."
        )
    for name, values in per_layer(config).items():
        setattr(config, name, [values[number] for number in layers])
    config.num_hidden_layers = len(layers)
    return config


def known(dense: PreTrainedModel, encoders: bool = True) -> None:
    """Refuse models whose layers cannot stand in a loop."""
    if not (encoders and dense.config.model_type == "bert"):
        anatomy(dense.config.model_type)


def kind(dense: PreTrainedModel) -> Callable[[LoopedConfig], Looped]:
    """The class that a dense model becomes."""
    if dense.config.model_type != "bert":
        return LoopedForCausalLM
    return LoopedForMaskedLM if hasattr(dense, "cls") else LoopedEncoder


@dataclass(frozen=True)
class Parts:
    """A model's layers, and its other modules with the names that they share in dense and looped models."""

    layers: Sequence[nn.Module]
    others: dict[str, nn.Module | None]


def parts(dense: Any) -> Parts:
    """Where a dense model keeps what."""
    if dense.config.model_type == "bert":
        bert = dense.base_model
        others = {"embeddings": bert.embeddings, "pooler": bert.pooler, "head": getattr(dense, "cls", None)}
        return Parts(bert.encoder.layer, others)
    names, inner = anatomy(dense.config.model_type), dense.base_model
    places = getattr(inner, names.places) if names.places else None
    others = {"embed_tokens": getattr(inner, names.tokens), "embed_places": places, "norm": getattr(inner, names.norm)}
    return Parts(getattr(inner, names.layers), {**others, "lm_head": dense.lm_head})


@torch.no_grad()
def filled(model: Any, dense: PreTrainedModel, layers: Sequence[int]) -> Any:
    """The model with the dense one's weights, mode, precision and generation config."""
    old, inside = parts(dense), getattr(model, "encoder", model)
    for new, number in zip(inside.layers, layers, strict=True):
        new.load_state_dict(old.layers[number].state_dict())
    for name, module in old.others.items():
        if module is not None:
            owner = model if hasattr(model, name) else inside
            getattr(owner, name).load_state_dict(module.state_dict())
    fusion = getattr(inside.loop.body, "fusion", None)
    if isinstance(fusion, blocks.Concat):
        half = torch.eye(fusion.linear.out_features).div(2)
        fusion.linear.weight.copy_(torch.cat((half, half), 1))
    model.to(dense.dtype).train(dense.training)
    model.config.dtype = dense.dtype
    if dense.can_generate() and model.can_generate():
        model.generation_config = copy.deepcopy(dense.generation_config)
    return model


def named(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def mean(groups: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of weights of the same names."""
    return {name: torch.stack([each[name].double() for each in groups]).mean(0) for name in groups[0]}


@torch.no_grad()
def apart(dense: PreTrainedModel, model: Any, max_steps: int = 1, seed: int = 0) -> float:
    """The largest difference between the two models' logits, or states without a head, on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = min(16, getattr(dense.config, "max_position_embeddings", 16))
    tokens = torch.randint(dense.config.vocab_size, (2, length), generator=generator).to(dense.device)
    theirs, ours = dense(input_ids=tokens), model(input_ids=tokens, max_steps=max_steps)
    field = "logits" if "logits" in theirs else "last_hidden_state"
    return (theirs[field] - ours[field]).abs().max().item()
