"""Pointer chasing: a loop makes one hop at a time and stops by itself, far beyond the hops of its training.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each seed that goes on after a kill.
Nodes carry random names, their own and that of the node they point to; who points to whom must be found by attention.
Nets are trained on one to six hops and tested on up to sixteen. Deliberately elsewhere: problems
(`loopaware.tasks.pointers`), pictures and tables (`loopaware.recipes.chase_report`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loopaware import Loop, body, files, halt, init, observe, train
from loopaware.checks import bounded
from loopaware.models import Transformer
from loopaware.nn import Add, Block, Post
from loopaware.protocols import Halt, Readout
from loopaware.recipes.chase_report import DEEP, KL, LEARNED, SHALLOW, STACK, Result, Sweep, report, table
from loopaware.recipes.shared import adam, show
from loopaware.tasks import pointers
from loopaware.train import objectives
from loopaware.train.fit import Objective
from loopaware.train.progress import Progress, within

LAST = 4
"""The loops at the end of a training run that must be right."""

MORE = "Without further loops nothing teaches the state to rest."


class Problem(NamedTuple):
    """Problems, the names of their nodes, and how many loops to train for. Shapes: names (B, n, key); loops ()."""

    pointers: pointers.Pointers
    names: Tensor
    loops: Tensor


class Read(nn.Module):
    """What a node is told: its name, the name of the node it points to, and its colour. Shapes: -> (B, n, dim)."""

    def __init__(self, dim: int, key: int):
        super().__init__()
        self.names = nn.Linear(2 * key, dim)
        # Names as loud as colours: at PyTorch's smaller scale some seeds never learn to tell more than roots apart.
        nn.init.normal_(self.names.weight, std=(2 * key) ** -0.5)
        self.colours = nn.Embedding(pointers.ROOTS + 1, dim)

    def forward(self, problem: Problem) -> Tensor:
        own, given = problem.names, problem.pointers
        target = own.gather(1, given.pointer[..., None].expand_as(own))
        return self.names(torch.cat([own, target], -1)) + self.colours(given.colour)


class Looped(nn.Module):
    """One block in a loop, the problem re-injected, a head for each node, and a halting rule for each problem."""

    def __init__(self, dim: int, heads: int, key: int, deep: int, rule: Halt, readout: Readout | None = None):
        super().__init__()
        self.read = Read(dim, key)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, pointers.ROOTS))
        block = body.Injected(Block(dim, heads, placement=Post()), Add())
        self.loop = Loop(block, deep, init=init.Zeros(), halt=rule, readout=readout)


class Stacked(nn.Module):
    """The baseline: as many blocks as loops are needed in training, none shared."""

    def __init__(self, layers: int, dim: int, heads: int, key: int):
        super().__init__()
        self.read = Read(dim, key)
        self.layers = Transformer(layers, dim, heads)
        self.head = nn.Linear(dim, pointers.ROOTS)

    def forward(self, problem: Problem) -> Tensor:
        return self.head(self.layers(self.read(problem)))


class Plan(NamedTuple):
    """How nets are made and trained."""

    hops: int
    steps: int
    batch: int
    dim: int
    heads: int
    key: int
    layers: int
    rate: float
    deep: int
    extra: int


def run(
    folder: Path = Path("runs/chase"),
    *,
    hops: int = 6,
    tests: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 1600,
    batch: int = 32,
    dim: int = 64,
    heads: int = 4,
    key: int = 24,
    layers: int = 8,
    rate: float = 2e-3,
    deep: int = 64,
    divergence: float = 1e-3,
    extra: int = 11,
    count: int = 200,
    threads: int = 1,
) -> None:
    """Train on a few hops, test on many, compare ways to stop, and write a report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        hops: the most hops of a problem in training.
        tests: numbers of hops that nets are tested on.
        seeds: one net of each kind is trained with each seed.
        steps: training steps of each net.
        batch: problems in a training step.
        dim: features of a node's state.
        heads: attention heads; must divide dim.
        key: numbers in the random name of a node.
        layers: blocks of the unshared stack.
        rate: learning rate; the two halting numbers learn ten times as fast.
        deep: loops of the fixed large depth, and the bound of every loop.
        divergence: threshold of the KL stop, in nats.
        extra: training loops each batch up to this many times more than its hops need; 3 at least.
        count: test problems for each number of hops.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("hops", hops, "Train on two hops at least.", least=2)
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(hops, steps, batch, dim, heads, key, layers, rate, deep, bounded("extra", extra, MORE, least=3))
    results, looped = [], None
    for number, seed in enumerate(seeds):
        print(f"seed {seed} ({number + 1} of {len(seeds)}): training the loop and the stack, then testing", flush=True)
        looped = trained(plan, seed, folder / f"loop-{seed}", rule_of_two_numbers(plan), taught)
        stack = trained(plan, seed, folder / f"stack-{seed}", stacked(plan), stack_loss)
        results.append(
            tested(looped, stack, {many: held_out(count, many, key) for many in tests}, divergence, plan, seed)
        )
    numbers = {"plan": plan._asdict(), "results": [result.plain() for result in results]}
    files.write(folder / "results.json", json.dumps(numbers, indent=1))
    page = report(results, plan._asdict(), *example(cast(Looped, looped), held_out(1, min(max(tests), 10), key)))
    show("share of problems right", *table(results))
    print(f"report: {page.write(folder / 'report.html')}")


def rule_of_two_numbers(plan: Plan) -> Callable[[], Looped]:
    return lambda: Looped(plan.dim, plan.heads, plan.key, plan.deep, halt.Watched(halt.Residual()))


def stacked(plan: Plan) -> Callable[[], Stacked]:
    return lambda: Stacked(plan.layers, plan.dim, plan.heads, plan.key)


def trained(
    plan: Plan,
    seed: int,
    folder: Path,
    make: Callable[[], nn.Module],
    objective: Any,
    faster: float = 10.0,
    about: dict[str, Any] | None = None,
) -> Any:
    """A net, trained or read from its finished run; its halting parameters learn `faster` times as fast."""
    torch.manual_seed(seed)
    net = make()
    rule = net.loop.halt if isinstance(net, Looped) else None
    halting = rule.parameters() if isinstance(rule, nn.Module) else ()
    train.fit(
        net,
        cast(Objective, objective),
        drawn(plan),
        adam(net, plan.rate, halting, faster),
        steps=plan.steps,
        schedule=train.Warmup(min(100, plan.steps), then=train.Drop(at=0.7, factor=0.2)),
        journal=train.Journal(folder, log_every=10, save_every=100, about={**plan._asdict(), **(about or {})}),
        seed=seed,
    )
    return net.eval()


def named(problem: pointers.Pointers, key: int, generator: torch.Generator, loops: int = 0) -> Problem:
    """Names that are new in every problem, so that matching them is learned and not the names."""
    names = torch.randn(*problem.pointer.shape, key, generator=generator)
    return Problem(problem, names * (key**0.5 / names.norm(dim=-1, keepdim=True)), torch.tensor(loops))


def held_out(count: int, hops: int, key: int) -> Problem:
    return named(pointers.held_out(count, hops), key, torch.Generator().manual_seed(hops))


def drawn(plan: Plan) -> Callable[[int, torch.Generator], Problem]:
    """Batches of 2 hops or a few more at first, of all from half of the steps on."""

    def batches(step: int, generator: torch.Generator) -> Problem:
        share = min(1.0, step / (0.5 * plan.steps))
        low, high = (1, plan.hops) if share == 1 else (2, max(3, 1 + round((plan.hops - 1) * share)))
        hops = int(torch.randint(min(low, plan.hops), min(high, plan.hops) + 1, (), generator=generator))
        loops = hops + 1 + int(torch.randint(2, plan.extra + 1, (), generator=generator))
        return named(pointers.sample(plan.batch, hops, generator=generator), plan.key, generator, loops)

    return batches


def taught(net: Looped, problem: Problem, _: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of every node in the last four loops, and half that of "is every node right now?"."""
    with observe.record(net.loop, states=True) as tape:
        net.loop(net.read(problem), max_steps=int(problem.loops))
    path = tape.only
    logits = net.head(torch.stack(path.states or ()))
    right = (logits.detach().argmax(-1) == problem.pointers.label).all(-1)
    stop = objectives.mean(objectives.halting(path, right), path)
    answer = answered(logits[-LAST:], problem).mean()
    return answer + 0.5 * stop, {"accuracy": right[-1].float().mean(), "stop": stop}


def answered(logits: Tensor, problem: Problem) -> Tensor:
    """The cross-entropy of each problem, mean over its nodes. Shapes: (T, B, n, ROOTS) -> (T, B)."""
    labels = problem.pointers.label.expand(logits.shape[:-1])
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape).mean(-1)


def stack_loss(net: Stacked, problem: Problem, _: int) -> tuple[Tensor, dict[str, Tensor]]:
    logits = net(problem)
    return answered(logits[None], problem).mean(), {"accuracy": pointers.right(logits, problem.pointers).float().mean()}


@torch.no_grad()
def tested(net: Looped, stack: Stacked, tests: dict[int, Problem], divergence: float, plan: Plan, seed: int) -> Result:
    """Every reader on every number of hops: rules stop by themselves, fixed depths are read off one long run."""
    sweeps, bar = {}, Progress(len(tests), done=0, wanted=True)
    rules = {LEARNED: cast(halt.Watched, net.loop.halt).rule, KL: halt.KL(net.head, divergence)}
    for hops, problem in within(bar, tests.items()):
        stopped = {name: stopping(net, rule, problem) for name, rule in rules.items()}
        by_loop = looping(net, problem).float().mean(1)
        accuracy = {name: right.float().mean().item() for name, (right, _) in stopped.items()}
        accuracy[SHALLOW] = by_loop[min(plan.hops + 1, len(by_loop)) - 1].item()
        accuracy[DEEP] = by_loop[-1].item()
        accuracy[STACK] = pointers.right(stack(problem), problem.pointers).float().mean().item()
        cost = observe.cost(net.loop, net.read(problem))
        sweeps[hops] = Sweep(
            accuracy=accuracy,
            steps={name: steps.float().mean().item() for name, (_, steps) in stopped.items()},
            halted=stopped[LEARNED][1].tolist(),
            flops={
                **{name: cost.executed(s) / cost.rows for name, (_, s) in stopped.items()},
                DEEP: cost.dense / cost.rows,
            },
            by_loop=by_loop.tolist(),
        )
    sizes = {name: sum(p.numel() for p in one.parameters()) for name, one in ((LEARNED, net), (STACK, stack))}
    return Result(seed, sweeps, sizes)


def stopping(net: Looped, rule: Halt, problem: Problem) -> tuple[Tensor, Tensor]:
    """Which problems are right where the rule stops them, and after how many loops. Shapes: -> (B,), (B,)."""
    out = net.loop.replace(halt=rule)(net.read(problem))
    return pointers.right(net.head(out.value), problem.pointers), out.steps


def looping(net: Looped, problem: Problem) -> Tensor:
    """Which problems are right after each loop. Shapes: -> (loops, B) bool."""
    with observe.record(net.loop, states=True) as tape:
        net.loop(net.read(problem))
    return torch.stack([pointers.right(net.head(state), problem.pointers) for state in tape.only.states or ()])


@torch.no_grad()
def example(net: Looped, problem: Problem) -> tuple[Problem, Tensor, int]:
    """One problem, the colour the net gives each node after each loop (loops, n), and where the rule stops."""
    stop = int(stopping(net, cast(halt.Watched, net.loop.halt).rule, problem)[1])
    with observe.record(net.loop, states=True) as tape:
        net.loop(net.read(problem), max_steps=min(stop + 2, net.loop.max_steps))
    said = [net.head(state)[0].argmax(-1) for state in tape.only.states or ()]
    return problem, torch.stack(said), stop
