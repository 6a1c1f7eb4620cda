"""What several recipes do alike: optimizer groups, numbers with their spread, a table on the terminal, curves.

In: nets, numbers. Out: what the name says. Deliberately elsewhere: everything that belongs to one recipe.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

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
