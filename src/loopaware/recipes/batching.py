"""`loopaware bench batching`: ways to put requests of mixed difficulty into batches, in sequences per second.

In: options. Out: a folder with a trained net, `results.json`, `report.html` and figures. The requests are graphs whose
farthest node is 2 to 20 edges away; the net of `loopaware run distances` stops one loop after reaching it. Every way
answers the same requests; nothing is reported if an answer or a number of steps differs. Deliberately elsewhere: the
policies (`loopaware.serve`), pictures and tables (`loopaware.recipes.batching_report`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loopaware import execute, files
from loopaware.checks import bounded
from loopaware.protocols import Execute, Output
from loopaware.recipes import distances
from loopaware.recipes.batching_report import ALONE, BASELINE, FIXED, Line, report, table
from loopaware.recipes.shared import apart, in_turns, show
from loopaware.serve import (
    ByDepth,
    ByLength,
    Continuous,
    DepthPredictor,
    Encoded,
    InOrder,
    Policy,
    Quality,
    Request,
    encode,
)
from loopaware.tasks import graphs

EQUAL = 1e-3
"""The relative error of answers above which nothing is reported (float32)."""


class Way(NamedTuple):
    """How requests are answered."""

    policy: Policy
    execute: Execute


class Answering(nn.Module):
    """The net as requests meet it: each graph stops by itself, and is answered with the classes of its nodes."""

    def __init__(self, net: distances.Looped, part: Execute):
        super().__init__()
        self.embedding, self.head = net.embedding, net.head
        self.loop = net.loop.replace(halt=net.rule, execute=part)

    def forward(self, batch: Mapping[str, Tensor], mask: Tensor) -> Output:
        out = self.loop({"x": self.embedding(batch["x"]), "mask": batch["mask"]}, mask=mask)
        return out._replace(value=self.head(out.value))


def run(
    folder: Path = Path("runs/bench-batching"),
    *,
    nodes: tuple[int, ...] = (24, 32, 48, 64),
    farthest: tuple[int, int] = (2, 20),
    count: int = 160,
    size: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    recorded: int = 512,
    hops: int = 3,
    bound: int = 24,
    steps: int = 600,
    repeats: int = 7,
    threads: int = 1,
) -> None:
    """Train a net whose depth follows the problem, then time ways to batch requests of mixed difficulty.

    Args:
        folder: where the net, results.json, report.html and figures go; a net that is there is not trained again.
        nodes: sizes of the graphs, drawn evenly; a second stream has the middle one alone.
        farthest: smallest and largest distance of a graph's farthest node; a net stops one loop later.
        count: graphs in a stream of requests.
        size: graphs in a batch.
        seeds: one stream of requests is drawn with each seed.
        recorded: graphs that are run beforehand, from which the predictor of depth learns.
        hops: the predictor sees how many nodes are within so many edges of the source.
        bound: most loops of the net, and all loops of the fixed depth.
        steps: training steps of the net.
        repeats: timed runs of each way, in turns; medians count.
        threads: processor threads that PyTorch may use.
    """
    bounded("repeats", repeats, "Medians need at least one run.")
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("count", count, "Draw at least one graph of each size.", least=bounded("nodes", len(nodes), "Name a size."))
    bounded("bound", bound, "The deepest graph needs one loop more than its distance.", least=farthest[1] + 1)
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = distances.Plan(nodes=16, steps=steps, batch=32, dim=32, heads=4, layers=1, rate=2e-3, deep=bound)
    net = distances.trained(distances.Looped, plan, 0, folder / "net")
    past = drawn(recorded, nodes, farthest, -1)
    taken = depths(encode(Answering(net, execute.Eager()).eval(), past, ByLength(size)))
    predictor = DepthPredictor(2 + hops, read=Reached(hops))
    qualities = {"held out": predictor.fit(past, taken)}
    found: list[Found] = []
    for stream, sizes in {"one length": (nodes[len(nodes) // 2],), "mixed lengths": nodes}.items():
        for seed in seeds:
            print(f"{stream}, seed {seed}: {count} graphs, each way {repeats} times and once to check", flush=True)
            requests = drawn(count, sizes, farthest, seed)
            found.append(measured(net, requests, predictor, size, repeats).called(stream, seed))
            qualities[f"{stream}, seed {seed}"] = found[-1].quality
    lines = [line for each in found for line in each.lines]
    numbers = {"count": count, "size": size, "repeats": repeats, "threads": threads, "bound": bound, "hops": hops}
    plain = {
        "plan": {**numbers, "nodes": nodes, "farthest": farthest, "recorded": recorded, "steps": steps},
        "predictor": {name: quality._asdict() for name, quality in qualities.items()},
        "lines": [line._asdict() for line in lines],
    }
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show("sequences per second", *table(lines))
    page = report(lines, numbers, qualities, (found[-1].predicted, found[-1].taken), seeds)
    print(f"report: {page.write(folder / 'report.html')}")


def drawn(count: int, nodes: Sequence[int], farthest: tuple[int, int], seed: int) -> list[Request]:
    """A stream of graphs in random order, as many of each size."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 2))
    found: list[Request] = []
    for number, size in enumerate(nodes):
        share = count * (number + 1) // len(nodes) - count * number // len(nodes)
        batch = graphs.sample(share, size, farthest, generator=generator)
        pairs = zip(batch.source.long(), batch.adjacency, strict=True)
        found += [{"x": source, "mask": edges} for source, edges in pairs]
    return [found[place] for place in torch.randperm(count, generator=generator).tolist()]


class Reached(nn.Module):
    """What the predictor sees: logarithms of size, mean degree, and nodes within 1, 2, ... edges of the source.

    Shapes: batch of N graphs, real (N, n) -> (N, 2 + hops).
    """

    def __init__(self, hops: int):
        super().__init__()
        self.hops = bounded("hops", hops, "0 looks at size and degree alone.", least=0)

    def forward(self, batch: Mapping[str, Tensor], real: Tensor) -> Tensor:
        edges = (batch["mask"] & real[:, None]).float()
        count, reached = real.sum(1).float(), (batch["x"] == 1) & real
        seen = [count, edges.sum((1, 2)) / count]
        for _ in range(self.hops):
            reached = torch.bmm(edges.mT, reached[..., None].float())[..., 0] > 0
            seen.append(reached.sum(1).float())
        return torch.stack(seen, 1).log()


def ways(predictor: DepthPredictor, truth: Tensor, size: int) -> dict[str, Way]:
    """Every way that is measured; by true depth is an upper bound, for nobody knows it before."""
    masked, selective = execute.Eager(), execute.Compacted()
    guessed, known = ByDepth(predictor, size), ByDepth(lambda _: truth, size)
    return {
        ALONE: Way(InOrder(1), masked),
        FIXED: Way(InOrder(size), execute.Unrolled()),
        BASELINE: Way(InOrder(size), masked),
        "by length, masked": Way(ByLength(size), masked),
        "by predicted depth, masked": Way(guessed, masked),
        "by true depth, masked": Way(known, masked),
        "in order, selective": Way(InOrder(size), selective),
        "by length, selective": Way(ByLength(size), selective),
        "by predicted depth, selective": Way(guessed, selective),
        "by true depth, selective": Way(known, selective),
        "by length, continuous": Way(ByLength(4 * size), Continuous(size)),
        "by length, four batches in one, selective": Way(ByLength(4 * size), selective),
    }


class Found(NamedTuple):
    """What was measured on one stream, and how good the predictor was on it."""

    lines: list[Line]
    quality: Quality
    predicted: list[float]
    taken: list[int]

    def called(self, stream: str, seed: int) -> Found:
        return self._replace(lines=[line._replace(stream=stream, seed=seed) for line in self.lines])


def measured(
    net: distances.Looped, requests: list[Request], predictor: DepthPredictor, size: int, repeats: int
) -> Found:
    """Each way is run once to see that it is right and what it executes, then timed in turns."""
    alone, needed = watched(Answering(net, execute.Eager()).eval(), requests, InOrder(1))
    taken = depths(alone)
    tried = ways(predictor, taken.float(), size)
    models = {name: Answering(net, way.execute).eval() for name, way in tried.items()}
    executed = {}
    for name, way in tried.items():
        answers, executed[name] = (alone, needed) if name == ALONE else watched(models[name], requests, way.policy)
        same(name, answers, alone)
    runs = {name: partial(encode, models[name], requests, way.policy) for name, way in tried.items()}
    times = in_turns(runs, repeats)
    base = statistics.median(times[BASELINE])
    lines = []
    for name, each in times.items():
        seconds = statistics.median(each)
        lines.append(Line("", 0, name, len(requests) / seconds, seconds / base, executed[name] / needed))
    return Found(lines, predictor.quality(requests, taken), predictor(requests).tolist(), taken.tolist())


def watched(model: Answering, requests: list[Request], policy: Policy) -> tuple[list[Encoded], int]:
    """The answers, and for how many positions the body was run, padding and stopped graphs included."""
    counts: list[int] = []
    body = model.loop.body
    assert isinstance(body, nn.Module)
    handle = body.register_forward_pre_hook(lambda _, arguments: counts.append(arguments[0].shape[:2].numel()))
    try:
        return encode(model, requests, policy), sum(counts)
    finally:
        handle.remove()


def same(name: str, answers: list[Encoded], expected: list[Encoded]) -> None:
    """Refuse a way that answers otherwise than one by one."""
    moved = int((depths(answers) != depths(expected)).sum())
    one, other = (torch.cat([each.value.flatten() for each in found]) for found in (answers, expected))
    if moved or apart(one, other) > EQUAL:
        raise ValueError(
            f"answers must be those of one by one, within {EQUAL}, got {apart(one, other):.1e} and {moved} other "
            f"numbers of steps {name}. Nothing is reported: mend the policy, the padding or the execution."
        )


def depths(answers: Sequence[Encoded]) -> Tensor:
    """The steps that were taken. Shapes: -> (N) long."""
    return torch.stack([answer.steps for answer in answers])
