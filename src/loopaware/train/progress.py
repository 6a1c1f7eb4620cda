"""A bar that tells how a run goes: loss, accuracy, mean steps, time left.

In: lines of metrics. Out: what a person at a terminal sees; nothing elsewhere. Deliberately elsewhere: files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
SHOWN = ("loss", "accuracy", "steps")


class Progress:
    """One bar on standard error, if that is a terminal and the bar is wanted.

    >>> with Progress(10, done=0, wanted=False) as bar:
    ...     bar.advance()
    """

    def __init__(self, steps: int, done: int, wanted: bool):
        self.bar: Any = None
        if wanted and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=steps, completed=done)

    def tell(self, line: dict[str, Any]) -> None:
        """Show the newest metrics."""
        if self.bar is not None:
            text = "  ".join(f"{name} {line[name]:.3g}" for name in SHOWN if name in line)
            self.bar.update(self.task, description=text)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def within(bar: Progress, items: Iterable[Item]) -> Iterator[Item]:
    """The items one by one, each a step of the bar.

    >>> list(within(Progress(2, done=0, wanted=False), "ab"))
    ['a', 'b']
    """
    with bar:
        for item in items:
            yield item
            bar.advance()
