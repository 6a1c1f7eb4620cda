"""The page, the pictures and the table of `loopaware run halting-rules`.

In: a `Result` for each rule and seed. Out: a `Report`, and the rows of a table. Deliberately elsewhere: training and
testing (`loopaware.recipes.halting_rules`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.shared import spread, told_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Score(NamedTuple):
    """One net with one rule on problems of one number of hops; `flops` are those of a problem that cost stops."""

    accuracy: float
    steps: float
    flops: float


class Result(NamedTuple):
    """One rule and seed: a score for each number of hops."""

    rule: str
    seed: int
    scores: dict[int, Score]

    def plain(self) -> dict[str, Any]:
        """As json."""
        return {"rule": self.rule, "seed": self.seed, "scores": {str(n): s._asdict() for n, s in self.scores.items()}}


def report(results: list[Result], plan: dict[str, Any]) -> Report:
    """The whole page, not yet written."""
    page = Report("Halting rules side by side", seeds=sorted({result.seed for result in results}))
    page.text(OPENING.format(**plan))
    page.table(*table(results), caption=CAPTION)
    page.heading("Accuracy and loops, inside the range of training and beyond it")
    page.figure(scattered(results), alt="Accuracy of each rule against its mean loops, at two numbers of hops.")
    page.heading("Does depth follow the problem?")
    page.figure(following(results), alt="Mean loops of each rule against hops.")
    page.text(READING.format(**plan))
    return page


OPENING = """Pointer chasing on up to {hops} hops, {steps} steps of {batch} problems for every net, the same loops in \
training: as many as a batch has hops, one more, and 2 to {extra} at random. Each net has its own rule and loss; \
"no rule" was trained at random depth alone, and its stops read it afterwards."""

CAPTION = """Share of problems right, mean loops, and million operations for a problem if stopped problems cost \
nothing: the mean over seeds, and the smallest and largest where they differ. Chance is .25."""

READING = """Linear heads begin with a bias of {bias:g}. ACT, StickBreaking and the hard estimators pay {price:g} for \
a step, grown from zero; PonderNet's prior stops with chance {prior:g}, weighed by {beta:g}. Settings were not tuned \
for each rule. Rules that are drawn (Ponder, REINFORCE) are drawn in the test too."""


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each rule, all seeds."""
    names = dict.fromkeys(result.rule for result in results)
    return {name: [result for result in results if result.rule == name] for name in names}


def table(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each rule."""
    hops = list(results[0].scores)
    columns = ["rule", *(f"{what}, {n} hops" for what in ("right", "loops", "Mop") for n in hops)]
    rows = []
    for name, group in grouped(results).items():
        right = [spread([result.scores[n].accuracy for result in group]) for n in hops]
        loops = [spread([result.scores[n].steps for result in group], 1) for n in hops]
        operations = [f"{sum(result.scores[n].flops for result in group) / len(group) / 1e6:.1f}" for n in hops]
        rows.append([name, *right, *loops, *operations])
    return columns, rows


def middle(results: list[Result]) -> list[int]:
    """Two numbers of hops: the middle one, and the largest."""
    hops = list(results[0].scores)
    return [hops[len(hops) // 2], hops[-1]]


def scattered(results: list[Result]) -> Figure:
    made = figure(9, 4.6, columns=2)
    for axes, hops in zip(made.axes, middle(results), strict=True):
        for index, (name, group) in enumerate(grouped(results).items()):
            x, y = ([getattr(result.scores[hops], field) for result in group] for field in ("steps", "accuracy"))
            (line,) = axes.plot(x, y, ls="", ms=6, alpha=0.8, label=name)
            told_apart(line, index)
        axes.axvline(hops, color="black", lw=0.8, ls=":", marker="")
        axes.set(title=f"{hops} hops", xlabel="mean loops (dotted: the hops)", ylabel="problems right", ylim=(0, 1.03))
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="x-small")
    return made


def following(results: list[Result]) -> Figure:
    made = figure(9, 4.4)
    (axes,) = made.axes
    hops = list(results[0].scores)
    for index, (name, group) in enumerate(grouped(results).items()):
        means = [sum(result.scores[n].steps for result in group) / len(group) for n in hops]
        (line,) = axes.plot(hops, means, label=name, ms=5)
        told_apart(line, index)
    axes.plot(hops, [n + 1 for n in hops], color="black", lw=1, ls="-", marker="", label="hops + 1")
    axes.set(xlabel="hops", ylabel="mean loops", xticks=hops)
    made.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    return made
