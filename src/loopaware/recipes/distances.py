"""Graph distances: a loop that learns when to stop, against a KL stop, fixed depths and an unshared stack.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each seed that goes on after a kill.
The nets learn on small graphs whether each node is an even or odd number of edges from the source, or out of its reach,
and are tested on larger ones. Deliberately elsewhere: graphs (`loopaware.tasks.graphs`), pictures and tables
(`loopaware.recipes.distances_report`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from loopaware import Loop, body, files, halt, init, observe, train
from loopaware.checks import bounded
from loopaware.models import Transformer
from loopaware.nn import Add, Block, Post
from loopaware.recipes.distances_report import DEEP, KL, LEARNED, SHALLOW, STACK, Result, Sweep, report, table
from loopaware.recipes.shared import adam, show
from loopaware.tasks import graphs
from loopaware.train.fit import Objective
from loopaware.train.progress import Progress, within

CLASSES, LAST = 3, 4
MORE = "Without further loops nothing teaches the state to rest."
CHUNK = 50
"""Graphs that are tested at a time."""


class Looped(nn.Module):
    """One block in a loop, with the source re-injected, a head for each node, and a halting rule of two numbers."""

    def __init__(self, dim: int, heads: int, deep: int, detach: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(2, dim)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CLASSES))
        self.rule = halt.Residual(detach=detach)
        block = body.Injected(Block(dim, heads, placement=Post()), Add())
        self.loop = Loop(block, deep, init=init.Zeros(), halt=halt.Watched(self.rule))

    def context(self, batch: graphs.Graphs) -> dict[str, Tensor]:
        """What the loop is called with: the marked source, and who is whose neighbour."""
        return {"x": self.embedding(batch.source.long()), "mask": batch.adjacency}


class Stacked(nn.Module):
    """The baseline: as many blocks as fit the graphs of training, none shared."""

    def __init__(self, layers: int, dim: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(2, dim)
        self.layers = Transformer(layers, dim, heads)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, batch: graphs.Graphs) -> Tensor:
        return self.head(self.layers(self.embedding(batch.source.long()), mask=batch.adjacency))


class Plan(NamedTuple):
    """How nets are made and trained."""

    nodes: int
    steps: int
    batch: int
    dim: int
    heads: int
    layers: int
    rate: float
    deep: int
    detach: bool = False
    extra: int = 10


def run(
    folder: Path = Path("runs/distances"),
    *,
    nodes: int = 16,
    sizes: tuple[int, ...] = (16, 32, 64, 100),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 600,
    batch: int = 32,
    dim: int = 32,
    heads: int = 4,
    layers: int = 12,
    rate: float = 2e-3,
    deep: int = 128,
    divergence: float = 1e-3,
    detach: bool = False,
    extra: int = 10,
    count: int = 100,
    threads: int = 1,
) -> None:
    """Train on small graphs, test on larger ones, compare ways to stop, and write a report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        nodes: nodes of the graphs that nets are trained on.
        sizes: nodes of the graphs they are tested on.
        seeds: one net of each kind is trained with each seed.
        steps: training steps of each net.
        batch: graphs in a training step.
        dim: features of a node's state.
        heads: attention heads; must divide dim.
        layers: blocks of the unshared stack.
        rate: learning rate; the two halting numbers learn ten times as fast.
        deep: loops of the fixed large depth, and the bound of every loop.
        divergence: threshold of the KL stop, in nats.
        detach: cut the gradient from the halting rule into the body; the state is then not taught to come to rest.
        extra: training loops each batch up to this many times more than its farthest node needs; 3 at least.
        count: test graphs of each size.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(nodes, steps, batch, dim, heads, layers, rate, deep, detach, bounded("extra", extra, MORE, least=3))
    tests = {size: graphs.held_out(count, size) for size in sizes}
    results, looped = [], None
    for number, seed in enumerate(seeds):
        print(f"seed {seed} ({number + 1} of {len(seeds)}): training the loop and the stack, then testing", flush=True)
        looped = trained(Looped, plan, seed, folder / f"loop-{seed}")
        stack = trained(Stacked, plan, seed, folder / f"stack-{seed}")
        results.append(tested(looped, stack, tests, divergence, nodes, seed))
    written(folder, plan, results, example(cast(Looped, looped), tests[max(sizes)]))


def trained(kind: type[Looped] | type[Stacked], plan: Plan, seed: int, folder: Path) -> Any:
    """A net of one kind, trained or read from its finished run."""
    torch.manual_seed(seed)
    if kind is Looped:
        net, objective = Looped(plan.dim, plan.heads, plan.deep, plan.detach), looped_loss
        optimizer = adam(net, plan.rate, net.rule.parameters())
    else:
        net, objective = Stacked(plan.layers, plan.dim, plan.heads), stack_loss
        optimizer = adam(net, plan.rate)
    train.fit(
        net,
        cast(Objective, objective),
        drawn(plan),
        optimizer,
        steps=plan.steps,
        schedule=train.Warmup(min(100, plan.steps), then=train.Drop(at=0.7, factor=0.2)),
        journal=train.Journal(folder, log_every=10, save_every=50, about=plan._asdict()),
        seed=seed,
    )
    return net.eval()


def drawn(plan: Plan) -> Callable[[int, torch.Generator], tuple[graphs.Graphs, Tensor]]:
    """Batches whose graphs grow more eccentric until 60 % of the steps, with the number of loops for each."""
    start, end = min(4, plan.nodes - 1), max(plan.nodes - 2, 1)

    def batches(step: int, generator: torch.Generator) -> tuple[graphs.Graphs, Tensor]:
        farthest = round(start + (end - start) * min(1.0, step / (0.6 * plan.steps)))
        batch = graphs.sample(plan.batch, plan.nodes, (1, farthest), generator=generator)
        return batch, batch.eccentricity.max() + 1 + torch.randint(3, plan.extra + 1, (), generator=generator)

    return batches


def looped_loss(net: Looped, batch: tuple[graphs.Graphs, Tensor], _: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the last four loops, and half the cross-entropy of "is the whole graph right now?"."""
    problem, loops = batch
    with observe.record(net.loop, states=True) as tape:
        net.loop(net.context(problem), max_steps=int(loops))
    path = tape.only
    logits = net.head(torch.stack(path.states or ()))
    right = graphs.right(logits.detach(), problem)
    labels = problem.labels.expand(LAST, -1, -1)
    answer = cross_entropy(logits[-LAST:].flatten(0, 2), labels.flatten())
    stop = binary_cross_entropy_with_logits(path.scores, right.float())
    stopped = torch.cat([path.scores >= net.rule.cut, torch.ones_like(right[:1])]).float().argmax(0) + 1.0
    return answer + 0.5 * stop, {"accuracy": right[-1].float().mean(), "stop": stop, "steps": stopped.mean()}


def stack_loss(net: Stacked, batch: tuple[graphs.Graphs, Tensor], _: int) -> tuple[Tensor, dict[str, Tensor]]:
    logits = net(batch[0])
    loss = cross_entropy(logits.flatten(0, 1), batch[0].labels.flatten())
    return loss, {"accuracy": graphs.right(logits.detach(), batch[0]).float().mean()}


@torch.no_grad()
def tested(
    net: Looped, stack: Stacked, tests: dict[int, graphs.Graphs], divergence: float, shallow: int, seed: int
) -> Result:
    """Every reader on every size: readers that stop are run with their rule, fixed depths are read off one long run."""
    sweeps, bar = {}, Progress(len(tests), done=0, wanted=True)
    for size, whole in within(bar, tests.items()):
        parts = [
            graphs.Graphs(*(field[at : at + CHUNK] for field in whole)) for at in range(0, len(whole.source), CHUNK)
        ]
        stopped = {name: stopping(net, rule, parts) for name, rule in rules(net, divergence).items()}
        by_loop = torch.cat([looping(net, part) for part in parts], dim=1).float().mean(1)
        accuracy = {name: right.float().mean().item() for name, (right, _) in stopped.items()}
        accuracy[SHALLOW] = by_loop[min(shallow, len(by_loop)) - 1].item()
        accuracy[DEEP] = by_loop[-1].item()
        accuracy[STACK] = torch.cat([graphs.right(stack(part), part) for part in parts]).float().mean().item()
        sweeps[size] = Sweep(
            accuracy=accuracy,
            steps={name: steps.float().mean().item() for name, (_, steps) in stopped.items()},
            correlation=correlation(stopped[LEARNED][1], whole.eccentricity),
            halted=stopped[LEARNED][1].tolist(),
            eccentricity=whole.eccentricity.tolist(),
            by_loop=by_loop.tolist(),
        )
    sizes = {LEARNED: net, STACK: stack}
    return Result(seed, sweeps, {name: sum(p.numel() for p in m.parameters()) for name, m in sizes.items()})


def rules(net: Looped, divergence: float) -> dict[str, Any]:
    return {LEARNED: net.rule, KL: halt.KL(net.head, divergence)}


def stopping(net: Looped, rule: Any, parts: list[graphs.Graphs]) -> tuple[Tensor, Tensor]:
    """Which graphs are right where the rule stops them, and after how many loops. Shapes: -> (B,), (B,)."""
    loop = net.loop.replace(halt=rule)
    outputs = [loop(net.context(part)) for part in parts]
    right = [graphs.right(net.head(out.value), part) for out, part in zip(outputs, parts, strict=True)]
    return torch.cat(right), torch.cat([out.steps for out in outputs])


def looping(net: Looped, part: graphs.Graphs) -> Tensor:
    """Which graphs are right after each loop. Shapes: -> (loops, B) bool."""
    with observe.record(net.loop, states=True) as tape:
        net.loop(net.context(part))
    return torch.stack([graphs.right(net.head(state), part) for state in tape.only.states or ()])


@torch.no_grad()
def example(net: Looped, tests: graphs.Graphs) -> tuple[graphs.Graphs, list[Tensor], int]:
    """A graph of about twelve loops, what the net says of it after each, and where the rule stops."""
    chosen = int((tests.eccentricity - 12).abs().argmin())
    one = graphs.Graphs(*(field[chosen : chosen + 1] for field in tests))
    stop = int(stopping(net, net.rule, [one])[1])
    with observe.record(net.loop, states=True) as tape:
        net.loop(net.context(one), max_steps=min(stop + 2, net.loop.max_steps))
    return one, [net.head(state)[0].argmax(-1) for state in tape.only.states or ()], stop


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; not a number where one of them does not vary."""
    return torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1].item()


def written(folder: Path, plan: Plan, results: list[Result], shown: tuple[graphs.Graphs, list[Tensor], int]) -> None:
    """results.json, report.html, the table, and where they are."""
    numbers = {"plan": plan._asdict(), "results": [result.plain() for result in results]}
    files.write(folder / "results.json", json.dumps(numbers, indent=1))
    page = report(results, plan._asdict(), shown)
    show("share of graphs right", ["reader", *(f"{size} nodes" for size in results[0].sweeps)], table(results))
    print(f"report: {page.write(folder / 'report.html')}")
