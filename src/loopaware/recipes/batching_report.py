"""Tables and figures of `loopaware bench batching`.

In: measured lines, the quality of the predictor. Out: a table for the terminal, a report. Deliberately elsewhere: what
is measured (`loopaware.recipes.batching`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loopaware.observe import Report
from loopaware.observe.figures import PALETTE, figure
from loopaware.recipes.shared import spread
from loopaware.serve import Quality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALONE, FIXED, BASELINE = "one by one", "in order, fixed depth", "in order, masked"


class Line(NamedTuple):
    """A way to answer one stream: sequences per second, time over the baseline's, positions run over those needed."""

    stream: str
    seed: int
    way: str
    speed: float
    ratio: float
    executed: float


def chosen(lines: Sequence[Line], stream: str, way: str) -> list[Line]:
    return [line for line in lines if line.stream == stream and line.way == way]


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each way; means over seeds, with their range."""
    streams = list(dict.fromkeys(line.stream for line in lines))
    columns = ["way"]
    for stream in streams:
        columns += [f"{stream}: per second", "time", "executed"]
    rows = []
    for way in dict.fromkeys(line.way for line in lines):
        row = [way]
        for stream in streams:
            found = chosen(lines, stream, way)
            row += [spread([line.speed for line in found], 0), spread([line.ratio for line in found])]
            row.append(spread([line.executed for line in found]))
        rows.append(row)
    return columns, rows


def report(
    lines: Sequence[Line],
    plan: dict[str, Any],
    qualities: dict[str, Quality],
    scatter: tuple[Sequence[float], Sequence[int]],
    seeds: Sequence[int],
) -> Report:
    page = Report("Batches of requests of mixed difficulty", seeds=seeds)
    page.text(TEXT.format(**plan))
    page.table(*table(lines), caption=CAPTION.format(**plan))
    page.figure(bars(lines), alt="Time of each way over that of in order, masked, next to the positions it ran.")
    page.heading("The predictor of depth")
    page.text(PREDICTOR.format(**plan))
    rows = [(name, quality.number, quality.rank, quality.explained) for name, quality in qualities.items()]
    page.table(
        ("requests", "number", "rank correlation", "explained"),
        rows,
        caption="Spearman's correlation of predicted and true steps, and the share of the variance of log-steps.",
    )
    page.figure(guesses(*scatter), alt="Predicted steps against those that were taken, for one stream.")
    return page


TEXT = """Streams of {count} graphs, each to be answered with a class for every node. The net loops until the farthest \
node is reached, so graphs differ in depth up to sevenfold. Masked: a batch runs until its last graph has stopped. \
Selective: graphs that have stopped leave it (execute.Compacted). Continuous: of four batches as many graphs as one \
holds are in work; where a graph has stopped the next begins (serve.Continuous). Fixed depth: all {bound} loops for \
everyone, stopped graphs kept as they are. By true depth is an upper bound that no policy can know.

Every way gives the same answers after the same number of loops as one by one, or nothing is reported."""

CAPTION = """Sequences per second; time over that of "in order, masked"; positions the body was run for, over those \
needed, that is without padding and without graphs that had stopped. Batches of {size}, medians of {repeats} runs in \
turns, planning included, {threads} thread(s); mean over streams, with their range."""

PREDICTOR = """One hidden layer on the logarithms of size, mean degree and nodes within 1 to {hops} edges of the \
source, fitted to the steps of recorded runs. A wrong guess costs time and never an answer."""


def bars(lines: Sequence[Line]) -> Figure:
    streams, names = (list(dict.fromkeys(getattr(line, name) for line in lines)) for name in ("stream", "way"))
    made = figure(11, 5, columns=len(streams))
    for axes, stream in zip(made.axes, streams, strict=True):
        found = [chosen(lines, stream, way) for way in names]
        scale = mean([line.executed for line in chosen(lines, stream, BASELINE)])
        ratios = [mean([line.ratio for line in each]) for each in found]
        places = range(len(names))
        axes.barh(places, ratios, 0.6, color=PALETTE[0], label="time")
        ran = [mean([line.executed for line in each]) / scale for each in found]
        axes.plot(ran, places, ls="", marker="D", color=PALETTE[1], label="positions run")
        axes.axvline(1.0, color="black", lw=0.8, marker="")
        axes.set_yticks(places, names if axes is made.axes[0] else [""] * len(names))
        axes.invert_yaxis()
        axes.set(title=stream, xlabel=f"over {BASELINE}")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return made


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def guesses(predicted: Sequence[float], taken: Sequence[int]) -> Figure:
    made = figure(5, 4)
    (axes,) = made.axes
    top = max(*predicted, *taken) * 1.05
    axes.plot(taken, predicted, ls="", marker="o", ms=3, alpha=0.5)
    axes.plot([0, top], [0, top], color="black", lw=0.8, marker="", ls="-")
    axes.set(xlabel="steps that were taken", ylabel="predicted steps")
    return made
