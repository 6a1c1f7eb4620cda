"""Poisson's equation: a solver learned on small grids, raced on large ones against classical solvers at their best.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each seed that goes on after a kill.
Every method is a loop on the five-point grid that stops row by row when the residual is below the tolerance. The
learned one smooths by Gauss-Seidel and corrects by a linear net whose 36 numbers are the same on every level of
coarsening, whatever the grid's side; wherever it converges, it converges to the solution. Deliberately elsewhere: the
solvers (`loopaware.body`), pictures and tables (`loopaware.recipes.poisson_report`).

References: J.-T. Hsieh et al., "Learning Neural PDE Solvers with Convergence Guarantees", 2019, arXiv 1906.01200;
W. Briggs et al., "A Multigrid Tutorial", 2nd ed. 2000.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

from loopaware import Loop, body, files, halt, observe, train
from loopaware.body import Iterate
from loopaware.body.operators import Poisson
from loopaware.checks import between, bounded
from loopaware.recipes.poisson_report import (
    LEARNED,
    SOR,
    TEXTBOOK,
    Broken,
    Film,
    Result,
    Tally,
    report,
    table,
)
from loopaware.recipes.shared import adam, show
from loopaware.train.fit import Objective
from loopaware.train.progress import Progress, within

GRID = Poisson()

APPLIED, CHECKED = 5, 3
"""Operations for each unknown: A x; and b - A x from it with the squares that its norm sums."""

TOO_LARGE = 30.0
"""Times the learned correction, to show what a map does that diverges."""


class Cycle(nn.Module):
    """A linear net without bias that turns a residual r into a correction of x, on grids of any side.

    d = pre * r;  d += up * Cycle(down * (r - A d));  d += post * (r - A d)

    `*` is a convolution of width three, `down` with stride two, `up` its transposed kind; the recursion ends where a
    side is below three. Correction schemes of multigrid have this form, with smoothers for pre and post and
    interpolation for up; here all four kernels are learned, from noise and, for down and up, plain means, and shared by
    all levels.

    Shapes: r (B, height, width) -> the same.
    """

    def __init__(self, noise: float = 0.05):
        super().__init__()

        def kernel(mean: float) -> nn.Parameter:
            return nn.Parameter(mean + noise * torch.randn(1, 1, 3, 3))

        # From noise alone, down and up would have to find each other: the gradient of each is small with the other.
        self.pre, self.down, self.up, self.post = (kernel(mean) for mean in (0.0, 0.25, 0.25, 0.0))

    def forward(self, residual: Tensor, context: Any) -> Tensor:
        return self.level(residual[:, None])[:, 0]

    def level(self, residual: Tensor) -> Tensor:
        """Shapes: (B, 1, height, width) -> the same."""
        change = conv2d(residual, self.pre, padding=1)
        height, width = residual.shape[-2:]
        if min(height, width) >= 3:
            coarse = self.level(conv2d(residual - GRID(change, None), self.down, stride=2))
            # Coarse fields lie on every second line; an even side has one line more behind the last.
            change = change + pad(conv_transpose2d(coarse, self.up, stride=2), (0, 1 - width % 2, 0, 1 - height % 2))
        return change + conv2d(residual - GRID(change, None), self.post, padding=1)

    def operations(self, side: int) -> float:
        """Additions and multiplications for each unknown of a square grid, taps that are zero left out."""
        kernels = (self.pre, self.down, self.up, self.post)
        pre, down, up, post = (2 * int(kernel.count_nonzero()) - 1 for kernel in kernels)
        total = 0.0
        for length in sides(side):
            coarse = ((length - 1) // 2) ** 2 if length >= 3 else 0
            total += length**2 * (pre + APPLIED + 1 + post + 1) + coarse * (down + up + 1)
            total += length**2 * (APPLIED + 2) if coarse else 0
        return total / side**2


def textbook() -> Cycle:
    """The same scheme with the numbers of textbooks: damped Jacobi, full weighting, bilinear interpolation."""
    made = Cycle()
    weights = torch.tensor([0.5, 1.0, 0.5])
    with torch.no_grad():
        for smoother in (made.pre, made.post):
            smoother.zero_()[..., 1, 1] = 0.2  # damping 4/5 over the diagonal 4
        for between_levels in (made.down, made.up):  # times four, as stencils are not divided by their spacing
            between_levels.copy_(torch.outer(weights, weights))
    return made.double()


def sides(side: int) -> list[int]:
    """The sides of a grid and of its coarser ones."""
    return [side] if side < 3 else [side, *sides((side - 1) // 2)]


def smoothed(correction: Callable[[Tensor, Any], Tensor]) -> nn.Module:
    """One step: Gauss-Seidel, then the correction of what it leaves."""
    return body.Stack(body.GaussSeidel(GRID), body.Corrected(GRID, correction))


def solver(step: nn.Module, tolerance: float, bound: int) -> Loop:
    """A loop from zero that stops each row when |b - A x| <= tolerance |b|."""
    start = getattr(step, "start", body.Jacobi(GRID).start)
    return Loop(step, bound, init=start, halt=halt.Below(Iterate.relative, tolerance))


class Method(NamedTuple):
    """A step, what it costs (operations for each unknown), and its factor on errors where theory knows it."""

    step: nn.Module
    operations: float
    radius: float | None = None


def classical(side: int) -> dict[str, Method]:
    """Everything that is not learned, at its best for this side."""
    slowest = math.cos(math.pi / (side + 1))
    omega = body.SOR.optimal(slowest)
    checked = APPLIED + CHECKED
    cycle = textbook()
    return {
        "Jacobi": Method(body.Jacobi(GRID), 2 + checked, slowest),
        "Gauss-Seidel, red and black": Method(body.GaussSeidel(GRID), 4 + checked, slowest**2),
        SOR: Method(body.SOR(GRID, omega), 4 + checked, omega - 1),
        "conjugate gradients": Method(body.ConjugateGradient(GRID), 8 + APPLIED + checked),
        TEXTBOOK: Method(smoothed(cycle), 4 + APPLIED + 1 + cycle.operations(side) + 1 + checked),
    }


class Plan(NamedTuple):
    """How a cycle is trained."""

    smallest: int
    largest: int
    steps: int
    batch: int
    rate: float
    before: int
    span: int


def run(
    folder: Path = Path("runs/poisson"),
    *,
    smallest: int = 8,
    largest: int = 16,
    tests: tuple[int, ...] = (31, 48, 63, 127),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 600,
    batch: int = 8,
    rate: float = 2e-2,
    before: int = 16,
    span: int = 3,
    tolerance: float = 1e-6,
    bound: int = 2000,
    count: int = 16,
    threads: int = 1,
) -> None:
    """Learn a solver of Poisson's equation on small grids, and race it against classical ones on large ones.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        smallest: least side of the grids, in unknowns, that cycles are trained on.
        largest: greatest side of them.
        tests: sides of the grids that are solved.
        seeds: one cycle is trained with each seed.
        steps: training steps of each cycle.
        batch: systems in a training step.
        rate: learning rate, falling to zero by a cosine.
        before: training begins after up to this many steps of solving.
        span: steps of solving that are differentiated.
        tolerance: a row is solved when |b - A x| is at most this share of |b|.
        bound: steps that a method may take.
        count: systems that are solved on each side.
        threads: processor threads that PyTorch may use.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("smallest", smallest, "A grid below three has nothing to coarsen.", least=3)
    bounded("largest", largest, "It cannot be below the smallest side.", least=smallest)
    bounded("threads", threads, "Use at least one thread.")
    between("tolerance", tolerance, 0.0, 1.0, "It is a share of |b|.")
    torch.set_num_threads(threads)
    plan = Plan(smallest, largest, steps, batch, rate, before, span)
    cycles = {seed: trained(plan, seed, folder / f"seed-{seed}") for seed in told(seeds)}
    found = [raced(side, cycles, systems(count, side), tolerance, bound) for side in told(tests)]
    film = filmed(cycles[seeds[0]], systems(1, max(tests)), tolerance, bound)
    broken = diverged(cycles[seeds[0]], systems(count, min(tests)), tolerance)
    settings = {**plan._asdict(), "tolerance": tolerance, "bound": bound, "count": count}
    numbers = {"plan": settings, "results": [result.plain() for result in found], "broken": broken._asdict()}
    files.write(folder / "results.json", json.dumps(numbers, indent=1))
    show("steps to tolerance, and seconds", *table(found))
    print(f"report: {report(found, film, broken, settings, seeds).write(folder / 'report.html')}")


def told(items: tuple[int, ...]) -> Any:
    return within(Progress(len(items), done=0, wanted=True), items)


def systems(count: int, side: int) -> Tensor:
    """Random right-hand sides; those of one side are the same for every method. Shapes: -> (count, side, side)."""
    return torch.randn(count, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)


class Lesson(NamedTuple):
    """Right-hand sides, and how many steps to solve before the differentiated ones."""

    right: Tensor
    before: Tensor


def trained(plan: Plan, seed: int, folder: Path) -> Cycle:
    """A cycle, trained or read from its finished run."""
    torch.manual_seed(seed)
    cycle = Cycle().double()
    train.fit(
        solver(smoothed(cycle), 1e-12, plan.before + plan.span),
        cast(Objective, lambda net, lesson, _: (shrinkage(net, lesson, plan.span), {})),
        drawn(plan),
        adam(cycle, plan.rate),
        steps=plan.steps,
        schedule=train.Warmup(min(20, plan.steps), then=train.Cosine()),
        journal=train.Journal(folder, log_every=20, save_every=200, about=plan._asdict()),
        seed=seed,
    )
    return cycle


def drawn(plan: Plan) -> Callable[[int, torch.Generator], Lesson]:
    """Noise on squares of a random side."""

    def batches(_: int, generator: torch.Generator) -> Lesson:
        side, before = (
            int(torch.randint(low, high + 1, (), generator=generator))
            for low, high in ((plan.smallest, plan.largest), (0, plan.before))
        )
        right = torch.randn(plan.batch, side, side, generator=generator, dtype=torch.float64)
        return Lesson(right, torch.tensor(before))

    return batches


def shrinkage(net: nn.Module, lesson: Lesson, span: int) -> Tensor:
    """The mean logarithm of what a step leaves of the residual, `span` steps long, after `before` steps without it.

    The map is linear, so what is left after some steps is a system of its own, and is scaled to size one.
    """
    right = lesson.right
    if int(lesson.before):
        with torch.no_grad():
            left = net(right, max_steps=int(lesson.before)).value
        right = left.residual / left.absolute()[:, None, None]
    return net(right, max_steps=span).value.relative().log().mean() / span


@torch.no_grad()
def raced(side: int, cycles: dict[int, Cycle], right: Tensor, tolerance: float, bound: int) -> Result:
    """Every method on the same systems."""
    methods = classical(side)
    for seed, cycle in cycles.items():
        cost = methods[TEXTBOOK].operations - textbook().operations(side) + cycle.operations(side)
        methods[f"{LEARNED}, seed {seed}"] = Method(smoothed(cycle), cost)
    return Result(side, {name: tallied(method, right, tolerance, bound) for name, method in methods.items()})


def tallied(method: Method, right: Tensor, tolerance: float, bound: int) -> Tally:
    """One method, timed, and what it claims checked on the x it returned."""
    loop = solver(method.step, tolerance, bound)
    loop(right, max_steps=1)
    spent: list[float] = []
    out = None
    while out is None or (len(spent) < 3 and sum(spent) < 1):
        begun = time.perf_counter()
        out = loop(right)
        spent.append(time.perf_counter() - begun)
    left = (right - GRID(out.value.x, None)).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
    assert not (out.halted & (left > tolerance * (1 + 1e-9))).any(), "a halted row is solved"
    with observe.record(loop) as tape:
        loop(right[:1])
    return Tally(
        steps=out.steps.tolist(),
        halted=out.halted.tolist(),
        left=left.max().item(),
        operations=method.operations,
        seconds=min(spent),
        radius=method.radius or radius(method.step, right.shape[-1]),
        curve=tape.only.scores[:, 0].tolist(),
    )


@torch.no_grad()
def radius(step: nn.Module, side: int, count: int = 40) -> float | None:
    """By how much a step shrinks errors in the end: power iteration on x -> step(x) with b = 0.

    The mean over the last ten steps, of the worse of two starts; conjugate gradients are no linear map and have none.
    """
    if isinstance(step, body.ConjugateGradient):
        return None
    nothing = torch.zeros(2, side, side, dtype=torch.float64)
    state = body.Jacobi(GRID).start(nothing)
    x = systems(2, side)
    growth = []
    for _ in range(count):
        state = step(Iterate(x, -GRID(x, None), state.size), nothing, 0)
        size = state.x.flatten(1).norm(dim=1)
        growth.append(size)
        x = state.x / size[:, None, None]
    return torch.stack(growth[-10:]).log().mean(0).exp().max().item()


@torch.no_grad()
def filmed(cycle: Cycle, right: Tensor, tolerance: float, bound: int, steps: int = 5) -> Film:
    """The solution of one system, and the errors of the learned solver and of SOR after the first steps."""
    truth = solver(smoothed(cycle), tolerance * 1e-4, bound)(right).value.x[0]
    errors = {}
    for name, step in ((LEARNED, smoothed(cycle)), (SOR, classical(right.shape[-1])[SOR].step)):
        with observe.record(loop := solver(step, tolerance * 1e-4, steps), states=True) as tape:
            loop(right)
        errors[name] = [state.x[0] - truth for state in tape.only.states or ()]
    return Film(truth, errors)


@torch.no_grad()
def diverged(cycle: Cycle, right: Tensor, tolerance: float, steps: int = 20) -> Broken:
    """What a learned map does that does not converge: nothing halts, and infinity is an error."""
    wrong = smoothed(lambda residual, context: TOO_LARGE * cycle(residual, context))
    loop = solver(wrong, tolerance, 100_000)
    out = loop(right, max_steps=steps)
    try:
        loop(right, carry=out.carry)
        error = "none"
    except FloatingPointError as raised:
        error = str(raised).split(". ")[0]
    left = Iterate.relative(out.value).max().item()
    return Broken(radius(wrong, right.shape[-1]) or 0.0, int(out.halted.sum()), left, steps, error)
