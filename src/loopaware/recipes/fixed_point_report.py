"""The page, the pictures and the table of `loopaware run fixed-point`.

In: what was found of each rule, seed and rate; peak bytes. Out: a `Report`, and the rows of a table. Deliberately
elsewhere: the comparison (`loopaware.recipes.fixed_point`).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.shared import curve, told_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG = "long backpropagation"


class Found(NamedTuple):
    """One rule on one loop. Units: `steps` forwards; errors relative to the exact and to the long gradient."""

    rule: str
    seed: int
    rate: float
    radius: float
    error: float
    against_long: float
    cosine: float
    seconds: float
    steps: float


def report(results: list[Found], memory: dict[str, list[int]], lengths: list[int], plan: dict[str, Any]) -> Report:
    """The whole page, not yet written."""
    page = Report("Gradients of a place of rest", seeds=sorted({found.seed for found in results}))
    page.text(
        f"A loop h' = tanh(W h + x) of {plan['dim']} features, W a rotation times a contraction rate, in float64. The "
        "exact gradient of its place of rest is (I - J)^-1 with a dense Jacobian; long backpropagation takes "
        f"{plan['steps']} steps and differentiates them all. Solvers end at a relative residual of "
        f"{plan['tolerance']:g}."
    )
    page.table(
        *table(results), caption="Relative error of the gradient against the exact one: the largest of all seeds."
    )
    page.figure(errors(results), alt="Relative error of each rule against the contraction rate.")
    page.table(*details(results), caption=DETAILS)
    page.heading("Memory")
    page.table(
        *bytes_table(memory, lengths), caption="Peak bytes of a forward and a backward pass, by number of steps."
    )
    page.figure(bytes_figure(memory, lengths), alt="Peak bytes of each rule against the number of steps.")
    return page


DETAILS = """At each rate: the largest spectral radius of the Jacobian at rest, and of each rule the largest error \
against long backpropagation, the smallest cosine with the exact gradient, the mean number of forward steps, and the \
time over that of long backpropagation (medians of one run, then over seeds)."""


def grouped(results: list[Found]) -> tuple[list[str], list[float]]:
    return list(dict.fromkeys(f.rule for f in results)), sorted({f.rate for f in results})


def of(results: list[Found], rule: str, rate: float) -> list[Found]:
    return [found for found in results if found.rule == rule and found.rate == rate]


def table(results: list[Found]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each rule."""
    rules, rates = grouped(results)
    rows = [[rule, *(f"{max(f.error for f in of(results, rule, rate)):.1e}" for rate in rates)] for rule in rules]
    return ["rule", *(f"rate {rate:g}" for rate in rates)], rows


def details(results: list[Found]) -> tuple[list[str], list[list[str]]]:
    rules, rates = grouped(results)
    rows = []
    for rate in rates:
        slow = {found.seed: found.seconds for found in of(results, LONG, rate)}
        for rule in rules:
            group = of(results, rule, rate)
            rows.append(
                [
                    f"{rate:g}",
                    f"{max(f.radius for f in group):.3f}",
                    rule,
                    f"{max(f.against_long for f in group):.1e}",
                    f"{min(f.cosine for f in group):.3f}",
                    f"{statistics.fmean(f.steps for f in group):.0f}",
                    f"{statistics.median(f.seconds / slow[f.seed] for f in group):.3f}",
                ]
            )
    return ["rate", "spectral radius", "rule", "error against long", "cosine", "steps", "time"], rows


def bytes_table(memory: dict[str, list[int]], lengths: list[int]) -> tuple[list[str], list[list[str]]]:
    rows = [[rule, *(f"{count:,}" for count in counts)] for rule, counts in memory.items()]
    return ["rule", *(f"{length} steps" for length in lengths)], rows


def errors(results: list[Found]) -> Figure:
    made = figure(8, 4.2)
    (axes,) = made.axes
    rules, rates = grouped(results)
    seeds = sorted({found.seed for found in results})
    for index, rule in enumerate(rules):
        by_seed = [[next(f.error for f in of(results, rule, r) if f.seed == seed) for r in rates] for seed in seeds]
        curve(axes, [1 - rate for rate in rates], [[max(e, 1e-16) for e in series] for series in by_seed], rule)
        told_apart(axes.get_lines()[-1], index)
    axes.set(xscale="log", yscale="log", xlabel="1 - contraction rate", ylabel="relative error of the gradient")
    axes.invert_xaxis()
    axes.set_xticks([1 - rate for rate in rates], [f"{1 - rate:g}" for rate in rates])
    axes.minorticks_off()
    made.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return made


def bytes_figure(memory: dict[str, list[int]], lengths: list[int]) -> Figure:
    made = figure(8, 3.8)
    (axes,) = made.axes
    for index, (rule, counts) in enumerate(memory.items()):
        (line,) = axes.plot(lengths, counts, label=rule)
        told_apart(line, index)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="peak bytes")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    made.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return made
