"""What the authors' code answered (tests/recorded), and the two ways to ask ours: at once and in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loopaware.lm import LoopCache, RecurrentForCausalLM
from loopaware.testing import assert_close

FOLDER = Path(__file__).parent / "recorded"


def recording(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors without the weights, weights by released names, and the metadata with the config's fields."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    tensors = {key: tensor.float() if tensor.dtype == torch.float16 else tensor for key, tensor in tensors.items()}
    weights = {key.removeprefix("model."): each for key, each in tensors.items() if key.startswith("model.")}
    return {key: each for key, each in tensors.items() if not key.startswith("model.")}, weights, metadata


@torch.no_grad()
def pieces(
    model: RecurrentForCausalLM, ids: Tensor, cuts: list[int], mask: Tensor | None = None, max_steps: int | None = None
) -> tuple[Tensor, Tensor, LoopCache]:
    """Logits and steps of all tokens, read in pieces that end at the cuts and at the end, and the cache."""
    cache, logits, steps = None, [], []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True, max_steps=max_steps)
        cache = out.past_key_values
        logits.append(out.logits)
        steps.append(out.steps)
    assert cache is not None
    return torch.cat(logits, 1), torch.cat(steps, 1), cache


def alike(model: RecurrentForCausalLM, ids: Tensor, logits: Tensor, steps: Tensor) -> None:
    """Each row alone, the first one also token by token, has the logits and steps that it has in the batch."""
    for row in range(len(ids)):
        for cuts in ([], SINGLY)[: 1 + (row == 0)]:
            alone, its_steps, _ = pieces(model, ids[row : row + 1], cuts)
            assert torch.equal(its_steps[0], steps[row])
            assert_close(alone[0], logits[row], "batch N equals batch 1")


SINGLY = list(range(1, 11))
"""Cuts after every token of the recorded ids."""
