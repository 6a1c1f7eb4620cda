"""`loopaware bench gradients`: every gradient rule against backpropagation through all steps.

In: options. Out: a folder with `report.html`, `results.json` and figures: value and gradient parity, peak memory by
number of steps, and time as a ratio of medians to `grad.Full` in the same run. Rules that are exact are refused a line
if they are not. Two loops are measured: a transformer block that comes to rest, and a reversible one with dropout.
Deliberately elsewhere: exact gradients of places of rest (`loopaware.recipes.fixed_point`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loopaware import Loop, body, files, grad, init, observe, solve, tree, update
from loopaware.checks import bounded
from loopaware.nn import Add, Attention, Block, FeedForward, Post
from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.protocols import Context, Grad, State
from loopaware.recipes.shared import apart, in_turns, show, told_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT = 1e-3
"""The relative error of a gradient above which a rule that claims every step is refused (float32)."""

FULL = "Full"


class Line(NamedTuple):
    """One rule on one loop, against Full: parity, peak bytes at each number of steps, and time at the middle one."""

    loop: str
    rule: str
    value: float
    error: float
    cosine: float
    bytes: list[int]
    seconds: float


def run(
    folder: Path = Path("runs/bench-gradients"),
    *,
    lengths: tuple[int, ...] = (16, 64, 256),
    dim: int = 64,
    heads: int = 4,
    tokens: int = 32,
    batch: int = 8,
    repeats: int = 7,
    threads: int = 1,
) -> None:
    """Measure every gradient rule against full backpropagation: parity, memory, time; write a table and a figure.

    Args:
        folder: where results.json, report.html and figures go.
        lengths: numbers of steps; parity and time are measured at the middle one, memory at all.
        dim: features of a token's state.
        heads: attention heads; must divide dim, and half of it.
        tokens: how many tokens a sequence has.
        batch: sequences that the loop works on at once.
        repeats: timed runs of each rule, in turns; medians count.
        threads: processor threads that PyTorch may use.
    """
    bounded("lengths", len(lengths), "Name at least one number of steps.")
    bounded("repeats", repeats, "Medians need at least one run.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    x = torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(0))
    lines = []
    for name, make in {"at rest": resting, "coupled": coupled}.items():
        loops = {rule: make(dim, heads, part) for rule, part in rules(name).items()}
        lines += measured(name, loops, x, list(lengths), repeats)
    wrong = [f"{line.loop}, {line.rule}: {line.error:.1e}" for line in lines if claims(line) and line.error > EXACT]
    if wrong:
        raise ValueError(
            f"gradients of complete rules must be within {EXACT} of full backpropagation, got {wrong}. "
            "Nothing is reported: mend the rule, or take fewer steps if rounding is to blame."
        )
    settings = {"dim": dim, "heads": heads, "tokens": tokens, "batch": batch, "repeats": repeats, "threads": threads}
    plain = {"plan": settings, "lengths": lengths, "lines": [line._asdict() for line in lines]}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show(f"against full backpropagation of {middle(list(lengths))} steps", *table(lines, list(lengths)))
    print(f"report: {report(lines, list(lengths), settings).write(folder / 'report.html')}")


def rules(loop: str) -> dict[str, Grad]:
    """The rules that a loop allows, Full first."""
    always = {FULL: grad.Full(), "Checkpointed(1)": grad.Checkpointed(1), "Checkpointed(8)": grad.Checkpointed(8)}
    if loop == "coupled":
        return {**always, "Reversible": grad.Reversible()}
    return {
        **always,
        "Truncated(8)": grad.Truncated(8),
        "Phantom(5, .5)": grad.Phantom(5, 0.5),
        "Implicit": grad.Implicit(solve.Anderson(1e-5)),
        "Implicit, Anderson twice": grad.Implicit(solve.Anderson(1e-5), forward=solve.Anderson(1e-5)),
        "OneStep": grad.OneStep(),
    }


def claims(line: Line) -> bool:
    return rules(line.loop)[line.rule].complete


def resting(dim: int, heads: int, part: Grad, seed: int = 0) -> Loop:
    """A transformer block that sees its input at every step and comes to rest: damped, its last maps made small."""
    torch.manual_seed(seed)
    feedforward = FeedForward(dim)
    block = Block(dim, heads, placement=Post(), feedforward=feedforward)
    with torch.no_grad():
        block.attention.out.weight.mul_(0.3)
        feedforward.narrow.weight.mul_(0.3)
    return Loop(body.Injected(block, Add()), 1, init=init.Zeros(), update=update.Damped(0.7), grad=part)


class Half(nn.Module):
    """What stands in a residual: a norm, a layer that sees the input, dropout."""

    def __init__(self, dim: int, layer: nn.Module):
        super().__init__()
        self.norm, self.layer, self.dropout = nn.LayerNorm(dim), layer, nn.Dropout(0.1)

    def forward(self, state: Tensor, context: Context, index: int) -> State:
        x = tree.content(context)[..., : state.shape[-1]]
        return self.dropout(self.layer(self.norm(state + x)))


def coupled(dim: int, heads: int, part: Grad) -> Loop:
    torch.manual_seed(0)
    half = dim // 2
    step = body.Coupled(Half(half, Attention(half, heads)), Half(half, FeedForward(half)))
    return Loop(step, 1, init=init.Halves(), grad=part)


def middle(lengths: list[int]) -> int:
    return sorted(lengths)[len(lengths) // 2]


def measured(name: str, loops: dict[str, Loop], x: Tensor, lengths: list[int], repeats: int) -> list[Line]:
    """All rules of one loop; timed in turns, so that a noisy moment meets every rule."""
    steps = middle(lengths)
    found = {rule: passed(loop, x, steps) for rule, loop in loops.items()}
    times = in_turns({rule: partial(passed, loop, x, steps) for rule, loop in loops.items()}, repeats)
    value, gradient = found[FULL]
    return [
        Line(
            name,
            rule,
            value=float((own[0] - value).abs().max()),
            error=apart(own[1], gradient),
            cosine=float(torch.cosine_similarity(own[1], gradient, dim=0)),
            bytes=[weighed(lambda loop=loops[rule], n=n: passed(loop, x, n)) for n in lengths],
            seconds=statistics.median(times[rule]),
        )
        for rule, own in found.items()
    ]


def weighed(function: Callable[[], Any]) -> int:
    return observe.peak(function).bytes


def passed(loop: Loop, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Forward and backward: the value, and the gradient of all weights in one row."""
    torch.manual_seed(1)
    leaves = tree.leaves(loop(x, max_steps=steps).value)
    value = torch.cat(leaves, -1)
    direction = torch.linspace(-1, 1, value.numel()).view_as(value)
    found = torch.autograd.grad((value * direction).mean(), list(loop.parameters()))
    return value.detach(), torch.cat([gradient.flatten() for gradient in found])


def table(lines: list[Line], lengths: list[int]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each loop and rule."""
    rows = []
    for line in lines:
        full = next(other for other in lines if other.loop == line.loop and other.rule == FULL)
        shares = [f"{own / most:.3f}" for own, most in zip(line.bytes, full.bytes, strict=True)]
        time_ = f"{line.seconds / full.seconds:.2f}"
        rows.append(
            [line.loop, line.rule, f"{line.value:.0e}", f"{line.error:.0e}", f"{line.cosine:.3f}", *shares, time_]
        )
    shares = [f"memory, {n}" for n in lengths]
    return ["loop", "rule", "value apart", "gradient apart", "cosine", *shares, "time"], rows


def report(lines: list[Line], lengths: list[int], plan: dict[str, Any]) -> Report:
    page = Report("Gradient rules against full backpropagation", seeds=(0,))
    page.text(
        f"A transformer block of {plan['dim']} features that comes to rest, and a reversible one of two halves with "
        f"dropout, on {plan['batch']} sequences of {plan['tokens']} tokens in float32. Each rule is compared with Full "
        f"on the same loop at {middle(lengths)} steps."
    )
    page.table(*table(lines, lengths), caption=CAPTION.format(**plan))
    page.figure(memory(lines, lengths), alt="Peak bytes of each rule against the number of steps, for both loops.")
    page.text(
        "Rules that differentiate every step must agree with Full, or nothing is reported. Implicit, Phantom and "
        "OneStep differentiate the place of rest, which Full approaches as steps grow."
    )
    return page


CAPTION = """Value apart: the largest difference of a number. Gradient apart: relative, over all weights. Memory: peak \
bytes of a forward and a backward pass over those of Full at as many steps, counted (observe.peak). Time: medians of \
{repeats} runs in turns over that of Full, {threads} thread(s)."""


def memory(lines: list[Line], lengths: list[int]) -> Figure:
    made = figure(9, 4, columns=2)
    for axes, loop in zip(made.axes, dict.fromkeys(line.loop for line in lines), strict=True):
        for index, line in enumerate(each for each in lines if each.loop == loop):
            (drawn,) = axes.plot(lengths, [count / 1e6 for count in line.bytes], label=line.rule)
            told_apart(drawn, index)
        axes.set(title=loop, xscale="log", yscale="log", xlabel="steps", ylabel="peak, million bytes")
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.minorticks_off()
        axes.legend(fontsize="x-small")
    return made
