"""Bytes of English: a looped language model against plain ones of equal parameters and of equal operations.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each net and seed that goes on after a
kill. All four are `LoopedForCausalLM` with llama layers, told the same bytes; the plain ones run their
loop once. The looped one draws how often it runs its core at each training step. Deliberately elsewhere: the text
(`loopaware.tasks.text`), pictures and tables (`loopaware.recipes.text_report`).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from loopaware import execute, files, halt, train
from loopaware.checks import bounded
from loopaware.counting import counter
from loopaware.halt.depths import Uniform
from loopaware.recipes.shared import adam, show
from loopaware.recipes.text_report import (
    CONFIDENCE,
    ENTROPY,
    FEW,
    KL,
    LOOPED,
    MANY,
    NARROW,
    Net,
    Point,
    Result,
    report,
    table,
)
from loopaware.tasks import text
from loopaware.train.fit import Objective

THRESHOLDS = {
    KL: (0.1, 0.03, 0.01, 0.003, 0.001),
    ENTROPY: (2.5, 1.5, 0.8, 0.3, 0.1),
    CONFIDENCE: (0.3, 0.5, 0.7, 0.9, 0.99),
}
"""Of the exit curve: in nats, in nats, and probabilities."""


HELD_OUT = 0.1
"""The share of the text that nets are tested on, its end."""


class Plan(NamedTuple):
    """How nets are made and trained. One loop in the share `alone` of the steps, then `low` to `high`, all alike.

    Plain nets have `few` layers for as many parameters as the looped one, `many` for as many operations, and `deep` of
    `narrow` features for as many parameters in another shape.
    """

    dim: int = 64
    heads: int = 4
    low: int = 2
    high: int = 6
    steps: int = 500
    batch: int = 16
    length: int = 64
    rate: float = 4e-3
    prelude: int = 0
    core: int = 1
    coda: int = 0
    alone: float = 0.3
    injection: str = "add"
    few: int = 1
    many: int = 3
    narrow: int = 40
    deep: int = 3

    @property
    def loops(self) -> int:
        """The mean of the loops in training, and those of evaluation."""
        return round((self.low + self.high) / 2)

    @property
    def layers(self) -> dict[str, int]:
        """How many layers with weights of their own each net has."""
        return {LOOPED: self.prelude + self.core + self.coda, FEW: self.few, NARROW: self.deep, MANY: self.many}


class Lesson(NamedTuple):
    """Pieces of text, and how often the core is run on them. Shapes: tokens (B, T) long, loops () long."""

    tokens: Tensor
    loops: Tensor


def run(
    folder: Path = Path("runs/text"),
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 500,
    batch: int = 16,
    length: int = 64,
    dim: int = 64,
    heads: int = 4,
    low: int = 2,
    high: int = 6,
    deepest: int = 12,
    rate: float = 4e-3,
    count: int = 1000,
    exits: int = 128,
    threads: int = 1,
) -> None:
    """Train a looped model of bytes and three plain ones, sweep the loops, let tokens leave early, and report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        seeds: one net of each kind is trained with each seed.
        steps: training steps of each net.
        batch: pieces of text in a training step.
        length: bytes of a piece.
        dim: features of a byte's state; heads of attention must divide it.
        heads: of attention.
        low: the fewest loops in training.
        high: the most; the mean of both is run in evaluation.
        deepest: loops at the end of the sweep.
        rate: learning rate, which falls to a twentieth along half a wave.
        count: held-out pieces that nets are tested on, at most.
        exits: held-out pieces for the exit curve, at most, spread over all of them.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("high", high, "Swap low and high.", least=bounded("low", low, "A loop runs once at least."))
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(dim, heads, low, high, steps, batch, length, rate)
    source = text.topics(HELD_OUT)
    pieces = text.pieces(source, length)[: bounded("count", count, "Test on at least one piece.")]
    apart = max(1, len(pieces) // bounded("exits", exits, "Draw the curve from at least one piece."))
    exit_pieces = pieces[::apart][:exits]
    about = {**plan._asdict(), "loops": plan.loops, **source.about, "tested": pieces.numel(), "exits": len(exit_pieces)}
    results, page = [], folder / "report.html"
    for number, seed in enumerate(seeds):
        print(f"seed {seed} ({number + 1} of {len(seeds)}): training four nets, then testing", flush=True)
        nets = {name: trained(plan, source, seed, name, folder) for name in plan.layers}
        swept = {n: bits(nets[LOOPED], pieces, n)[0] for n in range(1, deepest + 1)}
        shown = {name: described(plan, seed, name, net, pieces, source) for name, net in nets.items()}
        results.append(Result(seed, shown, swept, curves(nets[LOOPED], exit_pieces, plan, deepest)))
        numbers = {"plan": about, "results": [result.plain() for result in results]}
        files.write(folder / "results.json", json.dumps(numbers, indent=1))
        page = report(results, about).write(page)
    show("held-out bits per byte", *table(results))
    print(f"report: {page}")


def made(plan: Plan, name: str) -> Any:
    """A net that is not trained yet."""
    from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM

    layers, dim = plan.layers[name], plan.narrow if name == NARROW else plan.dim
    base = {
        "model_type": "llama",
        "vocab_size": text.BYTES,
        "hidden_size": dim,
        "intermediate_size": 8 * dim // 3,
        "num_attention_heads": plan.heads,
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "initializer_range": 0.5 * dim**-0.5,
        "max_position_embeddings": 4 * plan.length,
    }
    shape: dict[str, Any] = {"prelude": 0, "core": layers, "coda": 0, "steps": 1}
    if name == LOOPED:
        shape = {"prelude": plan.prelude, "core": plan.core, "coda": plan.coda, "steps": plan.loops}
    net = LoopedForCausalLM(LoopedConfig(base=base, injection=plan.injection, **shape))
    net.loop = net.loop.replace(execute=execute.Eager())  # all tokens of a batch run on until the last has stopped
    return net


def trained(plan: Plan, source: text.Text, seed: int, name: str, folder: Path) -> Any:
    """A net, trained or read from its finished run."""
    torch.manual_seed(seed)
    net = made(plan, name)
    about = {**plan._asdict(), "net": name, "text": source.about["sha256"]}
    train.fit(
        net,
        cast(Objective, told),
        lessons(plan, source, seed, name),
        adam(net, plan.rate),
        steps=plan.steps,
        schedule=train.Warmup(min(50, plan.steps), then=train.Cosine(0.05)),
        journal=train.Journal(folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}", about=about),
        seed=seed,
    )
    return net.eval()


def told(net: nn.Module, lesson: Lesson, _: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropy of each next byte, in nats."""
    return net(lesson.tokens, labels=lesson.tokens, max_steps=int(lesson.loops)).loss, {"loops": lesson.loops}


def lessons(plan: Plan, source: text.Text, seed: int, name: str) -> Callable[[int, torch.Generator], Lesson]:
    """The same pieces for every net of a seed."""

    def batches(step: int, generator: torch.Generator) -> Lesson:
        tokens = text.drawn(source, plan.batch, plan.length, generator=generator)
        return Lesson(tokens, torch.tensor(drawn_loops(plan, seed, name, step)))

    return batches


def drawn_loops(plan: Plan, seed: int, name: str, step: int) -> int:
    """How often the core is run in a training step; drawn as `halt.Drawn(axes=0)` would, but known beforehand."""
    if name != LOOPED or step < plan.alone * plan.steps:
        return 1
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    return int(torch.multinomial(Uniform(plan.low, plan.high).chances(), 1, generator=generator)) + 1


def described(plan: Plan, seed: int, name: str, net: Any, pieces: Tensor, source: text.Text) -> Net:
    """What a net is, what its training took, and how well it does."""
    each = Counter(drawn_loops(plan, seed, name, step) for step in range(plan.steps))
    tokens = text.drawn(source, plan.batch, plan.length, generator=torch.Generator().manual_seed(seed))
    passes = {loops: timed(net, Lesson(tokens, torch.tensor(loops))) for loops in each}
    return Net(
        bits=bits(net, pieces, net.loop.max_steps)[0],
        layers=plan.layers[name],
        parameters=sum(weight.numel() for weight in net.parameters()),
        operations=sum(many * passes[loops][0] for loops, many in each.items()),
        seconds=sum(many * passes[loops][1] for loops, many in each.items()),
    )


def timed(net: Any, lesson: Lesson) -> tuple[float, float]:
    """The operations of a training step, three times those of its forward pass, and the median of its CPU seconds."""
    with torch.no_grad(), counter() as seen:
        net(lesson.tokens, max_steps=int(lesson.loops), use_cache=False)
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        told(net, lesson, 0)[0].backward()
        seconds.append(time.process_time() - begun)
        net.zero_grad()
    return 3.0 * seen.get_total_flops(), statistics.median(seconds)


@torch.no_grad()
def bits(net: Any, pieces: Tensor, loops: int) -> tuple[float, float]:
    """Held-out bits per byte at a bound of the loop, and the mean loops that bytes took."""
    lost, taken = 0.0, 0.0
    for part in pieces.split(64):
        out = net(part, labels=part, max_steps=loops)
        lost += out.loss.item() * len(part)
        taken += out.steps.double().mean().item() * len(part)
    return lost / len(pieces) / math.log(2), taken / len(pieces)


def curves(net: Any, pieces: Tensor, plan: Plan, deepest: int) -> dict[str, list[Point]]:
    """Bits per byte against mean loops where each byte leaves by itself, and where all take the same number."""
    own = net.loop
    rules = {
        KL: lambda threshold: halt.KL(net.predict, threshold),
        ENTROPY: lambda threshold: halt.Entropy(net.predict, threshold),
        CONFIDENCE: lambda threshold: halt.Confidence(net.predict, threshold),
    }
    most = min(deepest, plan.high)
    found = {"the same for all": [Point(float(n), *bits(net, pieces, n)) for n in range(1, most + 1)]}
    try:
        for name, rule in rules.items():
            points = []
            for threshold in THRESHOLDS[name]:
                net.loop = own.replace(halt=rule(threshold))
                points.append(Point(threshold, *bits(net, pieces, most)))
            found[name] = points
    finally:
        net.loop = own
    return found
