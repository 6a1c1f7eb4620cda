"""The page, the pictures and the tables of `loopaware run poisson`.

In: a `Result` for each side of a grid, a `Film`. Out: a `Report`, and the rows of a table. Deliberately elsewhere:
training and racing (`loopaware.recipes.poisson`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from loopaware.observe import Report
from loopaware.observe.figures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOR, TEXTBOOK, LEARNED = "SOR, optimal omega", "textbook multigrid", "learned"


class Tally(NamedTuple):
    """One method on the systems of one side.

    `left` is the largest |b - A x| / |b| of the returned x; `operations` are those of a step for each unknown;
    `seconds` are those of all systems together; `radius` is the factor on errors in the long run; `curve` is the
    relative residual of the first system after each step.
    """

    steps: list[int]
    halted: list[bool]
    left: float
    operations: float
    seconds: float
    radius: float | None
    curve: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.steps)


class Result(NamedTuple):
    """One side of the grid: a tally for each method."""

    side: int
    tallies: dict[str, Tally]

    def plain(self) -> dict[str, Any]:
        """As json."""
        return {"side": self.side, "tallies": {name: tally._asdict() for name, tally in self.tallies.items()}}

    @property
    def learned(self) -> list[Tally]:
        """One tally for each seed."""
        return [tally for name, tally in self.tallies.items() if name.startswith(LEARNED)]


class Film(NamedTuple):
    """A solution, and |x_t - solution| after the first steps of two methods. Shapes: (side, side) each."""

    truth: Tensor
    errors: dict[str, list[Tensor]]


class Broken(NamedTuple):
    """A solver whose map diverges: the factor on errors, rows that halted, what is left, and the error in the end."""

    radius: float
    halted: int
    left: float
    after: int
    error: str


def report(found: list[Result], film: Film, broken: Broken, plan: dict[str, Any], seeds: Sequence[int]) -> Report:
    """The whole page, not yet written."""
    page = Report("Poisson's equation: learned on small grids, solved on large ones", seeds=seeds)
    page.text(INTRODUCTION.format(**plan))
    page.table(*against(found), caption=AGAINST)
    page.text(verdict(found))
    page.heading("Every method")
    page.text(COUNTED.format(**plan))
    for result in found:
        lines = [line(*pair) for pair in result.tallies.items()]
        page.table(COLUMNS, lines, caption=f"{result.side} x {result.side} unknowns.")
    page.heading("Residuals step by step")
    page.figure(curves(found[-1], plan["tolerance"]), alt="Relative residual of one system after each step.")
    page.heading("The first steps")
    page.frames(*frames(film))
    page.heading("What a row that halted promises")
    page.text(PROMISE.format(**plan, **broken._asdict()))
    return page


INTRODUCTION = """-Laplace u = f on a square, u = 0 on its border, on the five-point grid, for random right-hand sides.
Every method is the body of a loop that stops each system by itself when |b - A x| is at most {tolerance:g} of |b|. The
learned one smooths by one step of Gauss-Seidel and adds a correction of what that leaves, made by a linear net of 36
numbers (four kernels of three by three, shared by all levels of coarsening), trained for {steps} steps on grids of
{smallest} to {largest} unknowns a side. Since no residual means no correction, the solution is its fixed point on every
grid."""

AGAINST = """The learned solver, the worst of the seeds, over the best step count of classical methods that do not \
coarsen (SOR with the optimal omega) and over multigrid with textbook numbers in place of learned ones. Below one the \
learned solver wins."""

COUNTED = """Steps until |b - A x| <= {tolerance:g} |b|, mean and range over {count} systems; dashes where some system \
was not solved in {bound}. The factor is that on errors in the long run, by theory for the first three and by power \
iteration for the last. Operations are additions and multiplications for each unknown, the stopping test included; \
conjugate gradients apply A once more in a step than a textbook's, to know their true residual. Seconds are those of \
all {count} systems in float64, the least of up to three runs, whatever else the machine did."""

PROMISE = """Every method computes b - A x of what it returns anew, in the loop, so a system that halted is solved; \
this run has checked each on the returned x. A method that cannot solve a system does not halt it: with a correction \
thirty times as large, the learned map multiplies errors by {radius:.2f} a step, {halted} of {count} systems had \
halted after {after} steps, and the largest relative residual was {left:.2g}. Let run on, the loop ends with an error: \
"{error}" """

COLUMNS = ("method", "factor", "steps", "operations a step", "operations", "seconds")


def line(name: str, tally: Tally) -> list[object]:
    """One row of a side's table."""
    factor = None if tally.radius is None else f"{tally.radius:.4f}"
    each = f"{tally.operations:.1f}"
    if not all(tally.halted):
        return [name, factor, None, each, None, None]
    low, high = min(tally.steps), max(tally.steps)
    steps = f"{tally.mean:.1f}" if low == high else f"{tally.mean:.1f} ({low}–{high})"
    spent = f"{tally.mean * tally.operations:.0f}"
    return [name, factor, steps, each, spent, f"{tally.seconds:.3f}"]


def ratios(learned: Tally, other: Tally) -> tuple[float, float, float]:
    """Steps, operations, seconds of one over those of another."""
    steps = learned.mean / other.mean
    return steps, steps * learned.operations / other.operations, learned.seconds / other.seconds


def worst(result: Result, name: str) -> tuple[float, ...]:
    """The largest ratio over the seeds; infinite where one did not solve all."""
    if not all(all(tally.halted) for tally in result.learned):
        return (float("inf"),) * 3
    pairs = [ratios(tally, result.tallies[name]) for tally in result.learned]
    return tuple(max(column) for column in zip(*pairs, strict=True))


def against(found: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what the learned solver takes over what others take."""
    columns = ["side", *(f"{what} / {name}" for name in (SOR, TEXTBOOK) for what in ("steps", "operations", "seconds"))]
    rows = [[str(r.side), *(f"{ratio:.2f}" for name in (SOR, TEXTBOOK) for ratio in worst(r, name))] for r in found]
    return columns, rows


def verdict(found: list[Result]) -> str:
    """Where every seed wins, in words."""
    said = []
    for name in (SOR, TEXTBOOK):
        for number, what in enumerate(("steps", "operations", "seconds")):
            won = [str(r.side) for r in found if worst(r, name)[number] < 1]
            where = {0: "on no side", len(found): "on every side"}.get(len(won), f"on side {', '.join(won)} only")
            said.append(f"Fewer {what} than {name}: {where}.")
    return " ".join(said)


def table(found: list[Result]) -> tuple[list[str], list[list[str]]]:
    """For the terminal: a line for each method, steps and seconds for each side."""
    rows = []
    for name in found[0].tallies:
        tallies = [result.tallies[name] for result in found]
        rows.append([name, *(f"{t.mean:.1f}, {t.seconds:.3f}" if all(t.halted) else "–" for t in tallies)])
    return ["method", *(f"side {result.side}" for result in found)], rows


def curves(result: Result, tolerance: float) -> Figure:
    made = figure(7, 4)
    (axes,) = made.axes
    for name, tally in result.tallies.items():
        if not name.startswith(LEARNED):
            axes.plot(range(1, len(tally.curve) + 1), tally.curve, label=name, marker="")
    for seed, tally in enumerate(result.learned):
        label = "" if seed else f"{LEARNED}, each seed"
        axes.plot(range(1, len(tally.curve) + 1), tally.curve, label=label, marker="", color="black", ls="-", lw=1)
    axes.axhline(tolerance, color="black", lw=0.8, ls=":", marker="")
    axes.set(xscale="log", yscale="log", ylim=(tolerance / 30, 3e3))
    axes.set(xlabel=f"steps, {result.side} x {result.side} unknowns", ylabel="|b - A x| / |b|")
    axes.legend(fontsize="small", loc="upper right")
    return made


def frames(film: Film) -> tuple[list[Figure], list[str]]:
    """The solution beside the errors of both methods, step by step, on one scale of colours."""
    figures, captions = [], []
    top = float(film.truth.abs().max())
    for step in range(len(next(iter(film.errors.values())))):
        made = figure(9, 3, columns=1 + len(film.errors))
        first, *others = made.axes
        for axes in made.axes:
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
        first.imshow(film.truth.numpy(), cmap="RdBu", vmin=-top, vmax=top)
        first.set_title("solution")
        sizes = []
        for axes, (name, errors) in zip(others, film.errors.items(), strict=True):
            axes.imshow(errors[step].numpy(), cmap="RdBu", vmin=-top, vmax=top)
            axes.set_title(f"error, {name}")
            sizes.append(f"{name} {float(errors[step].abs().max()) / top:.2g}")
        figures.append(made)
        captions.append(f"After {step + 1} steps; largest error over largest value: {', '.join(sizes)}.")
    return figures, captions
