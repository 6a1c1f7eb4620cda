"""Sudoku: one small layer that recurs on its answer under deep supervision, against plain layers of equal CPU time.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each seed that goes on after a kill.
Nets fill generated grids of 6 x 6 (or 9 x 9); real puzzles can be given as a further test. Recursion is that of
`models.TRM`, with a halt that works in evaluation. Deliberately elsewhere: puzzles (`loopaware.tasks.sudoku`), pictures
and tables (`loopaware.recipes.sudoku_report`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loopaware import files, halt, observe, train
from loopaware.checks import bounded
from loopaware.models import TRM, Transformer
from loopaware.models.trm import answer, tiny_net
from loopaware.protocols import Body, Context
from loopaware.recipes.shared import adam, show
from loopaware.recipes.sudoku_report import DEEP, GENERATED, LEARNED, PLAIN, REAL, SHALLOW, Result, Sweep, report, table
from loopaware.tasks import sudoku
from loopaware.train import objectives
from loopaware.train.average import fill
from loopaware.train.fit import Objective

HEADS = 4
"""One sees the row of a cell, one its column, one its block, one the whole grid."""

HOLES = {6: (16, 26), 9: (30, 54)}
"""Blanks of generated puzzles, for each size."""


TESTED = 1
"""Seed of the test puzzles; settings were chosen on those of seed 0."""

DECAY = 0.99
"""Of the average of the weights, with which both nets are tested."""

Example = tuple[sudoku.Puzzles, Tensor, int]
"""A puzzle, the digits after each step, and the step at which the rule stops."""


class Cells(nn.Module):
    """What a cell is told: its digit or blank, and its row, column and block. Shapes: (B, n * n) -> (B, n * n, dim)."""

    units: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.digits = nn.Embedding(size + 1, dim)
        self.places = nn.Embedding(3 * size, dim)
        self.register_buffer("units", torch.tensor(sudoku.places(size)), persistent=False)

    def forward(self, givens: Tensor) -> Tensor:
        return self.digits(givens) + self.places(self.units).sum(0)


class Units(nn.Module):
    """A block, or several, whose heads see the row, the column and the block of a cell, and the whole grid.

    Without the geometry, all see the whole grid.
    """

    sight: Tensor | None

    def __init__(self, block: Body, size: int, geometry: bool = True):
        super().__init__()
        self.block = block
        units = torch.tensor(sudoku.places(size))
        same = units[:, :, None] == units[:, None]
        sight = torch.cat([same, torch.ones_like(same[:1])])[None] if geometry else None
        self.register_buffer("sight", sight, persistent=False)

    def forward(self, state: Tensor, context: Context, index: int) -> Tensor:
        return self.block(state, {"mask": self.sight}, index)


class Plain(nn.Module):
    """The baseline: layers that share nothing, with the same embedding and the same heads, and one answer."""

    def __init__(self, layers: int, size: int, dim: int, geometry: bool = True):
        super().__init__()
        self.embedding = Cells(size, dim)
        self.layers = Units(Transformer(layers, dim, HEADS), size, geometry)
        self.head = nn.Linear(dim, size)

    def forward(self, givens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(givens), None, 0))


class Plan(NamedTuple):
    """How nets are made and trained."""

    size: int
    holes: tuple[int, int]
    steps: int
    batch: int
    dim: int
    supervision: int
    inner: int
    outer: int
    layers: int
    rate: float
    deep: int
    threshold: float
    geometry: bool = True


def run(
    folder: Path = Path("runs/sudoku"),
    *,
    size: int = 6,
    holes: tuple[int, int] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 1200,
    batch: int = 16,
    dim: int = 64,
    supervision: int = 4,
    inner: int = 2,
    outer: int = 1,
    layers: int = 6,
    rate: float = 2e-3,
    deep: int = 16,
    threshold: float = 0.9,
    geometry: bool = True,
    count: int = 500,
    puzzles: Path | None = None,
    puzzle_count: int = 200,
    threads: int = 1,
) -> None:
    """Train a recursion and plain layers for the same CPU time, test both on new puzzles, and write a report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        size: of the grid, 6 or 9.
        holes: the fewest and the most blanks; left out, those of the size.
        seeds: one net of each kind is trained with each seed.
        steps: training steps of the recursion; the plain layers get as many as take the same CPU time.
        batch: puzzles in a training step.
        dim: features of a cell's state; a multiple of four, the heads.
        supervision: steps of the recursion in training, each with a loss.
        inner: updates of the latent in a recursion.
        outer: recursions in a step of the loop; all but the last have no gradient.
        layers: blocks of the plain net.
        rate: learning rate.
        deep: steps of the recursion in tests, and the bound of its halt.
        threshold: a puzzle is stopped when the halting head is that sure of the whole grid.
        geometry: let one attention head see rows, one columns, one blocks; without it the plain layers win.
        count: test puzzles.
        puzzles: a file of real puzzles of the size, one a line, to test on as well.
        puzzle_count: how many of them, from the first on.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    sudoku.shape(size)
    blanks = HOLES[size] if holes is None else holes
    plan = Plan(size, blanks, steps, batch, dim, supervision, inner, outer, layers, rate, deep, threshold, geometry)
    tests = {GENERATED: sudoku.held_out(count, size, blanks, seed=TESTED), **real(puzzles, puzzle_count, size)}
    results, shown = compared(plan, seeds, tests, folder)
    numbers = {"plan": plan._asdict(), "results": [result.plain() for result in results]}
    files.write(folder / "results.json", json.dumps(numbers, indent=1))
    page = report(results, plan._asdict(), shown)
    show("share of puzzles solved", *table(results, supervision))
    print(f"report: {page.write(folder / 'report.html')}")


def compared(
    plan: Plan, seeds: tuple[int, ...], tests: dict[str, sudoku.Puzzles], folder: Path
) -> tuple[list[Result], Example]:
    """Both nets of every seed, trained and tested, and an example of the last seed's."""
    updates = {LEARNED: plan.steps, PLAIN: equal_steps(plan, folder)}
    results, net = [], None
    for number, seed in enumerate(seeds):
        print(f"seed {seed} ({number + 1} of {len(seeds)}): training both nets, then testing", flush=True)
        net, seconds = trained(plan, seed, folder / f"recursion-{seed}", plan.steps, recursive, recursive_loss(plan))
        plain, other = trained(plan, seed, folder / f"plain-{seed}", updates[PLAIN], layered, plain_loss)
        sweeps = {name: tested(net, plain, test, plan.supervision) for name, test in tests.items()}
        sizes = {name: sum(p.numel() for p in one.parameters()) for name, one in ((LEARNED, net), (PLAIN, plain))}
        results.append(Result(seed, sweeps, {LEARNED: seconds, PLAIN: other}, sizes, updates))
    return results, example(cast(TRM, net), tests[GENERATED])


def real(file: Path | None, count: int, size: int) -> dict[str, sudoku.Puzzles]:
    """The puzzles of a file, if one is given and they fit the grid."""
    if file is None:
        return {}
    found = sudoku.read(file, bounded("puzzle_count", count, "Read at least one puzzle."))
    if found.size != size:
        raise ValueError(
            f"the puzzles of {file} must be of the size trained on, {size}, got {found.size}. Add --size {found.size}."
        )
    return {REAL: found}


def recursive(plan: Plan) -> TRM:
    """One layer for all updates of answer and latent."""
    rule = halt.Linear(plan.dim, plan.threshold, read=answer)
    net = Units(tiny_net(plan.dim, HEADS, 1, hidden=2 * plan.dim, rotary=False), plan.size, plan.geometry)
    inner, outer = plan.inner, plan.outer
    return TRM(Cells(plan.size, plan.dim), net, plan.dim, plan.size, plan.deep, inner=inner, outer=outer, halt=rule)


def layered(plan: Plan) -> Plain:
    return Plain(plan.layers, plan.size, plan.dim, plan.geometry)


def trained(
    plan: Plan, seed: int, folder: Path, steps: int, make: Callable[[Plan], nn.Module], objective: Any
) -> tuple[Any, float]:
    """A net with its averaged weights, trained or read from its finished run, and the CPU-seconds of its training."""
    torch.manual_seed(seed)
    net, average, taken = make(plan), train.Average(DECAY), 0

    def batches(_: int, generator: torch.Generator) -> sudoku.Puzzles:
        nonlocal taken
        taken += 1
        return drawn(plan, generator)

    begun = time.process_time()
    train.fit(
        net,
        cast(Objective, objective),
        batches,
        adam(net, plan.rate),
        steps=steps,
        schedule=train.Warmup(min(50, steps), then=train.Cosine(floor=0.05)),
        average=average,
        journal=train.Journal(folder, log_every=10, save_every=100, about=as_json(plan)),
        seed=seed,
    )
    spent = time.process_time() - begun
    fill(net, average.weights)
    return net.eval(), lasted(folder / "seconds.json", spent, taken, steps)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as json gives it back."""
    return json.loads(json.dumps(plan._asdict()))


def lasted(file: Path, spent: float, taken: int, steps: int) -> float:
    """CPU-seconds of a whole training: what the steps taken now took, for all steps if a kill lost the others."""
    if taken:
        files.write(file, json.dumps(round(spent * steps / taken, 1)))
    return json.loads(file.read_text()) if file.exists() else float("nan")


def drawn(plan: Plan, generator: torch.Generator) -> sudoku.Puzzles:
    return sudoku.sample(plan.batch, plan.size, plan.holes, generator=generator)


def recursive_loss(plan: Plan) -> Callable[[TRM, sudoku.Puzzles, int], tuple[Tensor, dict[str, Tensor]]]:
    """Cross-entropy of the cells after every step, and half that of "is the whole grid right now?"."""

    def loss(net: TRM, batch: sudoku.Puzzles, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        with observe.record(net, states=True) as tape:
            net(batch.givens, max_steps=plan.supervision)
        path = tape.only
        logits = net.head(torch.stack([state.answer for state in path.states or ()]))
        right = sudoku.right(logits.detach(), batch)
        stop = objectives.mean(objectives.halting(path, right), path)
        return cells(logits, batch) + 0.5 * stop, {"accuracy": right[-1].float().mean(), "stop": stop}

    return loss


def plain_loss(net: Plain, batch: sudoku.Puzzles, _: int) -> tuple[Tensor, dict[str, Tensor]]:
    logits = net(batch.givens)
    return cells(logits, batch), {"accuracy": sudoku.right(logits.detach(), batch).float().mean()}


def cells(logits: Tensor, batch: sudoku.Puzzles) -> Tensor:
    """Cross-entropy, mean over cells and steps. Shapes: logits (..., B, n * n, n)."""
    labels = (batch.solution - 1).expand(logits.shape[:-1])
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


def equal_steps(plan: Plan, folder: Path) -> int:
    """How many steps of the plain net take the CPU time of the recursion's; measured once and kept in `pace.json`."""
    file = folder / "pace.json"
    if not file.exists():
        paces = [pace(plan, recursive, recursive_loss(plan)), pace(plan, layered, plain_loss)]
        files.write(file, json.dumps(max(1, round(plan.steps * paces[0] / paces[1]))))
    return json.loads(file.read_text())


def pace(plan: Plan, make: Callable[[Plan], nn.Module], objective: Any, rounds: int = 7) -> float:
    """CPU-seconds of a training step: the median of some, behind two that warm up."""
    seconds, net = [], make(plan)
    optimizer, generator = adam(net, plan.rate), torch.Generator().manual_seed(0)
    for step in range(rounds + 2):
        begun = time.process_time()
        loss, _ = objective(net, drawn(plan, generator), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - begun)
    return sorted(seconds[2:])[rounds // 2]


@torch.no_grad()
def tested(net: TRM, plain: Plain, puzzles: sudoku.Puzzles, shallow: int) -> Sweep:
    """The recursion where its rule stops it and after every step, and the plain net."""
    out = net(puzzles.givens)
    solved = sudoku.right(out.value, puzzles)
    by_step = sudoku.right(answers(net, puzzles.givens), puzzles).float().mean(1).tolist()
    accuracy = {
        LEARNED: solved.float().mean().item(),
        DEEP: by_step[-1],
        SHALLOW: by_step[min(shallow, len(by_step)) - 1],
        PLAIN: sudoku.right(plain(puzzles.givens), puzzles).float().mean().item(),
    }
    return Sweep(accuracy, by_step, out.steps.tolist(), solved.tolist(), puzzles.holes.tolist())


def answers(net: TRM, givens: Tensor) -> Tensor:
    """The logits after every step, whatever the rule says. Shapes: (B, n * n) -> (steps, B, n * n, n)."""
    loop = net.loop.replace(halt=halt.Watched(net.loop.halt))
    with observe.record(loop, states=True) as tape:
        loop(net.embedding(givens))
    return torch.stack([net.head(state.answer) for state in tape.only.states or ()])


@torch.no_grad()
def example(net: TRM, tests: sudoku.Puzzles) -> Example:
    """The puzzle that the rule thought longest about before it stopped it solved, and the digits after each step."""
    out = net(tests.givens)
    solved = sudoku.right(out.value, tests) & out.halted
    chosen = int((out.steps * solved).argmax())
    one = sudoku.Puzzles(*(field[chosen : chosen + 1] for field in tests))
    stop = int(out.steps[chosen])
    return one, sudoku.digits(answers(net, one.givens))[:stop, 0], stop
