"""The page, the pictures and the table of `loopaware run chase`.

In: a `Result` for each seed. Out: a `Report`, and the rows of a table. Deliberately elsewhere: training and testing
(`loopaware.recipes.chase`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from loopaware.observe import Report
from loopaware.observe.figures import PALETTE, figure
from loopaware.recipes.shared import curve, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loopaware.recipes.chase import Problem

LEARNED, KL = "learned halt", "KL stop"
SHALLOW, DEEP, STACK = "fixed, trained depth", "fixed, large depth", "unshared stack"
READERS = (LEARNED, KL, SHALLOW, DEEP, STACK)


class Sweep(NamedTuple):
    """One net on problems of one number of hops. `halted` is that of each problem, `flops` are those of a problem."""

    accuracy: dict[str, float]
    steps: dict[str, float]
    halted: list[int]
    flops: dict[str, float]
    by_loop: list[float]


class Result(NamedTuple):
    """One seed: a sweep for each number of hops, and the parameters of the two nets."""

    seed: int
    sweeps: dict[int, Sweep]
    parameters: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """As json."""
        sweeps = {str(hops): sweep._asdict() for hops, sweep in self.sweeps.items()}
        return {"seed": self.seed, "sweeps": sweeps, "parameters": self.parameters}


def report(results: list[Result], plan: dict[str, Any], problem: Problem, said: Tensor, stop: int) -> Report:
    """The whole page, not yet written."""
    page = Report("Pointer chasing: one loop for each hop", seeds=[result.seed for result in results])
    page.text(
        f"Nets were trained to follow 1 to {plan['hops']} pointers to a root and to say its colour, among the nodes of "
        "four trees of the same depth, and tested on more. Names are random vectors, new in every problem. The loop "
        f"has {results[0].parameters[LEARNED]:,} parameters, the stack of {plan['layers']} unshared blocks "
        f"{results[0].parameters[STACK]:,}."
    )
    page.table(*table(results), caption=CAPTION)
    page.heading("Accuracy against hops")
    page.figure(against_hops(results, plan["hops"]), alt="Share of problems right against the number of hops.")
    page.text(READING.format(**plan))
    page.heading("Depth follows the problem")
    page.figure(halting(results), alt="Loops of the learned halt against hops, near the line of hops + 1.")
    page.heading("Too few loops and too many")
    page.figure(by_loop(results), alt="Share of problems right after each loop, one curve for each number of hops.")
    page.heading("One problem, loop by loop")
    page.text(
        f"The path from the start to its root, in the net of seed {results[-1].seed}, which stops after {stop} loops. "
        "The root's colour moves down the path, a node with each loop."
    )
    page.figure(path(problem, said), alt="Colours that the net gives the nodes of the path after each loop.")
    return page


CAPTION = """Share of problems right: the mean over seeds, and the smallest and largest where they differ. Loops and \
operations are those of the learned halt, per problem; dense is a run of the large depth."""

READING = """The learned halt reads only how much the state still changes, two numbers, taught by "is every node right \
now?"; the KL stop has not been taught at all. The fixed depths are the same nets, run for one loop more than there \
were hops in training, and for {deep}. The unshared stack has {layers} blocks of its own and was trained for as many \
steps. Training ran every batch 2 to {extra} loops longer than its hops need."""


def table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each reader, then loops and operations."""
    tests = list(results[0].sweeps)
    rows = [[name, *(spread([r.sweeps[n].accuracy[name] for r in results]) for n in tests)] for name in READERS]
    taken = [spread([r.sweeps[n].steps[LEARNED] for r in results], 1) for n in tests]
    done, dense = (
        [f"{max(r.sweeps[n].flops[name] for r in results) / 1e6:.1f}" for n in tests] for name in (LEARNED, DEEP)
    )
    rows += [["loops at the halt", *taken], ["million operations", *done], ["million, dense", *dense]]
    return ["reader", *(f"{hops} hops" for hops in tests)], rows


def against_hops(results: list[Result], trained: int) -> Figure:
    made = figure(7, 3.8)
    (axes,) = made.axes
    tests = list(results[0].sweeps)
    for name in READERS:
        curve(axes, tests, [[result.sweeps[hops].accuracy[name] for hops in tests] for result in results], name)
    axes.axvspan(1, trained, color="#eeeeee", zorder=0, label="hops of training")
    axes.axhline(0.25, color="black", lw=0.8, ls=":", marker="", label="chance")
    axes.set(xlabel="hops", ylabel="problems right", xticks=tests, ylim=(-0.03, 1.03))
    axes.legend(loc="lower left", fontsize="small")
    return made


def halting(results: list[Result]) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    tests = list(results[0].sweeps)
    for result in results:
        axes.plot(tests, [result.sweeps[hops].steps[LEARNED] for hops in tests], label=f"seed {result.seed}")
    axes.plot(tests, [hops + 1 for hops in tests], color="black", lw=1, ls="-", marker="", label="hops + 1")
    axes.set(xlabel="hops", ylabel="mean loops of the learned halt", xticks=tests)
    axes.legend(fontsize="small")
    return made


def by_loop(results: list[Result]) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    for hops in list(results[0].sweeps)[::2][-6:]:
        series = [result.sweeps[hops].by_loop for result in results]
        mean = [sum(column) / len(series) for column in zip(*series, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, marker="", label=f"{hops} hops")
    axes.set(xlabel="loops, the same for every problem", ylabel="problems right", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    return made


def path(problem: Problem, said: Tensor) -> Figure:
    """A square for each node of the path and each loop, in the colour that the net gives; a cross where it is wrong."""
    one = problem.pointers
    node, nodes = int(one.start[0]), [int(one.start[0])]
    while int(one.pointer[0, node]) != node:
        node = int(one.pointer[0, node])
        nodes.append(node)
    made = figure(7, 0.32 * len(nodes) + 1)
    (axes,) = made.axes
    for row, place in enumerate(nodes):
        truth = int(one.label[0, place])
        for loop, colours in enumerate(said, start=1):
            colour = int(colours[place])
            axes.scatter([loop], [row], s=150, c=PALETTE[colour], marker="s")
            if colour != truth:
                axes.scatter([loop], [row], s=40, c="white", marker="x")
    ticks = ["start", *(f"{hop} hops on" if hop > 1 else "1 hop on" for hop in range(1, len(nodes)))]
    axes.set(
        xlabel="loop (crosses are wrong)", yticks=range(len(nodes)), yticklabels=ticks, xticks=range(1, len(said) + 1)
    )
    axes.grid(visible=False)
    return made
