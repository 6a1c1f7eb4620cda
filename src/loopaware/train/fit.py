"""The training loop: forward, backward, clip, step; written to be read.

In: a model, an objective, batches as a function of the step, an optimizer. Out: the trained model and its metrics.
A batch depends on the seed and the step alone and the generators are seeded anew at each step, so a resumed run needs
nothing but weights, moments and the number of the step. Deliberately elsewhere: files (`loopaware.train.journal`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopaware import files, tree
from loopaware.checks import bounded
from loopaware.train.average import Average
from loopaware.train.checkpoint import fitted
from loopaware.train.journal import Journal
from loopaware.train.progress import Progress
from loopaware.train.schedule import Constant, Schedule

Batches = Callable[[int, torch.Generator], Any]
Objective = Callable[[nn.Module, Any, int], tuple[Tensor, dict[str, Any]]]


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    optimizer: Optimizer,
    *,
    steps: int,
    schedule: Schedule | None = None,
    clip: float = 1.0,
    average: Average | None = None,
    journal: Journal | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train `model` in place for `steps` steps; go on from the journal's newest checkpoint if there is one.

    Runs on whatever device accelerate finds; one process writes. Killed at any moment and started again with the same
    arguments, it ends with the same numbers as an unbroken run, bit for bit on the CPU. Returns the logged metrics.

    Args:
        objective: `(model, batch, step) -> (loss, metrics)`; metrics named accuracy and steps show in the bar.
        batches: `(step, generator) -> batch`, a tree of tensors that depends on its arguments alone.
        schedule: `(step, steps) -> factor` on the learning rates; None for constant.
        clip: largest norm of the gradient; infinity for none.
        average: averaged weights to keep beside the model's.
        journal: where metrics and checkpoints go; None keeps none.
        seed: of batches, dropout and whatever else is drawn.
        progress: show a bar if the output is a terminal.

    Raises:
        FloatingPointError: the loss is not finite; names the step.
        ValueError: the journal holds another run or a broken checkpoint, or another process trains in its folder.
    """
    bounded("steps", steps, "Train at least one step.")
    accelerator = accelerated()
    schedule = Constant() if schedule is None else schedule
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    keeper = Keeper(model, optimizer, average, journal, accelerator.is_main_process)
    done = keeper.open({"steps": steps, "seed": seed, "clip": clip, "schedule": repr(schedule), "rates": rates})
    if done >= steps:
        return keeper.close()
    wrapped, stepping = accelerator.prepare(model, optimizer)
    model.train()
    with Progress(steps, done, progress and accelerator.is_main_process) as bar:
        for step in range(done, steps):
            batch = moved(batches(step, seeded(seed, step, accelerator.process_index)), accelerator.device)
            rate(optimizer, schedule(step, steps))
            loss, metrics = objective(wrapped, batch, step)
            stepping.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip)
            stepping.step()
            if average is not None:
                average.step(model, step)
            if keeper.due(step + 1, steps):
                line = numbers(step + 1, {"loss": loss, "norm": norm, **metrics})
                keeper.take(line, steps)
                bar.tell(line)
            bar.advance()
    return keeper.close()


def rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its first one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class Keeper:
    """What a run must remember, and the journal it writes to; without a journal it only collects the metrics."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, average: Average | None, journal: Journal | None, writes: bool
    ):
        self.model, self.optimizer, self.average = model, optimizer, average
        self.journal, self.writes = journal, writes
        self.reserved: files.Reserved | None = None
        self.lines: list[dict[str, Any]] = []

    def open(self, settings: dict[str, Any]) -> int:
        """Fill model, optimizer and average from the newest checkpoint; how many steps are done."""
        if self.journal is None:
            return 0
        self.reserved = files.Reserved(self.journal.folder) if self.writes else None
        stored = self.journal.open(settings)
        self.lines = self.journal.history()
        if stored is None:
            return 0
        fitted(self.model.state_dict(), stored["model"], self.journal.folder)
        self.model.load_state_dict({**self.model.state_dict(), **stored["model"]})
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.average is not None:
            places = {name: weight.device for name, weight in self.model.named_parameters()}
            self.average.weights = {name: weight.to(places[name]) for name, weight in stored["average"].items()}
        return stored["step"]

    def due(self, step: int, steps: int) -> bool:
        """Whether anything is written after this many steps."""
        return step == steps or any(step % every == 0 for every in self.intervals)

    @property
    def intervals(self) -> tuple[int, int]:
        """Steps between two lines, and between two checkpoints."""
        return (10, 10) if self.journal is None else (self.journal.log_every, self.journal.save_every)

    def take(self, line: dict[str, Any], steps: int) -> None:
        """Log the line and save a checkpoint, whichever is due; a line always stands before its checkpoint."""
        log_every, save_every = self.intervals
        if line["step"] % log_every == 0 or line["step"] == steps:
            self.lines.append(line)
            if self.journal is not None and self.writes:
                self.journal.log(line)
        if self.journal is not None and self.writes and (line["step"] % save_every == 0 or line["step"] == steps):
            weights, moments = dict(self.model.state_dict()), self.optimizer.state_dict()
            average = {} if self.average is None else self.average.weights
            self.journal.save(line["step"], {"model": weights, "optimizer": moments, "average": average})

    def close(self) -> list[dict[str, Any]]:
        if self.journal is not None:
            self.journal.close()
        if self.reserved is not None:
            self.reserved.close()
        return self.lines


def accelerated() -> Any:
    """Accelerate's view of the devices that are there."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("accelerate must be installed to train. pip install 'loopaware[train]'") from error
    return Accelerator()


def seeded(seed: int, step: int, process: int) -> torch.Generator:
    """A generator for the batch; the global ones are seeded too, for dropout and the like."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + process) * 2
    torch.manual_seed(mixed)
    return torch.Generator().manual_seed(mixed + 1)


def moved(batch: Any, device: torch.device) -> Any:
    return tree.map(lambda tensor: tensor.to(device), batch)


def numbers(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics as plain numbers: the one place where the device is waited for."""
    line = {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in metrics.items()}
    if not math.isfinite(line["loss"]):
        raise FloatingPointError(
            f"the loss must be finite, got {line['loss']} at step {step}. "
            "Lower the learning rate, warm up longer or clip more; the last checkpoint is as it was."
        )
    return {"step": step, **line}
