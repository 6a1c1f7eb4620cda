"""The page and the table of `loopaware run reactions`.

In: `Results`. Out: a `Report`, and lines on the terminal. Deliberately elsewhere: running, counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loopaware.observe import Report
from loopaware.observe.figures import PALETTE, figure
from loopaware.recipes.reactions_results import LOOKS, QUESTION, SEQUENCE, TOKEN, Compared, Results, Tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: dict[str, str] = dict(
    zip(("KL", "KL, patience", "entropy", "confidence", "state change"), PALETTE, strict=False)
)
MARKERS = {QUESTION: "o", SEQUENCE: "s", TOKEN: "^"}
COLUMNS = ("rule", "loops", "operations", "accuracy", "same loops", "difference", "same operations", "stopped")
BRIEF = ("rule", "loops", "operations", "accuracy", "difference")
SHOWN = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32)


def report(
    results: Results, story: tuple[str, list[list[str]]], seeds: Sequence[int], *, longest: int, shipped: bool
) -> Report:
    """The whole page, not yet written."""
    page = Report("A pretrained loop reads chemical reactions", seeds=seeds)
    introduced(page, results, longest, shipped)
    uniform_depth(page, results)
    example(page, *story)
    saved(page, results)
    left_alone(page, results)
    at_rest(page, results)
    page.heading("How this was measured")
    page.text(METHOD.format(head=100 * results.head))
    return page


METHOD = """
A share of each reaction's tokens is hidden behind [MASK]; accuracy is the share of hidden tokens told right. Every seed
hides other tokens. Uniform depth and rules that look at hidden tokens were run with every seed, the other rules with
the first.

Loops are means over real tokens, padding left out. A loop saved is a step that a row would not need if stopped rows
were taken out of the batch; execute.Eager, which ran here, carries them along, so nothing here is a saving of time.
Operations count the loops and, at each of them, the rule's head, which costs {head:.0f} % of a loop for every token it
looks at; 1.000 is a run of the released depth without a rule. One look before the first loop, which KL needs, is not
counted.

"Same loops" is the accuracy of uniform depth, the same for all rows, with equal mean loops (a mix of two neighbouring
depths); the difference to it has a standard error over reactions, the reactions being the same on both sides. "Same
operations" lets uniform depth spend on loops what the rule spends on its head. The default thresholds were chosen after
a look at reactions like these, and the rules named in the text on these very ones: expect a little less elsewhere.

Where sequences halt, a sequence is stopped when the rule is content with every token that it looks at; as sequences
do not see one another, these rules were run on the recorded states of uniform depth, which gives the same. Where tokens
halt, the hidden and the visible ones, a token that has stopped keeps its state and is still attended to by others.
"""


def introduced(page: Report, results: Results, longest: int, shipped: bool) -> None:
    curve = results.curve.mean(0)
    first, best = float(curve[0]), int(curve.argmax()) + 1
    page.text(
        "The model is the ALBERT of rxnmapper 0.4.3 with its released weights: one layer, applied "
        f"{results.depth} times, trained to tell hidden tokens of reactions, never trained to halt. It tells "
        f"{first:.3f} of them after one loop and {curve[results.depth - 1]:.3f} after {results.depth}; the best "
        f"uniform depth is {best}, with {curve[best - 1]:.3f}; after {results.loops} loops {curve[-1]:.3f} is left."
    )
    count, hidden = results.asked.shape[1], int(results.asked.sum())
    page.text(
        f"Measured on {count} reactions of at most {longest} tokens; {hidden:,} tokens were hidden, all seeds together."
    )
    if shipped:
        page.text(
            f"These are only the {count} real reactions that ship with the weights, under many masks: enough to see "
            "the curve, too few to tell rules apart. Give your own with --reactions FILE."
        )


def uniform_depth(page: Report, results: Results) -> None:
    page.heading("Accuracy by loops")
    drawn = figure(8, 3.4)
    (axes,) = drawn.axes
    curve = results.curve
    loops = range(1, results.loops + 1)
    axes.fill_between(loops, curve.amin(0).tolist(), curve.amax(0).tolist(), color=PALETTE[0], alpha=0.2, linewidth=0)
    axes.plot(loops, curve.mean(0).tolist(), markersize=4)
    axes.axvline(results.depth, color="#555555", linewidth=0.8)
    axes.annotate(" released depth", (results.depth, 0.02), xycoords=("data", "axes fraction"), color="#555555")
    axes.set(xlabel="loops, the same for all rows", ylabel="hidden tokens told right")
    page.figure(
        drawn,
        alt=f"Accuracy by loops: {curve.mean(0)[0]:.2f} after one, {curve.mean(0)[results.depth - 1]:.2f} at the "
        f"released depth, {curve.mean(0)[-1]:.2f} at the end.",
        caption="Mean over seeds, with the range between seeds. More loops than in training do harm.",
    )
    shown = [n for n in SHOWN if n <= results.loops]
    rows = [
        ("mean", *(f"{curve.mean(0)[n - 1]:.3f}" for n in shown)),
        ("lowest", *(f"{curve.amin(0)[n - 1]:.3f}" for n in shown)),
        ("highest", *(f"{curve.amax(0)[n - 1]:.3f}" for n in shown)),
    ]
    page.table(("loops", *map(str, shown)), rows, caption="Accuracy at uniform depth, over seeds.")


def example(page: Report, reaction: str, words: list[list[str]]) -> None:
    page.heading("One reaction", level=3)
    page.text(reaction)
    page.table(
        ("token", "hidden", *(f"{n} loops" if n > 1 else "1 loop" for n in LOOKS)),
        [[f"no. {place}", hidden, *(mark(word, hidden) for word in read)] for place, hidden, *read in words],
        caption="Its hidden tokens, and what is read in their place by uniform depth; ✓ where it is right.",
    )


def mark(word: str, hidden: str) -> str:
    return f"{word} ✓" if word == hidden else word


def saved(page: Report, results: Results) -> None:
    page.heading("What each rule saves")
    for level in (QUESTION, SEQUENCE, TOKEN):
        page.text(f"Halting by {level}: {verdict(results, level)}")
    drawn = figure(9, 4.2, columns=2)
    left, right = drawn.axes
    against(left, results, results.depth)
    gained(right, results, results.depth)
    legend(drawn, [tally for tally in results.tallies if tally.trial.cap == results.depth])
    page.figure(
        drawn,
        alt="Left: accuracy of each rule by its mean loops, with the curve of uniform depth. Right: the difference.",
        caption="Each mark is a rule with a threshold. Right: its accuracy less that of uniform depth at equal mean "
        "loops, on the same hidden tokens, with standard errors; above zero the rule does better.",
    )
    for level in (QUESTION, SEQUENCE, TOKEN):
        rules(page, results, level, results.depth, f"Halting by {level}, at most {results.depth} loops.")


def verdict(results: Results, level: str) -> str:
    """In words, what the cheapest rule that is nearly as good as the released depth saves."""
    best = results.best(level, results.depth)
    if best is None or best[1].loops > results.depth - 0.5:
        return f"no rule saves half a loop of {results.depth} without losing more than half a point."
    trial, compared = best
    return (
        f"the fewest loops within half a point of the {results.depth} released ones are {compared.loops:.1f} "
        f"({trial.name}), with accuracy {compared.accuracy:.3f}. Uniform depth with as many loops has "
        f"{compared.same_loops:.3f} (difference {signed(compared)}), with as many operations "
        f"{compared.same_operations:.3f}."
    )


def left_alone(page: Report, results: Results) -> None:
    tallies = [tally for tally in results.tallies if tally.trial.cap > results.depth]
    if not tallies:
        return
    page.heading("Rules left alone")
    ranges = results.ranges(results.loops).items()
    families = "; ".join(f"{name} {low:.3f}" + f" to {high:.3f}" * (high > low) for name, (low, high) in ranges)
    page.text(
        f"The same rules, by hidden tokens, with {results.loops} loops allowed, as if nobody knew the depth of "
        "training. A rule that does not fire for a row lets it run into the depths where accuracy falls to "
        f"{results.curve.mean(0)[-1]:.3f}. Accuracies, over thresholds: {families}."
    )
    drawn = figure(8, 3.6)
    (axes,) = drawn.axes
    against(axes, results, results.loops)
    legend(drawn, tallies)
    page.figure(drawn, alt="Accuracy of each rule against its mean loops, up to the largest depth.")
    rules(
        page,
        results,
        QUESTION,
        results.loops,
        f"Halting by sequence, by its hidden tokens, at most {results.loops} loops.",
    )


def at_rest(page: Report, results: Results) -> None:
    page.heading("The state never comes to rest, the prediction does")
    smallest = float(results.change.min())
    page.text(
        f"The largest relative change of a token's state in a sequence never falls below {smallest:.3f} in "
        f"{results.loops} loops, so a rule on the state of sequences fires never, or by a threshold that means nothing."
    )
    drawn = figure(9, 3.4, columns=2)
    left, right = drawn.axes
    loops = range(1, results.loops + 1)
    left.plot(loops, results.change.median(1).values.tolist(), markersize=3, label="median sequence")
    left.plot(loops, results.change.amin(1).tolist(), markersize=3, label="smallest sequence")
    left.set(xlabel="loop", ylabel="largest relative change of state", ylim=(0, None))
    left.legend()
    stops(right, results)
    page.figure(
        drawn,
        alt="Left: change of state by loop stays above zero. Right: when tokens stop.",
        caption="Left: the largest |h_t − h_(t−1)| / |h_t| over a sequence's tokens. Right: after how many loops "
        "tokens stop that halt by themselves; at the cap, most were not stopped by the rule.",
    )


def stops(axes: Axes, results: Results) -> None:
    """When tokens stop by a KL rule: the hidden ones later."""
    tally = next(tally for tally in results.tallies if tally.trial.level == TOKEN)
    steps = range(1, tally.trial.cap + 1)
    for hidden, name in enumerate(("visible tokens", "hidden tokens")):
        share = tally.by_step[hidden] / tally.by_step[hidden].sum()
        axes.bar([step + (hidden - 0.5) * 0.4 for step in steps], share[1:].tolist(), 0.4, label=name)
    axes.set(xlabel="loops taken", ylabel="share of tokens", title=tally.trial.name)
    axes.legend()


def against(axes: Axes, results: Results, cap: int) -> None:
    """Uniform depth as a line, each rule as a mark."""
    axes.plot(range(1, cap + 1), results.curve.mean(0)[:cap].tolist(), color="#888888", marker=".", linestyle="-")
    for tally in results.tallies:
        if tally.trial.cap == cap:
            compared = results.compared(tally)
            axes.plot(
                compared.loops,
                compared.accuracy,
                color=COLOURS[tally.trial.family],
                marker=MARKERS[tally.trial.level],
                linestyle="none",
            )
    axes.set(xlabel="mean loops", ylabel="hidden tokens told right")


def gained(axes: Axes, results: Results, cap: int) -> None:
    """Each rule's accuracy less that of uniform depth with the same mean loops."""
    axes.axhline(0, color="#888888", linewidth=1)
    for tally in results.tallies:
        if tally.trial.cap == cap:
            compared = results.compared(tally)
            axes.errorbar(
                compared.loops,
                compared.difference,
                compared.error,
                color=COLOURS[tally.trial.family],
                marker=MARKERS[tally.trial.level],
                linestyle="none",
            )
    axes.set(xlabel="mean loops", ylabel="less uniform depth, equal loops")


def legend(drawn: Figure, tallies: list[Tally]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="#888888", marker=".", label="uniform depth")]
    families = dict.fromkeys(tally.trial.family for tally in tallies)
    lines += [Line2D([], [], color=COLOURS[name], marker="o", linestyle="none", label=name) for name in families]
    levels = dict.fromkeys(tally.trial.level for tally in tallies)
    if len(levels) > 1:
        lines += [Line2D([], [], color="#333333", marker=MARKERS[n], linestyle="none", label=n) for n in levels]
    drawn.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)


def cells(results: Results, tally: Tally) -> tuple[str, ...]:
    """The row of a rule under `COLUMNS`."""
    compared = results.compared(tally)
    return (
        tally.trial.name,
        f"{compared.loops:.2f}",
        f"{compared.operations:.3f}",
        f"{compared.accuracy:.3f}",
        f"{compared.same_loops:.3f}",
        signed(compared),
        f"{compared.same_operations:.3f}",
        f"{100 * compared.halted:.0f} %",
    )


def signed(compared: Compared) -> str:
    return f"{round(compared.difference, 3) + 0.0:+.3f} ± {compared.error:.3f}"


def rules(page: Report, results: Results, level: str, cap: int, caption: str) -> None:
    tallies = [tally for tally in results.tallies if (tally.trial.level, tally.trial.cap) == (level, cap)]
    page.table(COLUMNS, [cells(results, tally) for tally in tallies], caption=caption)


def show(results: Results) -> None:
    """What a terminal shows of it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    curve = results.curve.mean(0)
    line = "  ".join(f"{n}: {curve[n - 1]:.3f}" for n in (1, 4, 8, 12, 16, 24, 32) if n <= results.loops)
    console.print(f"hidden tokens told right, by loops\n{line}", highlight=False)
    for level, cap in dict.fromkeys((tally.trial.level, tally.trial.cap) for tally in results.tallies):
        table = Table(*BRIEF, title=f"halting by {level}, at most {cap} loops", title_justify="left")
        for tally in results.tallies:
            if (tally.trial.level, tally.trial.cap) == (level, cap):
                row = dict(zip(COLUMNS, cells(results, tally), strict=True))
                table.add_row(*(row[name] for name in BRIEF))
        console.print(table)
