"""The page, the pictures and the table of `loopaware run text`.

In: a `Result` for each seed. Out: a `Report`, and the rows of a table. Deliberately elsewhere: training and testing
(`loopaware.recipes.text`).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from loopaware.observe import Report
from loopaware.observe.figures import PALETTE, figure
from loopaware.recipes.shared import curve, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOPED, FEW, MANY = "looped", "plain, equal parameters", "plain, equal operations"
NARROW = "plain, equal parameters, narrow and deep"
PLAIN = (FEW, NARROW, MANY)
KL, ENTROPY, CONFIDENCE = "KL", "entropy", "confidence"
UNIFORM = "the same for all"


class Net(NamedTuple):
    """A trained net: held-out bits per byte, and what its training took. Units: seconds are of one processor."""

    bits: float
    layers: int
    parameters: int
    operations: float
    seconds: float


class Point(NamedTuple):
    """A point of the exit curve; for loops that are the same for all bytes the threshold is their number."""

    threshold: float
    bits: float
    loops: float


class Result(NamedTuple):
    """One seed: each net, the looped one's bits per byte by loops, and its exit curves."""

    seed: int
    nets: dict[str, Net]
    sweep: dict[int, float]
    exits: dict[str, list[Point]]

    def plain(self) -> dict[str, Any]:
        """As json."""
        return {
            "seed": self.seed,
            "nets": {name: net._asdict() for name, net in self.nets.items()},
            "sweep": {str(loops): value for loops, value in self.sweep.items()},
            "exits": {name: [point._asdict() for point in points] for name, points in self.exits.items()},
        }


def report(results: list[Result], about: dict[str, Any]) -> Report:
    """The whole page, not yet written."""
    page = Report("Bytes of English: a loop against plain layers", seeds=[result.seed for result in results])
    page.text(SETTING.format(**about))
    page.table(*table(results), caption=CAPTION)
    page.text(verdict(results))
    page.heading("More and fewer loops than in training")
    page.figure(by_loops(results, about), alt="Held-out bits per byte against the loops, beside the plain nets'.")
    page.text("The grey range is that of training. One curve is the mean over seeds, its band their range.")
    page.heading("Bytes that leave early")
    page.figure(by_exit(results), alt="Held-out bits per byte against mean loops, for three rules and equal depth.")
    page.table(*exit_table(results), caption=EXITS)
    return page


SETTING = """Nets were trained to predict the next byte of Python's own help topics ({learned:,} bytes learned, \
{held_out:,} behind them held out, Python {python}, SHA-256 of both {sha256}), in pieces of {length} bytes, {batch} to \
a step, for {steps:,} steps: equal text for all. The looped net has {prelude} layers before its loop, {core} in it and \
{coda} behind it, width {dim}, as the plain ones but for the narrow one ({narrow}). Its core runs once in the first \
{alone:.0%} of the training steps, then {low} to {high} times, drawn for each step. Held-out numbers are of {tested:,} \
bytes, in pieces of {length} that know nothing of each other, at {loops} loops."""

CAPTION = """The mean over seeds, and the smallest and largest where they differ. Operations are those of training, \
three times the forward passes that were run, counted. CPU seconds are those of training, from timed steps."""

EXITS = """Each byte leaves the loop by itself. The last column is what the same mean of loops would have given if it \
were the same for all bytes, read off the line between whole numbers: lower is better."""


def table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each net."""
    rows = []
    for name in results[0].nets:
        nets = [result.nets[name] for result in results]
        rows.append(
            [
                name,
                str(nets[0].layers),
                f"{nets[0].parameters:,}",
                spread([net.operations / 1e9 for net in nets], 0),
                spread([net.seconds for net in nets], 0),
                spread([net.bits for net in nets], 3),
            ]
        )
    return ["net", "own layers", "parameters", "billion operations", "CPU seconds", "bits per byte"], rows


def verdict(results: list[Result]) -> str:
    """Who is ahead, seed by seed, whoever it is."""
    said = []
    for name in PLAIN:
        ahead = [result.nets[name].bits - result.nets[LOOPED].bits for result in results]
        wins = sum(each > 0 for each in ahead)
        mean = statistics.fmean(ahead)
        word = "better" if mean > 0 else "worse"
        said.append(
            f"Against {name}, the loop is {word} by {abs(mean):.3f} bits per byte on average, and ahead with {wins} of "
            f"{len(ahead)} seeds."
        )
    return " ".join(said)


def by_loops(results: list[Result], about: dict[str, Any]) -> Figure:
    made = figure(7, 3.8)
    (axes,) = made.axes
    loops = list(results[0].sweep)
    axes.axvspan(about["low"], about["high"], color="#eeeeee", zorder=0)
    curve(axes, loops, [[result.sweep[n] for n in loops] for result in results], LOOPED)
    for number, name in enumerate(PLAIN, start=1):
        level(
            axes, [result.nets[name].bits for result in results], PALETTE[number], ("--", "-.", ":")[number - 1], name
        )
    axes.set(
        xlabel="loops, the same for every byte", ylabel="held-out bits per byte", xticks=loops[:: 1 + len(loops) // 17]
    )
    axes.legend(fontsize="small")
    return made


def level(axes: Axes, values: list[float], color: str, style: str, label: str) -> None:
    """A line across, and the range around it."""
    axes.axhline(statistics.fmean(values), color=color, ls=style, marker="", label=label)
    axes.axhspan(min(values), max(values), color=color, alpha=0.15, lw=0)


def by_exit(results: list[Result]) -> Figure:
    """Every point is the mean over seeds of one threshold."""
    made = figure(7, 3.8)
    (axes,) = made.axes
    for name in results[0].exits:
        points = sorted((point.loops, point.bits) for point in averaged(results, name))
        axes.plot(*zip(*points, strict=True), label=name, ms=4)
    axes.set(xlabel="mean loops of a byte", ylabel="held-out bits per byte")
    axes.legend(fontsize="small")
    return made


def averaged(results: list[Result], name: str) -> list[Point]:
    """The mean over seeds, threshold by threshold."""
    together = zip(*(result.exits[name] for result in results), strict=True)
    return [Point(*(statistics.fmean(column) for column in zip(*points, strict=True))) for points in together]


def exit_table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """A line for each rule and threshold."""
    uniform = averaged(results, UNIFORM)
    rows = []
    for name in (KL, ENTROPY, CONFIDENCE):
        for number, point in enumerate(averaged(results, name)):
            each = [result.exits[name][number] for result in results]
            rows.append(
                [
                    name,
                    f"{point.threshold:g}",
                    spread([one.loops for one in each], 2),
                    spread([one.bits for one in each], 3),
                    f"{between(uniform, point.loops):.3f}",
                ]
            )
    return ["rule", "threshold", "mean loops", "bits per byte", "at equal depth"], rows


def between(uniform: list[Point], loops: float) -> float:
    """Bits per byte at a number of loops that need not be whole."""
    low = min(max(int(loops), 1), len(uniform))
    part = max(loops - low, 0.0)
    following = uniform[min(low, len(uniform) - 1)]
    return (1 - part) * uniform[low - 1].bits + part * following.bits
