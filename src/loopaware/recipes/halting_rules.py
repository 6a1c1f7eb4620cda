"""Halting rules side by side: the same net, the same problems, the same training; only the rule and its loss differ.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each rule and seed that goes on after a
kill. The task is pointer chasing (`loopaware.recipes.chase`), where a problem of n hops needs n loops or one more.
Rules without parameters are tried on one net that was trained without any. Deliberately elsewhere: the net and its
problems (`loopaware.recipes.chase`), pictures and tables (`loopaware.recipes.halting_rules_report`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from loopaware import files, halt, observe, readout
from loopaware.checks import bounded
from loopaware.observe import Trajectory
from loopaware.protocols import Halt
from loopaware.recipes.chase import LAST, Looped, Plan, Problem, answered, held_out, taught, trained
from loopaware.recipes.halting_rules_report import Result, Score, report, table
from loopaware.recipes.shared import show
from loopaware.tasks import pointers
from loopaware.train import objectives
from loopaware.train.progress import Progress, within

Loss = Callable[[Looped, Problem, int], tuple[Tensor, dict[str, Tensor]]]


class Way(NamedTuple):
    """One way to halt: the rule in training, its loss, how much faster it learns, and what to test (None: the same)."""

    rule: Callable[[], Halt]
    loss: Loss
    faster: float = 1.0
    tests: Callable[[Looped], dict[str, Halt]] | None = None


def run(
    folder: Path = Path("runs/halting-rules"),
    *,
    hops: int = 6,
    tests: tuple[int, ...] = (1, 3, 6, 9, 12),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 800,
    price: float = 0.01,
    prior: float = 0.2,
    beta: float = 0.01,
    bias: float = -3.0,
    count: int = 200,
    only: tuple[str, ...] = (),
    threads: int = 1,
) -> None:
    """Train a net for each halting rule and seed on pointer chasing, at equal training, and compare them in one table.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        hops: the most hops of a problem in training.
        tests: numbers of hops that nets are tested on.
        seeds: one net for each rule is trained with each seed.
        steps: training steps of each net.
        price: cost of a step for ACT, StickBreaking and the hard estimators, growing from zero until half of training.
        prior: PonderNet's chance to stop, one over the steps it expects.
        beta: weight of PonderNet's divergence from its prior.
        bias: halting bias of linear heads before training.
        count: test problems for each number of hops.
        only: train and test these ways to halt alone; none named takes all.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(hops, steps, batch=32, dim=64, heads=4, key=24, layers=0, rate=2e-3, deep=4 * hops + 8, extra=11)
    costs = {"price": price, "prior": prior, "beta": beta, "bias": bias}
    every = ways(plan, price, prior, beta, bias)
    chosen = {name: every[name] for name in known(only, every)} if only else every
    problems = {many: held_out(count, many, plan.key) for many in tests}
    results, bar = [], Progress(len(seeds) * len(chosen), done=0, wanted=True)
    for seed, (name, way) in within(bar, [(seed, pair) for seed in seeds for pair in chosen.items()]):
        print(f"seed {seed}: {name}", flush=True)
        place = folder / f"{name.replace(' ', '-')}-{seed}"
        net = trained(plan, seed, place, lambda way=way: made(plan, way), way.loss, way.faster, costs)
        results += tested(net, name, way, problems, seed)
    settings = {**plan._asdict(), **costs, "count": count}
    plain = {"plan": settings, "results": [result.plain() for result in results]}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show(f"pointer chasing, trained on up to {hops} hops", *table(results))
    print(f"report: {report(results, settings).write(folder / 'report.html')}")


def known(names: tuple[str, ...], every: dict[str, Way]) -> tuple[str, ...]:
    for name in names:
        if name not in every:
            raise ValueError(f"only must name ways to halt, got {name!r}. Known are {', '.join(every)}.")
    return names


def ways(plan: Plan, price: float, prior: float, beta: float, bias: float) -> dict[str, Way]:
    """Every way to halt, by its name in the table."""

    def linear() -> Halt:
        return halt.Linear(plan.dim, bias=bias)

    def paid(step: int) -> float:
        return price * min(1.0, step / (0.5 * plan.steps))

    mixed, hard = mixture(objectives.ponder_cost, paid), mixture(objectives.expected_steps, paid)
    pondered = ponder(prior, beta)
    return {
        "taught Residual": Way(lambda: halt.Watched(halt.Residual()), taught, 10.0, inside),
        "taught Linear": Way(lambda: halt.Watched(linear()), taught, 1.0, inside),
        "ACT": Way(lambda: halt.ACT(linear()), mixed),
        "ACT on Residual": Way(lambda: halt.ACT(halt.Residual()), mixed, 10.0),
        "StickBreaking": Way(lambda: halt.StickBreaking(linear()), hard),
        "Ponder": Way(lambda: halt.Ponder(linear(), seed=None), pondered),
        "Ponder on Residual": Way(lambda: halt.Ponder(halt.Residual(), seed=None), pondered, 10.0),
        "REINFORCE": Way(lambda: halt.Sampled(linear(), seed=None), reinforced(paid)),
        "StraightThrough": Way(lambda: halt.StraightThrough(linear()), hard),
        "Gumbel": Way(lambda: halt.Gumbel(linear()), hard),
        "no rule": Way(halt.Never, untaught, 1.0, training_free),
    }


def made(plan: Plan, way: Way) -> Looped:
    rule = way.rule()
    return Looped(plan.dim, plan.heads, plan.key, plan.deep, rule, readout.Weighted() if rule.mixes else None)


def inside(net: Looped) -> dict[str, Halt]:
    """The rule that was watched, now stopping."""
    return {"": cast(halt.Watched, net.loop.halt).rule}


def training_free(net: Looped) -> dict[str, Halt]:
    """Rules that read the trained net; their thresholds are the library's defaults, or usual ones."""
    return {
        "KL, 2 times": halt.Patience(halt.KL(net.head, 1e-3), 2),
        "Converged, 2 times": halt.Patience(halt.Converged(rtol=0.05), 2),
        "Entropy": halt.Entropy(net.head, 0.1),
        "Confidence": halt.Confidence(net.head, 0.9),
        "fixed depth": halt.Never(),
    }


def watched(net: Looped, problem: Problem) -> tuple[Tensor, Trajectory]:
    """The logits of the answer and the trajectory of a training run."""
    with observe.record(net.loop, states=True) as tape:
        out = net.loop(net.read(problem), max_steps=int(problem.loops))
    return net.head(out.value), tape.only


def measures(logits: Tensor, problem: Problem, steps: Tensor) -> dict[str, Tensor]:
    right = pointers.right(logits.detach(), problem.pointers)
    return {"accuracy": right.float().mean(), "steps": steps.detach().float().mean()}


def untaught(net: Looped, problem: Problem, _: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropy of the last four loops, a random number of them."""
    logits, path = watched(net, problem)
    losses = answered(net.head(torch.stack((path.states or ())[-LAST:])), problem)
    return losses.mean(), measures(logits, problem, path.steps)


def mixture(cost: Callable[[Trajectory], Tensor], paid: Callable[[int], float]) -> Loss:
    """The cross-entropy of the answer read from the weighted state, and a price on the steps."""

    def loss(net: Looped, problem: Problem, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, path = watched(net, problem)
        charged = objectives.mean(cost(path), path)
        return answered(logits[None], problem).mean() + paid(step) * charged, measures(logits, problem, charged)

    return loss


def ponder(prior: float, beta: float) -> Loss:
    """PonderNet's loss: each problem's losses under its own weights, and the divergence from the prior."""

    def loss(net: Looped, problem: Problem, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        logits, path = watched(net, problem)
        losses = answered(net.head(torch.stack(path.states or ())), problem)
        total = objectives.mean(objectives.pondernet(path, losses, prior, beta), path)
        return total, measures(logits, problem, objectives.expected_steps(path))

    return loss


def reinforced(paid: Callable[[int], float]) -> Loss:
    """Two drawn runs, each the other's baseline; the cost is the cross-entropy and the price of the steps."""

    def loss(net: Looped, problem: Problem, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        runs = [watched(net, problem) for _ in range(2)]
        costs = [answered(logits[None], problem)[0] + paid(step) * path.steps for logits, path in runs]
        total = objectives.reinforce([path for _, path in runs], torch.stack(costs)).mean()
        return total, measures(runs[0][0], problem, runs[0][1].steps)

    return loss


@torch.no_grad()
def tested(net: Looped, name: str, way: Way, problems: dict[int, Problem], seed: int) -> list[Result]:
    """Accuracy, steps and operations where the rule stops, for each rule to test."""
    torch.manual_seed(seed)
    rules = {"": cast(Halt, net.loop.halt)} if way.tests is None else way.tests(net)
    results = []
    for label, rule in rules.items():
        scores = {}
        for hops, problem in problems.items():
            loop = net.loop.replace(halt=rule).eval()
            out = loop(net.read(problem))
            cost = observe.cost(loop, net.read(problem))
            right = pointers.right(net.head(out.value), problem.pointers).float().mean().item()
            scores[hops] = Score(right, out.steps.float().mean().item(), cost.executed(out.steps) / cost.rows)
        results.append(Result(f"{name}: {label}" if label else name, seed, scores))
    return results
