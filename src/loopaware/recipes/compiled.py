"""`loopaware bench compiled`: compiling the step of a loop, or all of it at once, and when that is paid back.

In: options. Out: a folder with `report.html`, `results.json` and a figure: the time of each way to run a loop as a
ratio of medians to that of `execute.Eager` in the same run, the seconds that compiling took from an empty cache, and
after how many runs they are paid back, if ever. All is CPU time, that of the compiler too, so that a machine that is
shared may be measured on. Nothing is reported if values or gradients are not those of `Eager`. Deliberately elsewhere:
what is gained where rows stop (`loopaware.recipes.execution`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import Loop, execute, files, halt
from loopaware.checks import bounded
from loopaware.nn import Block, Post
from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.shared import differentiated, in_turns, show, undifferentiated, unequal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = 1e-3
"""The relative error of values and gradients above which nothing is reported (float32)."""

EAGER, UNROLLED, STEP, WHOLE = "Eager", "Unrolled", "Compiled", "whole loop"
FORWARD, TRAINING = "forward", "and backward"


class Line(NamedTuple):
    """One shape, forward or with its backward pass, by the way to run it.

    CPU seconds of a run (a median), and of compiling; in which share of the turns it was faster than Eager; and the
    largest relative error of values and gradients.
    """

    dim: int
    batch: int
    passes: str
    seconds: dict[str, float]
    compiling: dict[str, float]
    faster: dict[str, float]
    error: float

    def ratio(self, way: str) -> float:
        return self.seconds[way] / self.seconds[EAGER]

    def paid_back(self, way: str) -> float:
        """Runs after which compiling has cost nothing; infinite if a run is not faster in three turns of four."""
        saved = self.seconds[EAGER] - self.seconds[way]
        return self.compiling[way] / saved if saved > 0 and self.faster[way] >= 0.75 else math.inf


def run(
    folder: Path = Path("runs/bench-compiled"),
    *,
    dims: tuple[int, ...] = (64, 256, 512),
    batches: tuple[int, ...] = (1, 16),
    tokens: int = 64,
    steps: int = 8,
    repeats: int = 9,
    threads: int = 1,
    backend: str = "inductor",
) -> None:
    """Time loops as they come, with a compiled step, and compiled as a whole, by width and batch; a table and a figure.

    Args:
        folder: where results.json, report.html and the figure go.
        dims: features of a token's state; eight attention heads divide them.
        batches: sequences at once, each with every width.
        tokens: how many tokens a sequence has.
        steps: how many steps a loop takes; none stops early.
        repeats: timed turns of each way; medians count. A turn is one run, of small shapes ten.
        threads: processor threads that PyTorch may use.
        backend: what `torch.compile` compiles with.
    """
    bounded("repeats", repeats, "Medians need at least one run.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    bounded("dims", len(dims), "Give at least one width.")
    bounded("batches", len(batches), "Give at least one batch.")
    lines = []
    with unseen(backend):
        for dim in dims:
            for batch in batches:
                lines += measured((batch, tokens, dim), steps, repeats, backend)
    plan = {"tokens": tokens, "steps": steps, "repeats": repeats, "threads": threads, "backend": backend}
    files.write(
        folder / "results.json", json.dumps({"plan": plan, "lines": [line._asdict() for line in lines]}, indent=1)
    )
    show(f"{steps} steps, time against execute.Eager", *table(lines))
    print(f"report: {report(lines, plan).write(folder / 'report.html')}")


@contextmanager
def unseen(backend: str) -> Iterator[None]:
    """Let nothing be found that was compiled before, and what all compilations share be made beforehand."""
    from torch._functorch import config as differentiating
    from torch._inductor import config, utils

    with ExitStack() as stack:
        stack.enter_context(utils.fresh_cache())
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1))  # in this process, to be measured
        stack.enter_context(differentiating.patch(enable_autograd_cache=False))
        torch.compile(nn.Linear(3, 3), backend=backend)(torch.ones(1, 3)).sum().backward()
        yield


def measured(shape: tuple[int, int, int], steps: int, repeats: int, backend: str) -> list[Line]:
    """Both passes of one shape; timed in turns, so that a noisy moment meets every way."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, dim = torch.randn(shape), shape[-1]
    eager = Loop(Block(dim, 8, placement=Post()), steps, rows=2, halt=halt.Converged(rtol=0.0, atol=1e-12))
    unrolled = eager.replace(execute=execute.Unrolled())
    ways: dict[str, Callable[[Tensor], Any]] = {
        EAGER: eager,
        UNROLLED: unrolled,
        STEP: eager.replace(execute=execute.Compiled(backend)),
        WHOLE: torch.compile(unrolled, fullgraph=True, backend=backend),
    }
    weights, lines = list(eager.parameters()), []
    both = {FORWARD: lambda loop: undifferentiated(loop, x), TRAINING: lambda loop: differentiated(loop, x, weights)}
    for passes, function in both.items():
        expected, compiling, error = function(eager), {}, 0.0
        for way in (STEP, WHOLE):
            begun = spent()
            own = function(ways[way])
            compiling[way] = spent() - begun
            error = max(error, checked(way, own, expected, dim))
        runs = {way: partial(function, loop) for way, loop in ways.items()}
        often = 10 if x.numel() < 2**16 else 1
        times = in_turns(runs, repeats, often, time.process_time)
        seconds = {way: statistics.median(each) for way, each in times.items()}
        compiling = {way: max(first - seconds[way], 0.0) for way, first in compiling.items()}
        faster = {
            way: statistics.fmean(map(float.__lt__, each, times[EAGER])) for way, each in times.items() if way != EAGER
        }
        lines.append(Line(dim, shape[0], passes, seconds, compiling, faster, error))
    return lines


def spent() -> float:
    """CPU seconds of this process, and of those it has waited for, as a C++ compiler."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def checked(way: str, own: list[Tensor], expected: list[Tensor], dim: int) -> float:
    """How far values and gradients are off, if it is not too far."""
    error = unequal(own, expected)
    if not error <= EQUAL:
        raise ValueError(
            f"values and gradients must be within {EQUAL} of execute.Eager, got {error:.1e} by {way} at dim {dim}. "
            "Nothing is reported: mend execute.Compiled, or report what PyTorch compiles wrongly."
        )
    return error


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each shape and pass."""
    columns = ["d", "batch", "passes", "Eager, ms", "Unrolled"]
    columns += [each for way in (STEP, WHOLE) for each in (way, "compiling, s", "runs")]
    rows = [
        [
            str(line.dim),
            str(line.batch),
            line.passes,
            f"{line.seconds[EAGER] * 1e3:.1f}",
            f"{line.ratio(UNROLLED):.2f}",
            *(text for way in (STEP, WHOLE) for text in told(line, way)),
        ]
        for line in lines
    ]
    return columns, rows


def told(line: Line, way: str) -> tuple[str, str, str]:
    runs = line.paid_back(way)
    return f"{line.ratio(way):.2f}", f"{line.compiling[way]:.0f}", f"{runs:.0f}" if math.isfinite(runs) else "never"


def report(lines: list[Line], plan: dict[str, Any]) -> Report:
    page = Report("Compiling the step of a loop", seeds=(0,))
    page.text(
        f"One transformer block, {plan['tokens']} tokens to a sequence, {plan['steps']} steps, none of which is saved "
        f"by halting, in float32. Compiled is execute.Compiled({plan['backend']!r}): one step is compiled, the loop "
        "stays Python. Unrolled never looks at the data; torch.compile makes one graph of it, which is the whole loop."
    )
    page.table(*table(lines), caption=CAPTION.format(**plan))
    page.figure(bars(lines), alt="Time of a run by every way over that of execute.Eager.")
    page.text("Values and gradients are those of execute.Eager, or nothing is reported.")
    return page


CAPTION = """CPU time, {threads} thread(s): ratios of medians of {repeats} turns to that of Eager. \
Compiling: the first run less a later one, the compiler's time included, with nothing to be found that was compiled \
before; with the backward pass a step has two graphs, since the first one's state has no gradient. Runs: after so many \
compiling is paid back; never if not faster in three turns of four."""


def bars(lines: list[Line]) -> Figure:
    made = figure(9, 4, columns=2)
    for axes, passes in zip(made.axes, (FORWARD, TRAINING), strict=True):
        chosen = [line for line in lines if line.passes == passes]
        for offset, way in enumerate((UNROLLED, STEP, WHOLE)):
            places = [place + 0.27 * (offset - 1) for place in range(len(chosen))]
            axes.bar(places, [line.ratio(way) for line in chosen], 0.25, label=way)
        axes.axhline(1.0, color="black", lw=0.8, marker="")
        axes.set_xticks(range(len(chosen)), [f"d {line.dim}\nbatch {line.batch}" for line in chosen], fontsize="small")
        axes.set(title=passes, ylabel="time over that of execute.Eager")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return made
