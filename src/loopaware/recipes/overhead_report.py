"""The tables, the figure and the page of `loopaware bench overhead`.

In: measured lines. Out: columns and rows, a page. Deliberately elsewhere: the measuring (`loopaware.recipes.overhead`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopaware.observe import Report
from loopaware.observe.figures import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loopaware.recipes.overhead import Body, Driver

Table = tuple[list[str], list[list[str]]]


def table_of_bodies(lines: list[Body]) -> Table:
    """A line for each width and pass."""
    columns = ["d", "passes", "body, ms", "products", "with attention", "GFLOP/s of products"]
    rows = [
        [
            str(line.dim),
            line.passes,
            f"{line.seconds['body'] * 1e3:.1f}",
            f"{line.share:.3f}",
            f"{line.both:.3f}",
            f"{line.operations / line.seconds['matrix products'] / 1e9:.0f}",
        ]
        for line in lines
    ]
    return columns, rows


def table_of_kinds(lines: list[Body]) -> Table:
    """A line for each width and pass: the share of each kind of kernel in the time of the body."""
    kinds = list(shares(lines[0]))
    rows = [[str(line.dim), line.passes, *(f"{share:.3f}" for share in shares(line).values())] for line in lines]
    return ["d", "passes", *kinds], rows


def shares(line: Body) -> dict[str, float]:
    """Of the time of a run that is watched kernel by kernel; what is left over is spent between kernels."""
    whole = line.seconds["watched"]
    found = {name: seconds / whole for name, seconds in line.kinds.items()}
    return {**found, "between kernels": 1 - sum(found.values())}


def table_of_drivers(lines: list[Driver]) -> Table:
    """A line for each shape and pass."""
    columns = ["d", "batch", "tokens", "passes", "bare steps, ms", "loop", "microseconds a step"]
    rows = [
        [
            str(line.dim),
            str(line.batch),
            str(line.tokens),
            line.passes,
            f"{line.seconds['bare steps'] * 1e3:.2f}",
            f"{line.ratio:.3f}",
            f"{line.each:.0f}",
        ]
        for line in lines
    ]
    return columns, rows


def report(bodies: list[Body], drivers: list[Driver], plan: dict[str, Any]) -> Report:
    page = Report("What a step costs beside its products, and a loop beside its steps", seeds=(0,))
    page.text(
        f"A transformer block on {plan['batch']} sequences of {plan['tokens']} tokens, {plan['heads']} heads, in "
        "float32. Its matrix products are kept as it runs them, with their operands, and run again by themselves into "
        "results that were allocated before: their time over that of the block is the block's share of what this "
        "machine makes of these products."
    )
    large = ", ".join(f"{name} {speed:.0f}" for name, speed in plan["square"].items())
    page.table(*table_of_bodies(bodies), caption=BODIES.format(**plan, large=large))
    page.table(*table_of_kinds(bodies), caption=KINDS.format(**plan))
    page.figure(stacked(bodies), alt="Share of each kind of kernel in a block's time, by width, forward and backward.")
    page.text(
        f"The same block in a loop of {plan['steps']} steps that never halts, with execute.Eager, against a for-loop "
        "over the block. Values and gradients are equal to the bit, or nothing is reported."
    )
    page.table(*table_of_drivers(drivers), caption=DRIVERS.format(**plan))
    return page


BODIES = """Products, with attention: medians of {repeats} runs or more in turns over that of the body, {threads} \
thread(s); with one, seconds are those of the processor. A square product of 2048 rows, in GFLOP/s: {large}."""

KINDS = """Time of each kind of kernel in a run that is watched kernel by kernel, medians of {repeats} runs or more. \
Sums and copies: residuals, gradients of biases, views; products write their biases themselves. Between kernels: \
Python, what PyTorch does to find a kernel, and the watching."""

DRIVERS = """Loop: medians of {repeats} runs or more in turns over that of the bare steps, {threads} thread(s); the \
microseconds are what it adds to a step."""


def stacked(lines: list[Body]) -> Figure:
    made = figure(9, 4, columns=2)
    for axes, passes in zip(made.axes, dict.fromkeys(line.passes for line in lines), strict=True):
        chosen = [line for line in lines if line.passes == passes]
        below = [0.0] * len(chosen)
        for name in shares(chosen[0]):
            heights = [shares(line)[name] for line in chosen]
            axes.bar(range(len(chosen)), heights, 0.6, bottom=below, label=name)
            below = [one + other for one, other in zip(below, heights, strict=True)]
        axes.set_xticks(range(len(chosen)), [f"d {line.dim}" for line in chosen])
        axes.set(title=passes, ylabel="share of the body's time")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    return made
