"""The page, the pictures and the table of `loopaware run distances`.

In: a `Result` for each seed. Out: a `Report`, and a table on the terminal. Deliberately elsewhere: training and testing
(`loopaware.recipes.distances`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopaware.observe import Report
from loopaware.observe.figures import PALETTE, figure
from loopaware.recipes.shared import curve, spread
from loopaware.tasks import graphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNED, KL = "learned halt", "KL stop"
SHALLOW, DEEP, STACK = "fixed, trained depth", "fixed, large depth", "unshared stack"
READERS = (LEARNED, KL, SHALLOW, DEEP, STACK)
NAMES = ("out of reach", "even", "odd")
HUES = ("#bbbbbb", PALETTE[0], PALETTE[1])
"""Of the classes, in the order of `NAMES`."""


class Sweep(NamedTuple):
    """One net on graphs of one size. `halted` and `eccentricity` are those of each graph, `by_loop` of each loop."""

    accuracy: dict[str, float]
    steps: dict[str, float]
    correlation: float
    halted: list[int]
    eccentricity: list[int]
    by_loop: list[float]


class Result(NamedTuple):
    """One seed: a sweep for each size, and the parameters of the two nets."""

    seed: int
    sweeps: dict[int, Sweep]
    parameters: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """As json."""
        sweeps = {str(size): sweep._asdict() for size, sweep in self.sweeps.items()}
        return {"seed": self.seed, "sweeps": sweeps, "parameters": self.parameters}


def report(results: list[Result], plan: dict[str, Any], shown: tuple[graphs.Graphs, list[Tensor], int]) -> Report:
    """The whole page, not yet written."""
    page = Report("Graph distances: a loop that knows when to stop", seeds=[result.seed for result in results])
    page.text(
        f"Nets were trained on graphs of {plan['nodes']} nodes to say of each node whether it is an even or odd number "
        "of edges away from a marked source, or out of its reach, and tested on larger graphs. A graph counts as right "
        "if every node is. One block in a loop has "
        f"{results[0].parameters[LEARNED]:,} parameters, the stack of {plan['layers']} unshared blocks "
        f"{results[0].parameters[STACK]:,}."
    )
    page.table(("reader", *(f"{size} nodes" for size in results[0].sweeps)), table(results), caption=CAPTION)
    page.heading("Accuracy against size")
    page.figure(against_size(results), alt="Share of graphs right against their size, one curve for each reader.")
    page.text(READING.format(shallow=plan["nodes"], deep=plan["deep"], layers=plan["layers"], extra=plan["extra"]))
    page.heading("Depth follows the problem")
    page.figure(
        against_eccentricity(results),
        alt="Scatter of the loop at which each graph is stopped against its eccentricity; points lie on a line.",
        caption="The eccentricity is the distance of the farthest node that can be reached. " + correlated(results),
    )
    page.heading("Overthinking")
    page.figure(
        against_loops(results),
        alt="Share of graphs right after each loop: it rises with the loops and falls when there are too many.",
        caption="Each curve is the mean over seeds of the same nets, read at a fixed depth.",
    )
    page.heading("One graph, loop by loop")
    one, said, stop = shown
    page.text(
        f"A test graph of {one.source.shape[-1]} nodes, of eccentricity {int(one.eccentricity)}, laid out by distance "
        f"from the source. The net of seed {results[-1].seed} stops it after {stop} loops."
    )
    page.frames(
        [frontier(one, classes) for classes in said],
        [caption(one, classes, loop, stop) for loop, classes in enumerate(said, start=1)],
    )
    return page


CAPTION = """Share of graphs right: the mean over seeds, and the smallest and largest where they differ. The loops are \
those of the learned halt, the correlation is theirs with eccentricity."""

READING = """The learned halt and the KL stop end each graph by itself; both were run so. The learned halt reads \
only how much the state still changes, two numbers, taught by "is the whole graph right now?". The fixed depths are \
the same nets, run for {shallow} loops, as many as there are nodes in training, and for {deep}. The unshared stack has \
{layers} blocks of its own and was trained for as many steps.

Training ran every batch 3 to {extra} loops longer than its farthest node needs: nothing taught the state to hold for \
longer than that, which is what the large depth asks of it."""


def table(results: list[Result]) -> list[list[str]]:
    """A line for each reader, then the correlation and the mean number of loops."""
    sizes = list(results[0].sweeps)
    rows = [[name, *(spread([r.sweeps[n].accuracy[name] for r in results]) for n in sizes)] for name in READERS]
    follows = [spread([r.sweeps[n].correlation for r in results], 3) for n in sizes]
    taken = [spread([r.sweeps[n].steps[LEARNED] for r in results], 1) for n in sizes]
    return [*rows, ["loops at the halt", *taken], ["their correlation", *follows]]


def against_size(results: list[Result]) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    sizes = list(results[0].sweeps)
    for name in READERS:
        curve(axes, sizes, [[result.sweeps[size].accuracy[name] for size in sizes] for result in results], name)
    axes.set(xlabel="nodes of the graph", ylabel="graphs right", xticks=sizes, ylim=(-0.03, 1.03))
    axes.legend(loc="lower left", fontsize="small")
    return made


def against_eccentricity(results: list[Result]) -> Figure:
    made = figure(7, 3.8)
    (axes,) = made.axes
    noise = torch.Generator().manual_seed(0)
    longest = 1
    for size in results[0].sweeps:
        far = torch.tensor([value for result in results for value in result.sweeps[size].eccentricity]).float()
        halted = [value for result in results for value in result.sweeps[size].halted]
        shifted = far + (torch.rand(len(far), generator=noise) - 0.5) * 0.6
        axes.plot(shifted.tolist(), halted, ls="", ms=3, alpha=0.35, label=f"{size} nodes")
        longest = max(longest, int(far.max()))
    axes.plot([1, longest], [2, longest + 1], color="black", lw=1, ls="-", marker="", label="eccentricity + 1")
    axes.set(xlabel="eccentricity (points spread sideways)", ylabel="loop of the learned halt")
    axes.legend(fontsize="small")
    return made


def correlated(results: list[Result]) -> str:
    """The correlations, in words."""
    told = [f"{size} nodes {spread([r.sweeps[size].correlation for r in results], 3)}" for size in results[0].sweeps]
    return f"Correlation: {'; '.join(told)}."


def against_loops(results: list[Result]) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    for size in results[0].sweeps:
        series = torch.tensor([result.sweeps[size].by_loop for result in results]).mean(0)
        axes.plot(range(1, len(series) + 1), series.tolist(), marker="", label=f"{size} nodes")
    axes.set(xlabel="loops, the same for every graph", ylabel="graphs right", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    return made


def frontier(one: graphs.Graphs, classes: Tensor) -> Figure:
    """The graph with every node in the hue of what the net says, ringed in black where that is wrong."""
    made = figure(8, 4)
    (axes,) = made.axes
    at = places(one)
    edges = one.adjacency[0].triu(1).nonzero().tolist()
    for start, end in edges:
        ends = (at[start], at[end])
        axes.plot([x for x, _ in ends], [y for _, y in ends], color="#cccccc", lw=0.6, marker="", ls="-", zorder=1)
    wrong = (classes != one.labels[0]).tolist()
    for kind, (name, hue) in enumerate(zip(NAMES, HUES, strict=True)):
        nodes = (classes == kind).nonzero().flatten().tolist()
        rings = ["black" if wrong[node] else hue for node in nodes]
        points(axes, [at[node] for node in nodes], hue, rings)
        axes.scatter([], [], s=42, c=hue, label=name)
    axes.scatter([], [], s=42, c="white", edgecolors="black", linewidths=1.3, label="ringed: wrong")
    points(axes, [at[int(one.source[0].long().argmax())]], "none", ["black"], "source", marker="*", area=170)
    axes.set_axis_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=5, fontsize="small", frameon=False)
    return made


def points(
    axes: Axes,
    at: list[tuple[float, float]],
    hue: str,
    rings: list[str],
    name: str | None = None,
    marker: str = "o",
    area: float = 42,
) -> None:
    x, y = [x for x, _ in at], [y for _, y in at]
    axes.scatter(x, y, s=area, c=hue, edgecolors=rings, linewidths=1.3, marker=marker, label=name, zorder=2)


def places(one: graphs.Graphs) -> list[tuple[float, float]]:
    """Columns by distance; nodes out of reach stand apart, at the right."""
    distances = one.distances[0].tolist()
    apart = max(distances) + 2
    column = [apart if distance < 0 else distance for distance in distances]
    wide = 8  # nodes of a column before the next one begins, out of reach
    placed, filled = [], dict.fromkeys(column, 0)
    for node in column:
        rank = filled[node]
        filled[node] += 1
        total = column.count(node)
        if node == apart:
            placed.append((float(node + rank // wide), rank % wide - (min(total, wide) - 1) / 2))
        else:
            placed.append((float(node), rank - (total - 1) / 2))
    return placed


def caption(one: graphs.Graphs, classes: Tensor, loop: int, stop: int) -> str:
    wrong = int((classes != one.labels[0]).sum())
    ended = " The rule stops here." if loop == stop else " Behind the stop." if loop > stop else ""
    return f"Loop {loop}: {wrong} of {len(classes)} nodes wrong.{ended}"
