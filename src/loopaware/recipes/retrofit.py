"""Retrofit: a small pretrained Llama is given a loop, healed, and held against itself trained for as long.

In: options, perhaps a folder with a Llama and a text. Out: a folder with `report.html`, `results.json`, the base in
transformers' format, and a run for each model and seed that goes on after a kill. Without a folder the recipe first
trains a Llama on the bytes of Python's own reference manual, which comes with Python (`pydoc_data.topics`).
Deliberately elsewhere: conversion and healing (`loopaware.convert`), pictures and tables
(`loopaware.recipes.retrofit_report`).

References: S. McLeish et al., "Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence", 2025,
arXiv 2511.07384; S. Bae et al., "Relaxed Recursive Transformers", 2024, arXiv 2410.20672. Both heal for billions of
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loopaware import files, train
from loopaware.checks import bounded
from loopaware.halt.depths import Depth, Fixed, Uniform
from loopaware.recipes.retrofit_report import (
    LONGER,
    LOOPED,
    ORIGINAL,
    RELAXED,
    TIED,
    TUNED,
    UNHEALED,
    Comparison,
    Plan,
    Score,
    report,
    table,
)
from loopaware.recipes.shared import show
from loopaware.train.progress import Progress, within

HELD = 10
"""One part in so many, at the end of the text, is never trained on."""


def run(
    folder: Path = Path("runs/retrofit"),
    *,
    base: Path | None = None,
    text: Path | None = None,
    core: int = 2,
    choose: Literal["similarity", "repetition"] = "repetition",
    depth: int = 4,
    rank: int = 8,
    injection: Literal["none", "add", "concat", "gated", "diagonal"] = "none",
    pretraining: int = 900,
    steps: int = 150,
    batch: int = 16,
    length: int = 128,
    rate: float = 1e-3,
    windows: int = 128,
    seeds: tuple[int, ...] = (0, 1),
    threads: int = 1,
) -> None:
    """Give a pretrained Llama a loop, heal it, and compare it with the original trained as long; write a report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        base: folder of a dense causal model with its tokenizer, or a .gguf file; a small one is trained if not given.
        text: a text file to heal and test on; Python's reference manual if not given.
        core: layers that repeat.
        choose: how they are chosen, least turn of the state (similarity) or of the prediction (repetition).
        depth: loops drawn in healing are from 1 to this; tests go to twice as many.
        rank: of what each step keeps of its own where layers are tied.
        injection: how the loop's input enters every step of the looped model.
        pretraining: training steps of the small base.
        steps: training steps of the healing, and of the original's fine-tuning.
        batch: windows in a training step.
        length: tokens in a window.
        rate: learning rate of the healing and fine-tuning.
        windows: windows of the held-out text that are tested on.
        seeds: of healing and fine-tuning; the base is one.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(core, choose, depth, rank, injection, pretraining, steps, batch, length, rate, windows)
    dense = None if base is None else opened(base)
    tokens = read(base, text)
    cut = len(tokens) - len(tokens) // HELD
    tests = spaced(tokens[cut:], plan)
    dense = pretrained(tokens[:cut], plan, folder) if dense is None else dense
    comparison = compared(dense, spaced(tokens[:cut], plan), plan)
    scores = raced(made(dense, comparison, plan), tokens[:cut], tests, plan, seeds, folder)
    plain = {seed: {name: score._asdict() for name, score in by.items()} for seed, by in scores.items()}
    about = {"plan": plan._asdict(), "tokens": len(tokens), "layers": [group._asdict() for group in comparison.groups]}
    files.write(folder / "results.json", json.dumps({**about, "results": plain}, indent=1))
    show("held-out loss, nats per token", *table(scores, plan))
    print(f"report: {report(scores, comparison, plan, len(tokens), base).write(folder / 'report.html')}")


def raced(
    models: dict[str, Any], tokens: Tensor, tests: Tensor, plan: Plan, seeds: tuple[int, ...], folder: Path
) -> dict[int, dict[str, Score]]:
    """Every model, trained with every seed and tested."""
    scores: dict[int, dict[str, Score]] = {}
    pairs = [(seed, name) for seed in seeds for name in (TUNED, LONGER, LOOPED, TIED, RELAXED)]
    known = {name: tested(models[name](), name, plan, tests) for name in (ORIGINAL, UNHEALED)}
    for seed, name in within(Progress(len(pairs), done=0, wanted=True), pairs):
        print(f"seed {seed}: {name}", flush=True)
        torch.manual_seed(seed)
        model = healed(models[name](), name, tokens, plan, seed, folder)
        scores.setdefault(seed, dict(known))[name] = tested(model, name, plan, tests)
    return scores


def read(base: Path | None, text: Path | None) -> Tensor:
    """The text as the base's tokens; the small base's are bytes. Shapes: -> (N) long."""
    from loopaware import convert

    said = manual() if text is None else convert.content(text)
    if base is not None:
        return convert.tokenized(convert.tokenizer(base), said)
    return torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8).long()


def manual() -> str:
    """Python's reference manual, as `help` knows it."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def opened(base: Path) -> Any:
    from loopaware import convert

    dense = convert.read(base)
    if not dense.can_generate():
        raise ValueError(
            f"base must be a causal model to be trained on text, got {type(dense).__name__}. Take another."
        )
    return dense.float()


def pretrained(tokens: Tensor, plan: Plan, folder: Path) -> Any:
    """A Llama of six layers of 64 features over bytes, trained or read from its finished run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from loopaware import convert

    where = folder / "base"
    if (where / "config.json").exists():
        return convert.read(where)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, **sizes, max_position_embeddings=512, tie_word_embeddings=True)
    )
    convert.heal(
        Plain(dense),
        tokens,
        convert.Curriculum(Fixed(1)),
        steps=plan.pretraining,
        batch=plan.batch,
        length=plan.length,
        rate=3e-3,
        journal=train.Journal(
            folder / "base-training", save_every=300, about={"batch": plan.batch, "length": plan.length}
        ),
    )
    convert.write(dense, where)
    return dense.eval()


class Plain(nn.Module):
    """A dense model where one with a loop is asked for."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.dense = dense

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool, max_steps: int) -> Any:
        assert max_steps == 1
        return self.dense(input_ids=input_ids, labels=labels, use_cache=use_cache)


def spaced(tokens: Tensor, plan: Plan) -> Tensor:
    """Windows at equal distances. Shapes: -> (windows, length)."""
    if len(tokens) < plan.length:
        raise ValueError(f"text must have at least {plan.length * HELD} tokens, got fewer. Take a longer one.")
    first = torch.linspace(0, len(tokens) - plan.length, plan.windows).long()
    return tokens[first[:, None] + torch.arange(plan.length)]


def compared(dense: Any, windows: Tensor, plan: Plan) -> Comparison:
    """All groups of layers, and the one to repeat."""
    from loopaware import convert

    found = convert.groups(dense, windows[:: max(1, len(windows) // 8)], plan.core)
    return Comparison(dense.config.num_hidden_layers, found, convert.least(found, plan.choose))


def made(dense: Any, comparison: Comparison, plan: Plan) -> dict[str, Any]:
    """How each model is made of the base."""
    from loopaware import convert

    layers, best = comparison.layers, comparison.best
    split = convert.Split.of(range(layers), best.first, best.size, layers - best.first - best.size)
    rest = (layers - 2) % plan.core

    def original() -> Any:
        return convert.looped(dense, split)

    def tied(rank: int) -> Any:
        return convert.tied(dense, 1 + rest, plan.core, 1, rank=rank)

    return {
        ORIGINAL: original,
        TUNED: original,
        LONGER: original,
        UNHEALED: lambda: convert.looped(dense, split, plan.depth, plan.injection),
        LOOPED: lambda: convert.looped(dense, split, plan.depth, plan.injection),
        TIED: lambda: tied(0),
        RELAXED: lambda: tied(plan.rank),
    }


def depths(model: Any, name: str, plan: Plan) -> tuple[Depth, float, int]:
    """What is drawn in training, the share of steps in which it grows, and how many steps there are."""
    if name == LOOPED:
        return Uniform(1, plan.depth), GROWING, plan.steps
    if name in (TIED, RELAXED):
        return Fixed(model.config.steps), 0.0, plan.steps
    loops = 1 + (plan.depth - 1) / 2 * (1 - GROWING / 2)
    layers = len(model.layers)
    extra = (layers + (loops - 1) * plan.core) / layers
    return Fixed(1), 0.0, round(plan.steps * (extra if name == LONGER else 1))


GROWING = 0.5
"""The share of the healing in which depth grows."""


def healed(model: Any, name: str, tokens: Tensor, plan: Plan, seed: int, folder: Path) -> Any:
    """A model, trained or read from its finished run."""
    from loopaware import convert

    depth, growing, steps = depths(model, name, plan)
    convert.heal(
        model,
        tokens,
        convert.Curriculum(depth, growing),
        steps=steps,
        batch=plan.batch,
        length=plan.length,
        rate=plan.rate,
        journal=train.Journal(
            folder / f"{name.replace(',', '').replace(' ', '-')}-{seed}", save_every=100, about=plan._asdict()
        ),
        seed=seed,
    )
    return model


def tested(model: Any, name: str, plan: Plan, windows: Tensor) -> Score:
    """The loss at each number of loops, and what the model is made of."""
    from loopaware import convert

    model.eval()
    longest = 1 if name in (ORIGINAL, TUNED, LONGER) else 2 * plan.depth
    losses = [convert.held_out(model, windows, loops) for loops in range(1, longest + 1)]
    weights = sum(weight.numel() for weight in model.parameters())
    outside = len(model.prelude) + len(model.coda)
    return Score(
        losses, weights, [outside + loops * len(model.core) for loops in range(1, longest + 1)], model.config.steps
    )
