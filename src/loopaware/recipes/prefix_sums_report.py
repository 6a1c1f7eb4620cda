"""The page, the pictures and the table of `loopaware run prefix-sums`.

In: a `Result` for each seed. Out: a `Report`, and the rows of a table. Deliberately elsewhere: training and testing
(`loopaware.recipes.prefix_sums`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.shared import curve, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KL, CHANGE, LEARNED = "KL stop", "state at rest", "learned halt"
SHALLOW, DOUBLE, FORGETFUL = "fixed, trained length", "fixed, twice the bits", "without recall, twice the bits"
RULES = (KL, CHANGE, LEARNED)
READERS = (*RULES, SHALLOW, DOUBLE)


class Sweep(NamedTuple):
    """One net on strings of one length; `flops` are those of a string, `by_loop` the accuracy after each loop."""

    accuracy: dict[str, float]
    steps: dict[str, float]
    flops: dict[str, float]
    by_loop: list[float]


class Result(NamedTuple):
    """One seed: a sweep for each length."""

    seed: int
    sweeps: dict[int, Sweep]

    def plain(self) -> dict[str, Any]:
        """As json."""
        return {"seed": self.seed, "sweeps": {str(n): sweep._asdict() for n, sweep in self.sweeps.items()}}


def report(results: list[Result], forgetful: dict[int, float], plan: dict[str, Any]) -> Report:
    """The whole page, not yet written."""
    page = Report(
        "Prefix sums: trained on short strings, right on long ones", seeds=[result.seed for result in results]
    )
    page.text(
        f"A convolution of width three in a loop, {plan['dim']} features, was trained on strings of at most "
        f"{plan['length']} bits to say for each bit whether the sum up to it is odd. A string counts as right if every "
        "bit is. One loop carries a sum one bit further, so n bits need about n loops."
    )
    page.table(*table(results, forgetful), caption=CAPTION)
    page.heading("Accuracy against length")
    page.figure(against_length(results, forgetful, plan["length"]), alt="Share of strings right against their length.")
    page.text(READING.format(**plan))
    page.heading("Loops against length")
    page.figure(loops(results), alt="Mean loops of each stopping rule against bits, near the diagonal.")
    page.heading("More loops than needed")
    page.figure(by_loop(results), alt="Share of strings right after each loop, one curve for each length.")
    return page


CAPTION = """Share of strings right in every bit: the mean over seeds, and the smallest and largest where they differ. \
Loops and operations are those of the KL stop, per string; dense is twice as many loops as bits."""

READING = """The rules were fixed before testing and are the same for all seeds and lengths: a KL divergence below \
{divergence:g} nats between two loops, or a relative change of the state below {change:g}, each {patience} times in a \
row; the learned halt reads the change with two learned numbers. No depth was picked after the fact. The net without \
recall sees the bits as its first state only; it was trained once, with the first seed."""


def table(results: list[Result], forgetful: dict[int, float]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each reader, then loops and operations."""
    tests = list(results[0].sweeps)
    rows = [[name, *(spread([r.sweeps[n].accuracy[name] for r in results]) for n in tests)] for name in READERS]
    rows.append([FORGETFUL, *(f"{forgetful[n]:.2f}" for n in tests)])
    taken = [spread([r.sweeps[n].steps[KL] for r in results], 1) for n in tests]
    done, dense = (
        [f"{max(r.sweeps[n].flops[name] for r in results) / 1e6:.1f}" for n in tests] for name in (KL, DOUBLE)
    )
    rows += [["loops of the KL stop", *taken], ["million operations", *done], ["million, dense", *dense]]
    return ["reader", *(f"{n} bits" for n in tests)], rows


def against_length(results: list[Result], forgetful: dict[int, float], trained: int) -> Figure:
    made = figure(7, 3.8)
    (axes,) = made.axes
    tests = list(results[0].sweeps)
    for name in READERS:
        curve(axes, tests, [[result.sweeps[n].accuracy[name] for n in tests] for result in results], name)
    axes.plot(tests, [forgetful[n] for n in tests], color="black", lw=1, ls=":", marker="x", label=FORGETFUL)
    axes.axvspan(min(tests), trained, color="#eeeeee", zorder=0)
    axes.axvline(trained, color="black", lw=0.8, ls=":", marker="")
    axes.set(xscale="log", xlabel="bits (dotted: the longest of training)", ylabel="strings right", ylim=(-0.03, 1.03))
    axes.set_xticks(tests, [str(n) for n in tests])
    axes.minorticks_off()
    axes.legend(loc="lower left", fontsize="small")
    return made


def loops(results: list[Result]) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    tests = list(results[0].sweeps)
    for name in RULES:
        curve(axes, tests, [[result.sweeps[n].steps[name] for n in tests] for result in results], name)
    axes.plot(tests, tests, color="black", lw=1, ls="-", marker="", label="as many loops as bits")
    axes.set(xscale="log", yscale="log", xlabel="bits", ylabel="mean loops")
    axes.set_xticks(tests, [str(n) for n in tests])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    return made


def by_loop(results: list[Result]) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    for bits in results[0].sweeps:
        series = [result.sweeps[bits].by_loop for result in results]
        mean = [sum(column) / len(series) for column in zip(*series, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, marker="", label=f"{bits} bits")
    axes.set(xscale="log", xlabel="loops, the same for every string", ylabel="strings right", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")
    return made
