"""`loopaware bench execution`: leaving out rows that have stopped, against masking them and against a fixed depth.

In: options. Out: a folder with `report.html`, `results.json` and a figure: the time of each way to run a loop as a
ratio of medians to that of a loop of fixed depth in the same run, next to the share of operations that were executed.
Tokens halt by themselves, at steps that are written down before, so that every run does the same work. Nothing is
reported if values or gradients are not those of the masked run. Deliberately elsewhere: learned halting, and whether
stopping early is right (`loopaware.recipes.halting_rules`).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import Loop, execute, files, halt
from loopaware.checks import bounded
from loopaware.halt import Written
from loopaware.nn import Block, Post
from loopaware.observe import Report
from loopaware.observe.cost import counted
from loopaware.observe.figures import figure
from loopaware.recipes.execution_baselines import masked_act
from loopaware.recipes.shared import differentiated, in_turns, show, undifferentiated, unequal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = 1e-3
"""The relative error of values and gradients above which nothing is reported (float32)."""

DENSE, MASKED, ACT, COMPACTED = "fixed depth", "masked", "masked ACT", "compacted"
FORWARD, TRAINING = "forward", "forward and backward"


class Line(NamedTuple):
    """One shape, forward or with its backward pass: seconds of each way, shares of a fixed depth, how equal it is."""

    dim: int
    batch: int
    passes: str
    seconds: dict[str, float]
    operations: float
    steps: float
    error: float

    @property
    def ratio(self) -> float:
        return self.seconds[COMPACTED] / self.seconds[DENSE]

    @property
    def over(self) -> float:
        """The time that was left over the operations that were left; 1 is all one can ask for."""
        return self.ratio / self.operations


def run(
    folder: Path = Path("runs/bench-execution"),
    *,
    dims: tuple[int, ...] = (512, 256, 64),
    batches: tuple[int, ...] = (16, 16, 1),
    heads: int = 8,
    tokens: int = 128,
    steps: int = 12,
    mean: float = 3.0,
    repeats: int = 7,
    threads: int = 1,
) -> None:
    """Time loops of fixed depth, with masked and with left-out tokens, by width and batch; a table and a figure.

    Args:
        folder: where results.json, report.html and the figure go.
        dims: features of a token's state, for each shape.
        batches: sequences at once, for each shape.
        heads: attention heads; must divide every dim.
        tokens: how many tokens a sequence has.
        steps: the fixed depth, and the bound of the others.
        mean: steps after which a token stops on average; they follow a geometric law, cut at the bound.
        repeats: timed runs of each way, in turns; medians count. Small shapes are run ten times as often.
        threads: processor threads that PyTorch may use.
    """
    bounded("repeats", repeats, "Medians need at least one run.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    if len(dims) != len(batches) or not dims:
        raise ValueError(f"batches must be as many as dims, got {batches} and {dims}. Give a batch for each width.")
    if not 1.0 < mean <= steps:
        raise ValueError(f"mean must be above 1 and at most steps, got {mean} and {steps}. Tokens stop in between.")
    lines = []
    for dim, batch in zip(dims, batches, strict=True):
        lines += measured(dim, batch, heads, drawn(batch, tokens, steps, mean), steps, repeats)
    plan = {"heads": heads, "tokens": tokens, "steps": steps, "mean": mean, "repeats": repeats, "threads": threads}
    plain = {"plan": plan, "lines": [{**line._asdict(), "over": line.over} for line in lines]}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show(f"time against {steps} steps for every token", *table(lines))
    print(f"report: {report(lines, plan).write(folder / 'report.html')}")


def drawn(batch: int, tokens: int, steps: int, mean: float) -> Tensor:
    """The step at which each token stops. Shapes: -> (batch, tokens) long."""
    chance = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (chance.log() / math.log(1 - 1 / mean)).floor().clamp(max=steps - 1).long() + 1


def measured(dim: int, batch: int, heads: int, ends: Tensor, steps: int, repeats: int) -> list[Line]:
    """Both passes of one shape; timed in turns, so that a noisy moment meets every way."""
    torch.manual_seed(0)
    x = torch.randn(batch, ends.shape[1], dim)
    dense = Loop(Block(dim, heads, placement=Post()), steps, rows=2, halt=halt.Never())
    masked = dense.replace(halt=Written(ends))
    loops: dict[str, nn.Module] = {DENSE: dense, MASKED: masked, ACT: masked_act(dense, x, ends)}
    loops[COMPACTED] = masked.replace(execute=execute.Compacted())
    weights = {name: list(loop.parameters()) for name, loop in loops.items()}
    error = unequal(*(differentiated(loops[name], x, weights[name]) for name in (COMPACTED, MASKED)))
    if error > EQUAL:
        raise ValueError(
            f"values and gradients must be within {EQUAL} of the masked run, got {error:.1e} at dim {dim}. "
            "Nothing is reported: mend execute.Compacted, or the body's `some`."
        )
    with torch.no_grad():
        operations = [counted(loops[name], x)[0] for name in (COMPACTED, DENSE)]
    lines = []
    for passes in (FORWARD, TRAINING):
        runs = {name: runner(loop, x, weights[name] if passes == TRAINING else None) for name, loop in loops.items()}
        times = in_turns(runs, repeats * (10 if batch * dim < 1024 else 1))
        seconds = {name: statistics.median(each) for name, each in times.items()}
        taken = float(ends.sum()) / (ends.numel() * steps)
        lines.append(Line(dim, batch, passes, seconds, operations[0] / operations[1], taken, error))
    return lines


def runner(loop: nn.Module, x: Tensor, weights: list[nn.Parameter] | None) -> Callable[[], list[Tensor]]:
    """A run, with its backward pass if there are weights."""
    return partial(undifferentiated, loop, x) if weights is None else partial(differentiated, loop, x, weights)


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each shape and pass."""
    ways = ["fixed depth, ms", "masked", "masked ACT", "compacted"]
    columns = ["d", "batch", "passes", *ways, "operations", "time over operations"]
    rows = [
        [
            str(line.dim),
            str(line.batch),
            line.passes,
            f"{line.seconds[DENSE] * 1e3:.1f}",
            f"{line.seconds[MASKED] / line.seconds[DENSE]:.3f}",
            f"{line.seconds[ACT] / line.seconds[DENSE]:.3f}",
            f"{line.ratio:.3f}",
            f"{line.operations:.3f}",
            f"{line.over:.2f}",
        ]
        for line in lines
    ]
    return columns, rows


def report(lines: list[Line], plan: dict[str, Any]) -> Report:
    page = Report("Leaving out tokens that have stopped", seeds=(0,))
    page.text(
        f"One transformer block, {plan['tokens']} tokens to a sequence, in float32. Every token stops by itself, after "
        f"{plan['mean']:g} of {plan['steps']} steps on average, at steps written down before. Fixed depth runs all "
        "steps for all tokens; masked keeps stopped tokens as they are and computes for them all the same; masked ACT "
        "is a while-loop with halting chances, as it is commonly written, which halts at the same steps; compacted "
        "is execute.Compacted as it comes, which leaves a step as it is where leaving tokens out would not pay."
    )
    page.table(*table(lines), caption=CAPTION.format(**plan))
    page.figure(bars(lines), alt="Time of masked and compacted runs over a fixed depth, next to operations.")
    page.text(
        "Values and gradients of the compacted run are those of the masked run, or nothing is reported. Masking saves "
        "nothing: it is what most released code for adaptive depth does."
    )
    return page


CAPTION = """Masked to compacted: medians of {repeats} runs or more in turns over that of a fixed depth, {threads} \
thread(s). Operations: those that the compacted forward pass executed over those of a fixed depth, counted by PyTorch; \
keys and values of stopped tokens and empty places in attention are included. A ratio below the operations is possible \
only where less memory is moved too."""


def bars(lines: list[Line]) -> Figure:
    made = figure(9, 4, columns=2)
    for axes, passes in zip(made.axes, (FORWARD, TRAINING), strict=True):
        chosen = [line for line in lines if line.passes == passes]
        series = {
            "time, masked": [line.seconds[MASKED] / line.seconds[DENSE] for line in chosen],
            "time, compacted": [line.ratio for line in chosen],
            "operations, compacted": [line.operations for line in chosen],
        }
        for offset, (name, heights) in enumerate(series.items()):
            axes.bar([place + 0.27 * (offset - 1) for place in range(len(chosen))], heights, 0.25, label=name)
        axes.axhline(1.0, color="black", lw=0.8, marker="")
        axes.set_xticks(range(len(chosen)), [f"d {line.dim}\nbatch {line.batch}" for line in chosen])
        axes.set(title=passes, ylabel="share of a fixed depth")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return made
