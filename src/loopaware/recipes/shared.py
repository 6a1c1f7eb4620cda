"""What several recipes do alike: optimizer groups, numbers with their spread, turns that are timed, a table, curves.

In: nets, numbers. Out: what the name says. Deliberately elsewhere: everything that belongs to one recipe.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from loopaware.train.progress import Progress, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def adam(net: nn.Module, rate: float, halting: Iterable[nn.Parameter] = (), faster: float = 10.0) -> Optimizer:
    """AdamW; the halting parameters learn `faster` times as fast and do not decay."""
    chosen = list(halting)
    others = [weight for weight in net.parameters() if all(weight is not one for one in chosen)]
    groups: list[dict[str, Any]] = [{"params": others}]
    if chosen:
        groups.append({"params": chosen, "lr": faster * rate, "weight_decay": 0.0})
    return AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and the range if there is one to see."""
    if any(map(math.isnan, values)):
        return "–"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low}–{high})"


def apart(one: Tensor, other: Tensor) -> float:
    """The relative error of `one`: |one - other| / |other|."""
    return float((one - other).norm() / other.norm())


def undifferentiated(loop: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The value of a loop, without gradients."""
    with torch.no_grad():
        return [loop(x).value]


def differentiated(loop: Callable[[Tensor], Any], x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The value of a loop, and the gradients of its weights."""
    value = loop(x).value
    direction = torch.linspace(-1, 1, value.numel()).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * direction).mean(), list(weights))]


def unequal(own: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative error of values, or of all gradients in one row; the larger one."""
    errors = [apart(own[0], expected[0])]
    if len(own) > 1:
        rows = [torch.cat([leaf.flatten() for leaf in each[1:]]) for each in (own, expected)]
        errors.append(apart(rows[0], rows[1]))
    return max(errors)


def in_turns(
    ways: Mapping[str, Callable[[], Any]],
    repeats: int,
    often: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way, in turns, so that a noisy moment meets all of them.

    With `often` above 1 a turn is so many runs after one that is not timed, and the mean counts: small runs are slower
    right after another way, whose code and numbers are still in the processor's caches.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    turns = [name for _ in range(repeats) for name in ways]
    for name in within(Progress(len(turns), done=0, wanted=True), turns):
        if often > 1:
            ways[name]()
        begun = clock()
        for _ in range(often):
            ways[name]()
        times[name].append((clock() - begun) / often)
    return times


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Column, Table

    drawn = Table(*(Column(name, overflow="fold") for name in columns), title=title)
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def curve(axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], label: str) -> None:
    """The mean over seeds, and the range around it. Shapes: seeds (seeds, len(x))."""
    series = torch.tensor(seeds)
    (line,) = axes.plot(x, series.mean(0).tolist(), label=label, ms=4)
    axes.fill_between(x, series.amin(0).tolist(), series.amax(0).tolist(), color=line.get_color(), alpha=0.15, lw=0)


def told_apart(line: Line2D, index: int) -> None:
    """Six colours and markers come round twice, the second time hollow; then there is black."""
    if index >= 6:
        line.set_markerfacecolor("none")
    if index >= 12:
        line.set(color="black", marker="x+*"[index % 3])
