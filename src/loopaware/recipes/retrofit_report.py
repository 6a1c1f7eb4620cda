"""Tables and pictures of the recipe `retrofit`.

In: losses of each model and seed. Out: a table, a report. Deliberately elsewhere: how they came about
(`loopaware.recipes.retrofit`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.shared import curve, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORIGINAL, UNHEALED = "original", "looped, not healed"
TUNED, LONGER = "original, fine-tuned", "original, fine-tuned longer"
LOOPED, TIED, RELAXED = "looped, healed", "tied", "tied with LoRA"


class Plan(NamedTuple):
    """How models are made, healed and tested."""

    core: int
    choose: str
    depth: int
    rank: int
    injection: str
    pretraining: int
    steps: int
    batch: int
    length: int
    rate: float
    windows: int


class Comparison(NamedTuple):
    """The base's layers, what was measured of each group of them, and the chosen one."""

    layers: int
    groups: list[Any]
    best: Any


class Score(NamedTuple):
    """Loss and layers run at 1, 2, ... loops; numbers the model holds; loops it is set to."""

    losses: list[float]
    weights: int
    layers: list[int]
    loops: int


def table(scores: dict[int, dict[str, Score]], plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each model; the loss at the loops it is set to is marked."""
    shown = sorted({1, 2, plan.depth, 2 * plan.depth})
    rows = []
    for name in next(iter(scores.values())):
        every = [by[name] for by in scores.values()]
        cells = [
            spread([score.losses[loops - 1] for score in every], 3) if loops <= len(every[0].losses) else "–"
            for loops in shown
        ]
        rows.append(
            [name, f"{every[0].weights:,}", str(every[0].layers[min(every[0].loops, len(every[0].layers)) - 1]), *cells]
        )
    return ["model", "numbers", "layers run", *(f"{loops} loop{'s' * (loops > 1)}" for loops in shown)], rows


def report(
    scores: dict[int, dict[str, Score]], comparison: Comparison, plan: Plan, tokens: int, base: Path | None
) -> Report:
    """The page."""
    page = Report("Retrofit: a loop in a model that had none", seeds=tuple(scores))
    origin = (
        f"A Llama of six layers of 64 features, trained for {plan.pretraining} steps on the bytes of Python's "
        "reference manual,"
        if base is None
        else f"The model in {base.name}, of {comparison.layers} layers,"
    )
    best = comparison.best
    page.text(
        f"{origin} is given a loop over layers {best.first} to {best.first + best.size - 1} and healed for "
        f"{plan.steps} steps of {plan.batch} windows of {plan.length} tokens, at 1 to {plan.depth} loops drawn anew at "
        "each step, the deep ones later. Beside it the original, untouched; the original fine-tuned on the same "
        "windows for as many steps, and for as many operations (longer); and the layers between the first and the last "
        f"tied in groups of {plan.core}, without and with differences of rank {plan.rank} for each loop. Text of "
        f"{tokens:,} tokens, the last tenth held out."
    )
    page.table(*table(scores, plan), caption=CAPTION)
    page.heading("Loss against loops")
    page.figure(curves(scores), alt="Held-out loss of each model against the number of loops.")
    page.text(verdict(scores, plan))
    page.heading("Which layers to repeat")
    page.table(
        ["layers", "angle", "block influence", "KL of twice from once"],
        [
            [f"{group.first} to {group.first + group.size - 1}{' (chosen)' if group is best else ''}"]
            + [f"{number:.4f}" for number in (group.angle, group.influence, group.divergence)]
            for group in comparison.groups
        ],
        caption="Angle, in half turns, between the state before and behind the group (Gromov et al. 2024); one minus "
        "its cosine (Men et al. 2024); KL divergence of the prediction with the group run twice, in nats.",
    )
    return page


CAPTION = """Held-out loss in nats per token at so many loops, the mean over seeds, and the smallest and largest where \
they differ. Numbers: how many the model holds. Layers run: for a token, at the loops that the model is set to."""


def mean(scores: dict[int, dict[str, Score]], name: str, loops: int) -> float:
    return sum(by[name].losses[loops - 1] for by in scores.values()) / len(scores)


def verdict(scores: dict[int, dict[str, Score]], plan: Plan) -> str:
    """What the numbers say, whichever way they fall."""
    best = min(range(1, 2 * plan.depth + 1), key=lambda loops: mean(scores, LOOPED, loops))
    looped, tuned, longer = mean(scores, LOOPED, best), mean(scores, TUNED, 1), mean(scores, LONGER, 1)
    gain = mean(scores, LOOPED, 1) - looped
    return (
        f"Healed, the looped model is best at {best} loop{'s' * (best > 1)}, {looped:.3f}, {gain:.3f} below its own "
        f"loss at one loop. The original fine-tuned for as many steps has {tuned:.3f}, {compared(looped, tuned)}; "
        f"fine-tuned for as many operations {longer:.3f}, {compared(looped, longer)}. Not healed, two loops cost "
        f"{mean(scores, UNHEALED, 2) - mean(scores, ORIGINAL, 1):+.3f} against the original."
    )


def compared(looped: float, other: float) -> str:
    """Which of two losses is lower."""
    if abs(looped - other) < 5e-4:
        return "the same"
    return f"{abs(looped - other):.3f} {'worse' if other > looped else 'better'} than with loops"


def curves(scores: dict[int, dict[str, Score]]) -> Figure:
    """Loss against loops; what cannot loop is a line across."""
    drawn = figure(9, 4)
    (axes,) = drawn.axes
    for name, score in next(iter(scores.values())).items():
        losses = [by[name].losses for by in scores.values()]
        if len(score.losses) > 1:
            curve(axes, list(range(1, len(score.losses) + 1)), losses, name)
        else:
            level = sum(each[0] for each in losses) / len(losses)
            line = axes.axhline(
                level, lw=1, marker="", color="black", ls={ORIGINAL: "-", TUNED: "--", LONGER: ":"}[name]
            )
            line.set_label(name)
    healed = [value for by in scores.values() for name in (LOOPED, RELAXED, ORIGINAL) for value in by[name].losses]
    low, high = min(healed), max(healed[:1] + [by[ORIGINAL].losses[0] for by in scores.values()])
    axes.set(xlabel="loops", ylabel="held-out loss, nats per token", ylim=(low - 0.1, high + 0.5))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return drawn
