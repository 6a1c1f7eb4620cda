"""Estimators of hard halting against the exact gradient: bias and variance on a loop small enough to know the truth.

In: options. Out: a folder with `report.html` and `results.json`. A row of the loop may stop after any step, at a cost
that depends on the step; all stops and their chances can be summed, so the exact gradient of the expected cost in the
logits of the halting rule is known, and each estimator's draws are compared with it. Deliberately elsewhere: the
estimators (`loopaware.halt`, `loopaware.train.objectives`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import Loop, files, halt, init, observe, readout
from loopaware.checks import bounded
from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.protocols import Halt
from loopaware.recipes.shared import show
from loopaware.train import objectives
from loopaware.train.progress import Progress, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM = 4
"""Features of the state, one of them the logit's offset, in which gradients are taken."""

COUNTS = (1, 4, 16, 64, 256, 1024)
"""Draws that are averaged, for the error of a mean."""


class Estimate(NamedTuple):
    """One estimator.

    `bias` and `spread` are lengths of the mean error and of the standard deviation of one draw, both over the length of
    the exact gradient; `noise` is the standard error of `bias`; `steps` are those run for a draw.
    """

    name: str
    bias: float
    noise: float
    spread: float
    steps: float


class Known(nn.Module):
    """A body that turns and shrinks its state, and passes on the offset of the step's logit."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM - 1, DIM - 1)

    def forward(self, state: Tensor, context: dict[str, Tensor], index: int) -> Tensor:
        return torch.cat([torch.tanh(self.linear(state[..., :-1])), context["offset"][:, index, None]], -1)


def run(
    folder: Path = Path("runs/estimators"),
    *,
    steps: int = 8,
    draws: int = 20_000,
    seeds: tuple[int, ...] = (0, 1, 2),
    price: float = 0.05,
    threads: int = 1,
) -> None:
    """Measure bias and spread of every estimator of hard halting against the exact gradient, and write a report.

    Args:
        folder: where results.json and report.html go.
        steps: the bound of the small loop.
        draws: gradients that are drawn from each estimator.
        seeds: each seed makes another loop and another target.
        price: cost of each step that is taken.
        threads: processor threads that PyTorch may use.
    """
    bounded("draws", draws, "Bias is told from noise with some thousands.", least=2)
    bounded("seeds", len(seeds), "Name at least one seed.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    found: dict[int, list[Estimate]] = {}
    bar = Progress(len(seeds), done=0, wanted=True)
    for seed in within(bar, seeds):
        found[seed] = measured(
            seed, bounded("steps", steps, "Two are the fewest to choose from.", least=2), draws, price
        )
    plain = {str(seed): [estimate._asdict() for estimate in estimates] for seed, estimates in found.items()}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show("relative to the exact gradient", COLUMNS, [[e.name, *(f"{n:.3f}" for n in e[1:])] for e in averaged(found)])
    print(f"report: {report(found, steps, draws).write(folder / 'report.html')}")


def measured(seed: int, steps: int, draws: int, price: float) -> list[Estimate]:
    """Every estimator on the loop of one seed."""
    torch.manual_seed(seed)
    rule = halt.Linear(DIM, bias=-1.0)
    nn.init.normal_(rule.head.weight)
    with torch.no_grad():
        rule.head.weight[0, -1] = 1.0
    loop = Loop(Known(), steps, init=init.Projected(DIM, DIM), halt=rule)
    x, target = torch.randn(DIM), torch.randn(DIM - 1)

    def cost(states: Tensor, taken: Tensor) -> Tensor:
        return (states[..., :-1] - target).square().mean(-1) + price * taken

    def context(count: int) -> dict[str, Tensor]:
        return {"x": x.expand(count, -1), "offset": torch.zeros(count, steps, requires_grad=True)}

    exact = gradient_of_expectation(loop, context(1), cost)[0]
    return [compared(name, *draw(loop, context(draws), cost), exact) for name, draw in ESTIMATORS.items()]


Cost = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Loop, dict[str, Tensor], Cost], tuple[Tensor, float]]


def compared(name: str, drawn: Tensor, steps: float, exact: Tensor) -> Estimate:
    """Shapes: drawn (draws, steps), exact (steps)."""
    size, deviation = exact.norm(), drawn.std(0).norm()
    noise = deviation / len(drawn) ** 0.5 / size
    return Estimate(
        name, ((drawn.mean(0) - exact).norm() / size).item(), noise.item(), (deviation / size).item(), steps
    )


def gradient_of_expectation(loop: Loop, context: dict[str, Tensor], cost: Cost) -> Tensor:
    """The exact gradient in the logits: sum_n p_n cost_n over all stops. Shapes: -> (rows, steps)."""
    loop = loop.replace(halt=halt.StickBreaking(loop.halt, epsilon=1e-12), readout=readout.Weighted())
    with observe.record(loop, states=True) as tape:
        loop(context)
    path = tape.only
    total = objectives.expected(path, cost(torch.stack(path.states or ()), path.numbers))
    return torch.autograd.grad(total.sum(), context["offset"])[0]


def hard(policy: Callable[[Halt], Halt]) -> Draw:
    """A rule whose weights are hard forward and soft backward; every step is run."""

    def draw(loop: Loop, context: dict[str, Tensor], cost: Cost) -> tuple[Tensor, float]:
        loop = loop.replace(halt=policy(loop.halt), readout=readout.Weighted())
        with observe.record(loop) as tape:
            out = loop(context)
        total = cost(out.value, objectives.expected_steps(tape.only))
        return torch.autograd.grad(total.sum(), context["offset"])[0], out.steps.float().mean().item()

    return draw


def reinforced(runs: int) -> Draw:
    """REINFORCE over several runs of the same rows, each baseline the mean of the others."""

    def draw(loop: Loop, context: dict[str, Tensor], cost: Cost) -> tuple[Tensor, float]:
        loop = loop.replace(halt=halt.Sampled(loop.halt))
        paths, costs, steps = [], [], 0.0
        for _ in range(runs):
            with observe.record(loop) as tape:
                out = loop(context)
            paths.append(tape.only)
            costs.append(cost(out.value, out.steps))
            steps += out.steps.float().mean().item()
        total = objectives.reinforce(paths, torch.stack(costs)).sum()
        return torch.autograd.grad(total, context["offset"])[0], steps

    return draw


ESTIMATORS: dict[str, Draw] = {
    "REINFORCE, 2 runs": reinforced(2),
    "REINFORCE, 8 runs": reinforced(8),
    "straight-through": hard(halt.StraightThrough),
    "straight-through, identity": hard(lambda rule: halt.StraightThrough(rule, identity=True)),
    "straight-through, not drawn": hard(lambda rule: halt.StraightThrough(rule, drawn=False)),
    "Gumbel, temperature 0.3": hard(lambda rule: halt.Gumbel(rule, temperature=0.3)),
    "Gumbel, temperature 1": hard(lambda rule: halt.Gumbel(rule, temperature=1.0)),
    "Gumbel, temperature 3": hard(lambda rule: halt.Gumbel(rule, temperature=3.0)),
}

COLUMNS = ("estimator", "bias", "its noise", "deviation of one draw", "steps run for a draw")


def averaged(found: dict[int, list[Estimate]]) -> list[Estimate]:
    """The mean over seeds of each estimator."""

    def mean(*values: float) -> float:
        return sum(values) / len(values)

    return [Estimate(group[0].name, *map(mean, *(e[1:] for e in group))) for group in zip(*found.values(), strict=True)]


def report(found: dict[int, list[Estimate]], steps: int, draws: int) -> Report:
    page = Report("Hard halting: what each estimator says of the exact gradient", seeds=tuple(found))
    page.text(
        f"A loop of at most {steps} steps whose rule stops at each with a chance of its own. Its cost at every stop is "
        "known, and so is the exact gradient of the expected cost in the halting logits. From each estimator "
        f"{draws:,} gradients were drawn, for each seed another loop."
    )
    page.table(
        COLUMNS, averaged(found), caption=f"Relative to the length of the exact gradient; mean of {len(found)} seeds."
    )
    page.heading("Bias against variance")
    page.figure(
        plotted(found), alt="Bias of each estimator against the deviation of one draw, and the error of a mean."
    )
    page.text(
        "Bias below its noise cannot be told from none: that is so for REINFORCE alone. The others run every step to "
        "the bound for each draw, REINFORCE only those it takes, in each of its runs. The right plot is the error of a "
        "mean of many draws, the root of bias squared plus variance over their number: where the lines cross, more "
        "draws favour the estimator without bias. What is not drawn has no deviation, and is missing on the left."
    )
    return page


def plotted(found: dict[int, list[Estimate]]) -> Figure:
    made = figure(9, 4.4, columns=2)
    left, right = made.axes
    for index, group in enumerate(zip(*found.values(), strict=True)):
        (line,) = left.plot([e.spread for e in group], [e.bias for e in group], ls="", ms=6, label=group[0].name)
        face = "none" if index >= 6 else line.get_color()
        line.set_markerfacecolor(face)
        name, bias, noise, spread, _ = averaged(found)[index]
        known = bias if bias > 2 * noise else 0.0
        error = [(known**2 + spread**2 / count) ** 0.5 for count in COUNTS]
        right.plot(COUNTS, error, label=name, color=line.get_color(), marker=line.get_marker(), mfc=face, ms=4)
    low = max(group.noise for estimates in found.values() for group in estimates[:2])
    left.axhline(low, color="black", lw=0.8, ls=":", marker="")
    left.annotate("noise of the measurement", (0.01, low), xycoords=("axes fraction", "data"), ha="left", va="bottom")
    left.set(xscale="log", yscale="log", xlabel="standard deviation of one draw", ylabel="bias")
    right.set(xscale="log", yscale="log", xlabel="draws averaged", ylabel="error of the mean")
    left.set_xticks([0.5, 1.0, 2.0, 5.0], ["0.5", "1", "2", "5"])
    left.minorticks_off()
    made.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="x-small")
    return made
