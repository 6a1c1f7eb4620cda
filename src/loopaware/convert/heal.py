"""Healing: a converted model learns, on text, to run its loop any number of times.

In: a causal model with a loop, a text as tokens. Out: the same model, trained in place. Deliberately elsewhere: the
training loop (`loopaware.train.fit`), distributions of depths (`loopaware.halt.depths`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from loopaware import train
from loopaware.checks import between, bounded
from loopaware.halt.depths import Depth
from loopaware.models.looped_encoder import LoopedEncoder, LoopedForMaskedLM


@dataclass(frozen=True)
class Curriculum:
    """A depth for each step of training, one for the batch: n = 1 + s (n_drawn - 1), rounded, s from 0 to 1.

    Args:
        depth: what is drawn from in the end.
        growing: the share of the steps in which s grows.

    Raises:
        ValueError: the share is not from 0 to 1.

    References: S. McLeish et al., "Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence",
    2025, arXiv 2511.07384.

    >>> from loopaware import halt
    >>> [Curriculum(halt.depths.Fixed(5), growing=0.5).at(step, 8) for step in range(8)]
    [1, 2, 3, 4, 5, 5, 5, 5]
    """

    depth: Depth
    growing: float = 0.5

    def __post_init__(self):
        if not 0 <= self.growing <= 1:
            raise ValueError(f"growing must be from 0 to 1, got {self.growing}. It is a share of the steps.")

    def at(self, step: int, steps: int) -> int:
        """The depth of a step; PyTorch's generator, which `train.fit` seeds at each step, draws it."""
        drawn = 1 + int(torch.multinomial(self.depth.chances(), 1))
        grown = min(1.0, step / (self.growing * steps)) if self.growing else 1.0
        return 1 + round(grown * (drawn - 1))


def heal(
    model: nn.Module,
    tokens: Tensor,
    curriculum: Curriculum,
    *,
    steps: int,
    batch: int = 8,
    length: int = 128,
    rate: float = 3e-4,
    journal: train.Journal | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train on windows of a text, at depths that a curriculum draws; in place. Returns the metrics.

    With a journal it goes on where it was killed, and ends with the same numbers.

    Args:
        model: causal, with a loop: `model(tokens, labels=tokens, max_steps=n)`.
        tokens: the text.
        batch: windows in a step, of `length` tokens each.
        rate: learning rate of AdamW, after a warm-up of a tenth of the steps, then a cosine.

    Shapes: tokens (N) long.

    Raises:
        ValueError: the model predicts no next token, the text is shorter than a window, or a number is out of range.
    """
    if isinstance(model, LoopedEncoder | LoopedForMaskedLM):
        raise ValueError(
            f"a model must be causal to be healed, got {type(model).__name__}. Train it on a task of its own."
        )
    optimizer = AdamW(groups(model), lr=between("rate", rate, 0.0, 1.0, "1e-4 is usual."), betas=(0.9, 0.95))
    schedule = train.Warmup(max(1, steps // 10), then=train.Cosine(floor=0.1))
    windows = drawn(tokens, batch, length)
    was = model.training
    lines = train.fit(
        model, loss(curriculum, steps), windows, optimizer, steps=steps, schedule=schedule, journal=journal, seed=seed
    )
    model.train(was)
    return lines


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    return [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 0.01},
        {"params": [weight for weight in model.parameters() if weight.ndim < 2], "weight_decay": 0.0},
    ]


def drawn(tokens: Tensor, batch: int, length: int) -> Callable[[int, torch.Generator], Tensor]:
    """Batches of windows that begin anywhere. Shapes: -> (batch, length)."""
    bounded("batch", batch, "It counts windows.")
    bounded("length", length, "A prediction needs a token before it.", 2)
    if tokens.ndim != 1 or len(tokens) < length:
        raise ValueError(
            f"tokens must be one text of at least {length} tokens, got the shape {tuple(tokens.shape)}. "
            "Give more text, or shorter windows."
        )

    def batches(_: int, generator: torch.Generator) -> Tensor:
        first = torch.randint(len(tokens) - length + 1, (batch, 1), generator=generator)
        return tokens[first + torch.arange(length)]

    return batches


def loss(curriculum: Curriculum, steps: int) -> Any:
    """The model's own loss at the depth of the step."""

    def objective(model: nn.Module, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        depth = curriculum.at(step, steps)
        out = model(input_ids=batch, labels=batch, use_cache=False, max_steps=depth)
        return out.loss, {"steps": float(depth)}

    return objective


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """A text as tokens, without those that mark begin and end. Shapes: -> (N) long."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def content(file: str | Path) -> str:
    """What a text file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text in UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be a text in UTF-8, got {error}. Convert it.") from error


@torch.no_grad()
def held_out(model: nn.Module, windows: Tensor, max_steps: int, batch: int = 16) -> float:
    """The loss on a text in nats per token, at so many loops. Shapes: windows (N, T) long."""
    losses = [
        model(input_ids=part, labels=part, use_cache=False, max_steps=max_steps).loss * len(part)
        for part in windows.split(batch)
    ]
    return float(torch.stack(losses).sum() / len(windows))
