"""`loopaware bench quantized`: what a state loses that is kept in few bits between steps, by bits and steps.

In: options. Out: a folder with `report.html`, `results.json` and a figure: the error of the state against the same
loop in float32, after each number of steps, and that of the gradient. Two loops are measured: one that comes to rest,
and one whose state grows with every step. Deliberately elsewhere: time and bytes; rounding in place saves none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopaware import Loop, body, files, grad, init, update
from loopaware.checks import bounded
from loopaware.nn import Add, Block, Pre
from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.gradients import passed, resting
from loopaware.recipes.shared import apart, curve, show
from loopaware.train.progress import Progress, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: dict[str, int | torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "8 bits": 8,
    "6 bits": 6,
    "4 bits": 4,
}


class Line(NamedTuple):
    """One loop, kind and seed: relative errors of the state after each number of steps, and of the gradient."""

    loop: str
    kind: str
    seed: int
    errors: list[float]
    gradient: float


def run(
    folder: Path = Path("runs/bench-quantized"),
    *,
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    seeds: tuple[int, ...] = (0, 1, 2),
    dim: int = 64,
    heads: int = 4,
    tokens: int = 32,
    batch: int = 8,
    threads: int = 1,
) -> None:
    """Measure the error of states kept in few bits, by bits and steps, against float32.

    Args:
        folder: where results.json, report.html and figures go.
        lengths: numbers of steps after which the state is compared; the gradient is compared after the last.
        seeds: each makes other weights and inputs.
        dim: features of a token's state.
        heads: attention heads; must divide dim.
        tokens: how many tokens a sequence has.
        batch: sequences that the loop works on at once.
        threads: processor threads that PyTorch may use.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("lengths", len(lengths), "Name at least one number of steps.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    lines = []
    for seed in within(Progress(len(seeds), done=0, wanted=True), seeds):
        x = torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed))
        for name, make in {"at rest": resting, "growing": growing}.items():
            lines += compared(name, make(dim, heads, grad.Full(), seed), x, list(lengths), seed)
    settings = {"dim": dim, "heads": heads, "tokens": tokens, "batch": batch}
    plain = {"plan": settings, "lengths": lengths, "lines": [line._asdict() for line in lines]}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show("relative error of the state", *table(lines, list(lengths)))
    print(f"report: {report(lines, list(lengths), seeds, settings).write(folder / 'report.html')}")


def growing(dim: int, heads: int, part: grad.Full, seed: int) -> Loop:
    """A block with its norms before the sub-layers: the state is a sum that grows with every step."""
    torch.manual_seed(seed)
    return Loop(body.Injected(Block(dim, heads, placement=Pre()), Add()), 1, init=init.Zeros(), grad=part)


def compared(name: str, loop: Loop, x: Tensor, lengths: list[int], seed: int) -> list[Line]:
    """Every kind against the loop as it is."""
    last = lengths[-1]
    exact, (_, slope) = states(loop, x, lengths), passed(loop, x, last)
    lines = []
    for kind, bits in KINDS.items():
        rounded = loop.replace(update=update.Quantized(loop.update, bits))
        errors = [apart(own, one) for own, one in zip(states(rounded, x, lengths), exact, strict=True)]
        lines.append(Line(name, kind, seed, errors, apart(passed(rounded, x, last)[1], slope)))
    return lines


@torch.no_grad()
def states(loop: Loop, x: Tensor, lengths: list[int]) -> list[Tensor]:
    carry, found = None, []
    for length in lengths:
        out = loop(x, carry=carry, max_steps=length)
        carry = out.carry
        found.append(out.value)
    return found


def grouped(lines: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines of each loop and kind, all seeds."""
    names = dict.fromkeys((line.loop, line.kind) for line in lines)
    return {name: [line for line in lines if (line.loop, line.kind) == name] for name in names}


def table(lines: list[Line], lengths: list[int]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each loop and kind."""
    rows = []
    for (loop, kind), group in grouped(lines).items():
        errors = [max(line.errors[place] for line in group) for place in range(len(lengths))]
        rows.append([loop, kind, *(f"{error:.1e}" for error in (*errors, max(line.gradient for line in group)))])
    return ["loop", "kept in", *(f"{n} steps" for n in lengths), "gradient"], rows


def report(lines: list[Line], lengths: list[int], seeds: tuple[int, ...], plan: dict[str, Any]) -> Report:
    page = Report("States kept in few bits", seeds=seeds)
    page.text(
        f"Transformer blocks of {plan['dim']} features in a loop, untrained, on {plan['batch']} sequences of "
        f"{plan['tokens']} tokens. After every step the state is rounded to a half precision, or to integers with a "
        "scale for each token; everything else is float32. Errors are relative to the same loop in float32, over "
        "all numbers of the state."
    )
    page.table(*table(lines, lengths), caption="The largest of all seeds. Gradient: of all weights.")
    page.figure(plotted(lines, lengths), alt="Relative error of the state against steps, for each kind, in both loops.")
    return page


def plotted(lines: list[Line], lengths: list[int]) -> Figure:
    made = figure(9, 4, columns=2)
    for axes, loop in zip(made.axes, ("at rest", "growing"), strict=True):
        for (name, kind), group in grouped(lines).items():
            if name == loop:
                curve(axes, lengths, [line.errors for line in group], kind)
        axes.set(title=loop, xscale="log", yscale="log", xlabel="steps", ylabel="relative error of the state")
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return made
