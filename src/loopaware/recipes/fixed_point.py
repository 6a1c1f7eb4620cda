"""Gradients of a place of rest against long backpropagation: error, memory and time, by how slowly the loop contracts.

In: options. Out: a folder with `report.html` and `results.json`. The body is h' = tanh(W h + x) with |W| = rate, small
enough for the exact gradient, (I - J)^{-1} with a dense Jacobian J, to be known; everything is compared with it, long
backpropagation included. Deliberately elsewhere: the rules (`loopaware.grad`) and solvers (`loopaware.solve`).
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import Loop, files, grad, init, observe, solve
from loopaware.checks import between, bounded
from loopaware.protocols import Grad
from loopaware.recipes.fixed_point_report import LONG, Found, report, table
from loopaware.recipes.shared import apart, show
from loopaware.train.progress import Progress, within


class Turning(nn.Module):
    """tanh(W h + x), W a rotation times `rate`: a step brings two states at least by this factor closer."""

    def __init__(self, dim: int, rate: float):
        super().__init__()
        self.weight = nn.Parameter(rate * torch.linalg.qr(torch.randn(dim, dim))[0])

    def forward(self, state: Tensor, context: Tensor, index: int) -> Tensor:
        return torch.tanh(state @ self.weight + context)


def run(
    folder: Path = Path("runs/fixed-point"),
    *,
    rates: tuple[float, ...] = (0.5, 0.9, 0.97, 0.99),
    lengths: tuple[int, ...] = (16, 64, 256),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 1500,
    dim: int = 24,
    batch: int = 8,
    scale: float = 0.05,
    tolerance: float = 1e-10,
    repeats: int = 5,
    threads: int = 1,
) -> None:
    """Compare gradient rules on loops that contract slower and slower, in float64, and write a report.

    Args:
        folder: where results.json and report.html go.
        rates: contraction of a step, the norm of W; below 1.
        lengths: numbers of steps at which memory is measured.
        seeds: each makes another W and other inputs.
        steps: of long backpropagation, and the bound of every loop.
        dim: features of a state.
        batch: states that a loop works on at once.
        scale: standard deviation of the inputs; small ones leave tanh nearly linear, so that it contracts slowly.
        tolerance: relative residual of the solvers, forwards and backwards.
        repeats: runs of each rule, of whose times the median is taken.
        threads: processor threads that PyTorch may use.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("repeats", repeats, "Run each rule at least once.")
    for rate in rates:
        between("rates", rate, 0.0, 1 - 1e-6, "A loop whose steps do not contract has no place of rest to speak of.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    results = []
    cases = [(seed, rate) for seed in seeds for rate in rates]
    for seed, rate in within(Progress(len(cases), done=0, wanted=True), cases):
        results += compared(seed, rate, steps, dim, batch, scale, tolerance, repeats)
    memory = {name: [weighed(rule, n, dim, batch) for n in lengths] for name, rule in rules(tolerance).items()}
    settings = {"steps": steps, "dim": dim, "batch": batch, "scale": scale, "tolerance": tolerance}
    plain = {"plan": settings, "lengths": lengths, "bytes": memory, "results": [found._asdict() for found in results]}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show("relative error of the gradient against the exact one", *table(results))
    print(f"report: {report(results, memory, list(lengths), settings).write(folder / 'report.html')}")


def rules(tolerance: float) -> dict[str, Grad]:
    """Every rule by its name in the tables; long backpropagation first."""
    solvers = {
        "Picard": solve.Picard(tolerance, 10_000),
        "Anderson": solve.Anderson(tolerance, 1000),
        "Broyden": solve.Broyden(tolerance, 1000, memory=60),
    }
    return {
        LONG: grad.Full(),
        **{f"Implicit, {name}": grad.Implicit(solver) for name, solver in solvers.items()},
        "Implicit, Anderson twice": grad.Implicit(solvers["Anderson"], forward=solvers["Anderson"]),
        "Phantom(20, .5)": grad.Phantom(20, 0.5),
        "Truncated(20)": grad.Truncated(20),
        "OneStep": grad.OneStep(),
    }


class Case(NamedTuple):
    """A loop, its inputs, and the direction in which its value is judged."""

    loop: Loop
    x: Tensor
    direction: Tensor


def made(seed: int, rate: float, steps: int, dim: int, batch: int, scale: float) -> Case:
    torch.manual_seed(seed)
    loop = Loop(Turning(dim, rate), steps, init=init.Zeros()).double()
    x, direction = torch.randn(2, batch, dim, dtype=torch.float64)
    return Case(loop, scale * x, direction)


def compared(
    seed: int, rate: float, steps: int, dim: int, batch: int, scale: float, tolerance: float, repeats: int
) -> list[Found]:
    """Every rule on one loop."""
    case = made(seed, rate, steps, dim, batch, scale)
    exact, radius = known(case)
    found, long = [], exact
    for name, rule in rules(tolerance).items():
        loop = case.loop.replace(grad=rule)
        measured = [timed(lambda loop=loop: differentiated(loop, case)) for _ in range(repeats)]
        (gradient, taken), seconds = measured[0][0], statistics.median(each[1] for each in measured)
        long = gradient if name == LONG else long
        found.append(
            Found(
                name,
                seed,
                rate,
                radius,
                error=apart(gradient, exact),
                against_long=apart(gradient, long),
                cosine=float(torch.cosine_similarity(gradient, exact, dim=0)),
                seconds=seconds,
                steps=taken,
            )
        )
    return found


def differentiated(loop: Loop, case: Case) -> tuple[Tensor, float]:
    """The gradient of all weights, in one row, and the mean number of steps forwards."""
    out = loop(case.x)
    found = torch.autograd.grad((out.value * case.direction).sum(), list(loop.parameters()))
    return torch.cat([gradient.flatten() for gradient in found]), float(out.steps.double().mean())


def known(case: Case) -> tuple[Tensor, float]:
    """The exact gradient, by a dense Jacobian at the place of rest, and the largest spectral radius of the batch."""
    body, (weight,) = case.loop.body, case.loop.parameters()
    with torch.no_grad():
        rest = solve.Picard(1e-14, 100_000)(lambda h: body(h, case.x, 0), torch.zeros_like(case.x)).value
        slope = 1 - body(rest, case.x, 0).square()
        # f_i = tanh(sum_k h_k W_ki + x_i), so J[b, i, k] = slope_bi W_ki.
        jacobian = slope[..., None] * weight.mT
        eye = torch.eye(weight.shape[0], dtype=weight.dtype)
        adjoint = torch.linalg.solve((eye - jacobian).mT, case.direction[..., None])[..., 0]
    (found,) = torch.autograd.grad((body(rest, case.x, 0) * adjoint).sum(), [weight])
    return found.flatten(), float(torch.linalg.eigvals(jacobian).abs().max())


def weighed(rule: Grad, steps: int, dim: int, batch: int) -> int:
    """Peak bytes of a forward and a backward pass."""
    case = made(0, 0.9, steps, dim, batch, 0.05)
    loop = case.loop.replace(grad=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # after 16 steps a loop may not be at rest
        return observe.peak(lambda: (loop(case.x).value * case.direction).sum().backward()).bytes


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    value = function()
    return value, time.perf_counter() - begun
