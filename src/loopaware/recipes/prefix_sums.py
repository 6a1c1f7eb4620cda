"""Prefix sums: a net that looks one bit around itself, trained on 16 bits, loops its way through 512.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each seed that goes on after a kill.
The net is a deep-thinking one: a convolution in a loop, its input shown again at every loop (recall), and trained with
the progressive loss, which starts from states that some loops left behind. Deliberately elsewhere: strings
(`loopaware.tasks.bits`), pictures and tables (`loopaware.recipes.prefix_sums_report`).

References: A. Bansal et al., "End-to-end Algorithm Synthesis with Recurrent Networks: Logical Extrapolation Without
Overthinking", 2022, arXiv 2202.05826.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loopaware import Loop, body, files, halt, init, observe, train, tree
from loopaware.checks import between, bounded
from loopaware.nn import Add
from loopaware.recipes.prefix_sums_report import (
    CHANGE,
    DOUBLE,
    FORGETFUL,
    KL,
    LEARNED,
    SHALLOW,
    Result,
    Sweep,
    report,
    table,
)
from loopaware.recipes.shared import adam, show
from loopaware.tasks import bits
from loopaware.train import objectives
from loopaware.train.fit import Objective
from loopaware.train.progress import Progress, within

LAST = 4
"""The loops at the end of a training run that must be right."""


class Convolved(nn.Module):
    """norm(h + W relu(conv(h))): a bit sees its two neighbours. Shapes: state (B, n, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Conv1d(dim, 2 * dim, kernel_size=3, padding=1)
        self.out = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, state: Tensor, context: Any, index: int) -> Tensor:
        return self.norm(state + self.out(torch.relu(self.mix(state.mT)).mT))


class Thinker(nn.Module):
    """The convolution in a loop, with recall or, for comparison, with the input as its first state only."""

    def __init__(self, dim: int, recall: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(2, dim)
        self.head = nn.Linear(dim, 2)
        self.rule = halt.Residual()
        block = Convolved(dim)
        self.loop = Loop(
            body.Injected(block, Add()) if recall else block,
            max_steps=64,
            init=init.Zeros() if recall else init.FromContext(),
            halt=halt.Watched(self.rule),
        )


class Plan(NamedTuple):
    """How nets are made and trained."""

    length: int
    steps: int
    batch: int
    dim: int
    rate: float
    extra: int
    progressive: float


def run(
    folder: Path = Path("runs/prefix-sums"),
    *,
    length: int = 16,
    tests: tuple[int, ...] = (16, 32, 64, 128, 256, 512),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 800,
    batch: int = 64,
    dim: int = 32,
    rate: float = 2e-3,
    extra: int = 10,
    progressive: float = 0.5,
    divergence: float = 1e-3,
    change: float = 1e-2,
    patience: int = 2,
    count: int = 100,
    threads: int = 1,
) -> None:
    """Train on short strings with recall and progressive loss, test on long ones with fixed stopping rules, and report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        length: bits of the strings that nets are trained on, shorter ones first.
        tests: lengths of the strings they are tested on.
        seeds: one net with recall is trained with each seed, and one without for the first.
        steps: training steps of each net.
        batch: strings in a training step.
        dim: features of a bit's state.
        rate: learning rate, a fifth of it in the last 30 % of the steps.
        extra: training loops each batch up to this many times more than it has bits; 3 at least.
        progressive: weight of the progressive loss; 0 leaves it out.
        divergence: threshold of the KL stop, in nats.
        change: threshold of the stop on the relative change of the state.
        patience: how many times in a row both stops must say so.
        count: test strings of each length.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("length", length, "Train on strings of some bits.", least=4)
    bounded("extra", extra, "Without further loops nothing teaches the state to rest.", least=3)
    if progressive:
        between("progressive", progressive, 0.0, 10.0, "It weighs one loss against the other.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(length, steps, batch, dim, rate, extra, progressive)
    held_out = {n: bits.held_out(count, n) for n in tests}
    results = []
    for number, seed in enumerate(seeds):
        print(f"seed {seed} ({number + 1} of {len(seeds)}): training, then testing", flush=True)
        net = trained(plan, seed, folder / f"recall-{seed}", recall=True)
        rules = fixed_rules(net, divergence, change, patience)
        results.append(Result(seed, {n: swept(net, strings, rules, length) for n, strings in progress(held_out)}))
    print(f"seed {seeds[0]}: training without recall", flush=True)
    forgetful = trained(plan, seeds[0], folder / f"forgetful-{seeds[0]}", recall=False)
    others = {n: deeper(forgetful, strings, 2 * n)[-1] for n, strings in held_out.items()}
    settings = {**plan._asdict(), "divergence": divergence, "change": change, "patience": patience}
    numbers = {"plan": settings, FORGETFUL: others, "results": [result.plain() for result in results]}
    files.write(folder / "results.json", json.dumps(numbers, indent=1))
    show("share of strings right in every bit", *table(results, others))
    print(f"report: {report(results, others, settings).write(folder / 'report.html')}")


def fixed_rules(net: Thinker, divergence: float, change: float, patience: int) -> dict[str, Any]:
    """The rules that are the same for every seed and length."""
    return {
        KL: halt.Patience(halt.KL(net.head, divergence), patience),
        CHANGE: halt.Patience(halt.Converged(rtol=change), patience),
        LEARNED: net.rule,
    }


def progress(tests: dict[int, bits.Strings]) -> Any:
    return within(Progress(len(tests), done=0, wanted=True), tests.items())


def trained(plan: Plan, seed: int, folder: Path, recall: bool) -> Thinker:
    """A net, trained or read from its finished run."""
    torch.manual_seed(seed)
    net = Thinker(plan.dim, recall)
    train.fit(
        net,
        cast(Objective, loss_of(plan)),
        drawn(plan),
        adam(net, plan.rate, net.rule.parameters()),
        steps=plan.steps,
        schedule=train.Warmup(min(100, plan.steps), then=train.Drop(at=0.7, factor=0.2)),
        journal=train.Journal(folder, log_every=10, save_every=100, about=plan._asdict()),
        seed=seed,
    )
    return net.eval()


class Lesson(NamedTuple):
    """Strings, the loops to run, and for the progressive loss those before it begins and those it spans."""

    strings: bits.Strings
    loops: Tensor
    before: Tensor
    span: Tensor


def drawn(plan: Plan) -> Callable[[int, torch.Generator], Lesson]:
    """Strings from 4 bits to all within 30 % of the steps, with as many loops as bits and some more."""

    def batches(step: int, generator: torch.Generator) -> Lesson:
        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        length = min(plan.length, 4 + round((plan.length - 4) * step / (0.3 * plan.steps)))
        strings = bits.prefix_sums(plan.batch, length, generator=generator)
        loops = length + 1 + number(3, plan.extra)
        before = number(0, loops - 1)
        return Lesson(strings, *map(torch.tensor, (loops, before, number(1, loops - before))))

    return batches


def loss_of(plan: Plan) -> Callable[[Thinker, Lesson, int], tuple[Tensor, dict[str, Tensor]]]:
    """Cross-entropy of the last loops, half that of "is the whole string right now?", and the progressive loss."""

    def loss(net: Thinker, lesson: Lesson, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = net.embedding(lesson.strings.bits), lesson.strings.labels
        with observe.record(net.loop, states=True) as tape:
            net.loop(x, max_steps=int(lesson.loops))
        path = tape.only
        logits = net.head(torch.stack(path.states or ()))
        right = bits.right(logits.detach(), lesson.strings)
        stop = objectives.mean(objectives.halting(path, right), path)
        answer = cross_entropy(logits[-LAST:].flatten(0, 2), labels.expand(LAST, -1, -1).flatten())
        total = answer + 0.5 * stop
        if plan.progressive:
            total = total + plan.progressive * resumed(net, x, labels, int(lesson.before), int(lesson.span))
        return total, {"accuracy": right[-1].float().mean(), "stop": stop}

    return loss


def resumed(net: Thinker, x: Tensor, labels: Tensor, before: int, span: int) -> Tensor:
    """The loss of `span` loops from a state that `before` loops left, without a gradient into those."""
    carry = None
    if before:
        with torch.no_grad():
            carry = tree.detach(net.loop(x, max_steps=before).carry)
    value = net.loop(x, carry=carry, max_steps=before + span).value
    return cross_entropy(net.head(value).flatten(0, 1), labels.flatten())


@torch.no_grad()
def swept(net: Thinker, strings: bits.Strings, rules: dict[str, Any], shallow: int) -> Sweep:
    """Every reader on strings of one length; rules may take twice as many loops as there are bits."""
    bound = 2 * strings.bits.shape[-1]
    x = net.embedding(strings.bits)
    accuracy, steps, flops = {}, {}, {}
    for name, rule in rules.items():
        loop = net.loop.replace(halt=rule, max_steps=bound)
        out = loop(x)
        accuracy[name] = bits.right(net.head(out.value), strings).float().mean().item()
        steps[name] = out.steps.float().mean().item()
        cost = observe.cost(loop, x)
        flops[name], flops[DOUBLE] = cost.executed(out.steps) / cost.rows, cost.dense / cost.rows
    by_loop = deeper(net, strings, bound)
    accuracy[SHALLOW], accuracy[DOUBLE] = by_loop[min(shallow, bound) - 1], by_loop[-1]
    return Sweep(accuracy, steps, flops, by_loop)


@torch.no_grad()
def deeper(net: Thinker, strings: bits.Strings, loops: int) -> list[float]:
    """The share of strings that are right after each loop."""
    carry, shares = None, []
    for step in range(1, loops + 1):
        out = net.loop(net.embedding(strings.bits), carry=carry, max_steps=step)
        carry = out.carry
        shares.append(bits.right(net.head(out.value), strings).float().mean().item())
    return shares
