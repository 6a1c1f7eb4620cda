"""The page, the pictures and the table of `loopaware run sudoku`.

In: a `Result` for each seed, and a puzzle with the digits after each step. Out: a `Report`, and the rows of a table.
Deliberately elsewhere: training and testing (`loopaware.recipes.sudoku`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopaware.observe import Report
from loopaware.observe.figures import PALETTE, figure
from loopaware.recipes.shared import curve, spread
from loopaware.tasks import sudoku

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNED, DEEP, SHALLOW, PLAIN = "learned halt", "full depth", "depth of training", "plain layers"
READERS = (LEARNED, DEEP, SHALLOW, PLAIN)
GENERATED, REAL = "held-out puzzles", "puzzles of the file"


class Sweep(NamedTuple):
    """Both nets on one set of puzzles. `steps`, `solved` (at the learned halt) and `holes` are those of each puzzle."""

    accuracy: dict[str, float]
    by_step: list[float]
    steps: list[int]
    solved: list[bool]
    holes: list[int]


class Result(NamedTuple):
    """One seed: a sweep for each set; CPU-seconds of training, parameters and training steps of both nets."""

    seed: int
    sweeps: dict[str, Sweep]
    seconds: dict[str, float]
    parameters: dict[str, int]
    updates: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """As json."""
        return {**self._asdict(), "sweeps": {name: sweep._asdict() for name, sweep in self.sweeps.items()}}


def report(results: list[Result], plan: dict[str, Any], shown: tuple[sudoku.Puzzles, Tensor, int]) -> Report:
    """The whole page, not yet written."""
    size, first = plan["size"], results[0]
    page = Report(f"Sudoku {size} × {size}: recursion against plain layers", seeds=[r.seed for r in results])
    page.text(
        f"Nets were trained on generated puzzles of {plan['holes'][0]} to {plan['holes'][1]} blanks, each with one "
        "solution, and tested on puzzles whose solutions were kept out of training; a puzzle counts as solved if every "
        f"cell is right. One layer that recurs on its answer has {first.parameters[LEARNED]:,} parameters, the "
        f"{plan['layers']} plain layers have {first.parameters[PLAIN]:,}. Both were trained for the same CPU time: "
        f"{first.updates[LEARNED]:,} steps of the one, {first.updates[PLAIN]:,} of the other."
    )
    page.table(*table(results, plan["supervision"]), caption=CAPTION.format(**plan))
    page.heading("Accuracy by step")
    page.figure(against_steps(results), alt="Share of puzzles solved after each step, against the plain layers.")
    page.text(READING.format(**plan) + trusted(results))
    page.heading("Harder puzzles take more steps")
    page.figure(
        against_holes(results),
        alt="Left, mean steps at the learned halt against blanks; right, the share solved there.",
        caption="Each point is the mean of the puzzles with so many blanks, and the range over seeds.",
    )
    page.heading("One puzzle, step by step")
    one, said, stop = shown
    page.text(
        f"A held-out puzzle of {int(one.holes)} blanks in the net of seed {results[-1].seed}, which stops it after "
        f"{stop} {'steps' if stop > 1 else 'step'}. Among the puzzles that were stopped and solved none took longer."
    )
    page.frames(
        [grid(one, digits) for digits in said], [told(one, digits, at, stop) for at, digits in enumerate(said, 1)]
    )
    if REAL in first.sweeps:
        page.heading("Real puzzles")
        page.text(REALITY.format(many=len(first.sweeps[REAL].holes), blanks=average(first.sweeps[REAL].holes)))
    page.heading("What this does not show")
    page.text(LIMITS.format(**plan))
    return page


CAPTION = """Share of puzzles solved, the mean over seeds, and the smallest and largest where they differ. Full depth \
is {deep} steps for every puzzle, the depth of training {supervision}. The learned halt stops each puzzle by itself, \
where its head is {threshold} sure of the grid. CPU-seconds are those of training."""

READING = """A step is one recursion: {inner} updates of a latent, then one of the answer, all by the same layer. \
Training knew {supervision} steps, each with a loss of its own and cut from the one before; in tests the same weights \
go on to {deep}. The rule reads the mean state of the cells and was taught "is the whole grid right now?". It works in \
tests too: a puzzle that has stopped stays as it is, and the loop ends with the last one."""

REALITY = """The nets were also tested on {many} puzzles of a file, of {blanks:.0f} blanks on average, which are in \
the table as they came out. They were trained on generated puzzles only, so this asks for more than the test above: \
puzzles for people are often chosen to be hard, with few givens."""

LIMITS = """By default both nets are told the geometry of the rules: one attention head sees a cell's row, one its \
column, one its block, one the whole grid. The result hangs on that. With heads that all see the whole grid \
(--no-geometry) it was the other way round on 6 × 6, in one run of each of 55 CPU-seconds: the recursion solved 0.42 \
at its best depth and 0.11 at full depth, the plain layers 0.58. Nothing is said of nets that search, or of a solver \
written by hand, which is exact and thousands of times faster.

Equal CPU time is not equal operations, data or memory: the plain layers see more puzzles, the recursion looks at each \
for longer. With hours, other depths or other settings the plain layers may come nearer; settings of both were chosen \
by hand, by a few runs on other held-out puzzles, not by a search.

Test puzzles come from the same generator as those of training. No test solution is a training one with other names \
for its digits, but all grids of 6 × 6 fall into a few kinds by symmetry, so this is no test of new kinds of grids.

A puzzle that the rule stops is not always solved. At a threshold of one half the rule stops too early, as later steps \
would often have mended the grid; the threshold was set high for that reason. Nothing teaches the state to rest beyond \
the {supervision} steps of training: where it does not, as it was seen on 9 × 9, a fixed full depth spoils answers \
that the halt keeps."""


def table(results: list[Result], shallow: int) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each reader of each set of puzzles."""
    rows = []
    for name in results[0].sweeps:
        sweeps = [result.sweeps[name] for result in results]
        for reader in READERS:
            steps = {
                LEARNED: spread([average(sweep.steps) for sweep in sweeps], 1),
                DEEP: str(len(sweeps[0].by_step)),
                SHALLOW: str(shallow),
                PLAIN: "–",
            }
            net = PLAIN if reader == PLAIN else LEARNED
            rows.append(
                [
                    reader if len(results[0].sweeps) == 1 else f"{reader}, {name}",
                    spread([sweep.accuracy[reader] for sweep in sweeps], 3),
                    steps[reader],
                    spread([result.seconds[net] for result in results], 0),
                    f"{results[0].parameters[net]:,}",
                ]
            )
    return ["reader", "solved", "steps", "CPU-seconds", "parameters"], rows


def average(values: list[int]) -> float:
    return sum(values) / len(values)


def trusted(results: list[Result]) -> str:
    """How many of the puzzles that were stopped before the bound were solved, in words."""
    shares = []
    for sweep in (result.sweeps[GENERATED] for result in results):
        ends = [good for good, steps in zip(sweep.solved, sweep.steps, strict=True) if steps < len(sweep.by_step)]
        shares += [sum(ends) / len(ends)] if ends else []
    return f" Of the puzzles it stopped before the bound a share of {spread(shares, 3)} was right." if shares else ""


def against_steps(results: list[Result]) -> Figure:
    made = figure(7, 3.8)
    (axes,) = made.axes
    deep = len(results[0].sweeps[GENERATED].by_step)
    for name in results[0].sweeps:
        sweeps = [result.sweeps[name] for result in results]
        curve(axes, range(1, deep + 1), [sweep.by_step for sweep in sweeps], f"recursion, {name}")
        plain = [sweep.accuracy[PLAIN] for sweep in sweeps]
        curve(axes, (1, deep), [[value, value] for value in plain], f"plain layers, {name}")
    sweeps = [result.sweeps[GENERATED] for result in results]
    for result, sweep in zip(results, sweeps, strict=True):
        label = "learned halt" if result is results[0] else None
        axes.scatter([average(sweep.steps)], [sweep.accuracy[LEARNED]], c="black", marker="x", zorder=3, label=label)
    axes.set(xlabel="steps, the same for every puzzle", ylabel="puzzles solved", ylim=(-0.03, 1.03))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small", frameon=False)
    return made


def against_holes(results: list[Result]) -> Figure:
    made = figure(8, 3.4, columns=2)
    left, right = made.axes
    for name in results[0].sweeps:
        sweeps = [result.sweeps[name] for result in results]
        blanks = sorted(set(sweeps[0].holes))
        curve(left, blanks, [by_holes(sweep.holes, sweep.steps, blanks) for sweep in sweeps], name)
        curve(right, blanks, [by_holes(sweep.holes, sweep.solved, blanks) for sweep in sweeps], name)
    left.set(xlabel="blanks", ylabel="mean steps at the learned halt")
    right.set(xlabel="blanks", ylabel="solved there", ylim=(-0.03, 1.03))
    left.legend(fontsize="small")
    return made


def by_holes(holes: list[int], values: list[Any], blanks: list[int]) -> list[float]:
    """The mean value of the puzzles with each number of blanks."""
    many, found = torch.tensor(holes), torch.tensor(values).float()
    return [found[many == number].mean().item() for number in blanks]


def grid(one: sudoku.Puzzles, digits: Tensor) -> Figure:
    """The grid: givens black on grey, digits of the net blue where they are right and orange where they are wrong."""
    size = one.size
    high, wide = sudoku.shape(size)
    made = figure(4, 4)
    (axes,) = made.axes
    givens, solution = one.givens[0].tolist(), one.solution[0].tolist()
    for cell, digit in enumerate(digits.tolist()):
        row, column = divmod(cell, size)
        given, good = bool(givens[cell]), digit == solution[cell]
        if given:
            axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], color="#e8e8e8", lw=0)
        hue = PALETTE[1] if not good else "black" if given else PALETTE[0]
        weight = "bold" if not good else "normal"
        axes.text(column + 0.5, row + 0.5, str(digit), color=hue, weight=weight, ha="center", va="center", size=17)
    for at in range(size + 1):
        axes.plot([0, size], [at, at], "k-", marker="", lw=1.8 if at % high == 0 else 0.5)
        axes.plot([at, at], [0, size], "k-", marker="", lw=1.8 if at % wide == 0 else 0.5)
    axes.set(xlim=(-0.05, size + 0.05), ylim=(size + 0.05, -0.05), aspect="equal")
    axes.set_axis_off()
    return made


def told(one: sudoku.Puzzles, digits: Tensor, step: int, stop: int) -> str:
    wrong = int((digits != one.solution[0]).sum())
    ended = " The rule stops here." if step == stop else ""
    return f"Step {step}: {wrong} of {one.size**2} cells wrong, in orange and bold.{ended}"
