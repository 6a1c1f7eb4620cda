"""The folder of a run: its settings, its metrics, its checkpoints, and TensorBoard's events.

In: metrics and states of a run. Out: files from which it can be read and continued. `metrics.jsonl` holds no clock
time, so that a run that was killed and resumed ends with the same bytes as one that was not. Deliberately elsewhere:
when to write (`loopaware.train.fit`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopaware import files
from loopaware.checks import bounded
from loopaware.train import checkpoint

SETTINGS, METRICS = "settings.json", "metrics.jsonl"


class Journal:
    """What a run leaves in its folder, and how often.

    Args:
        folder: made if it is not there.
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints.
        tensorboard: write events into `folder/tensorboard` too (extra `train`).
        about: what else makes the run what it is, as plain json values; a folder of a run that differs is refused.

    Raises:
        ValueError: an interval is below one.

    >>> import tempfile
    >>> Journal(tempfile.mkdtemp()).history()
    []
    """

    def __init__(
        self,
        folder: str | Path,
        log_every: int = 10,
        save_every: int = 100,
        tensorboard: bool = False,
        about: dict[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.log_every = bounded("log_every", log_every, "Give a number of steps.")
        self.save_every = bounded("save_every", save_every, "Give a number of steps.")
        self.tensorboard = tensorboard
        self.about = {} if about is None else about
        self.writer: Any = None

    def open(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The newest checkpoint of a run with these settings, or None; later metrics are dropped.

        Raises:
            ValueError: the folder holds a run with other settings, or a broken checkpoint.
        """
        file, settings = self.folder / SETTINGS, {**self.about, **settings}
        if file.exists():
            stored = parsed(file, file.read_text())
            other = {k: v for k, v in stored.items() if settings.get(k) != v}
            if other:
                now = {name: settings.get(name) for name in other}
                raise ValueError(
                    f"{self.folder} must hold a run with the settings {now}, got {other}. "
                    "Choose another folder, or remove this one to start anew."
                )
        else:
            files.write(file, json.dumps(settings, indent=1))
        newest = checkpoint.latest(self.folder)
        contents = None if newest is None else checkpoint.load(newest)
        done = 0 if contents is None else contents["step"]
        kept = [line for line in self.history() if line["step"] <= done]
        files.write(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self.start_events(done)
        return contents

    def history(self) -> list[dict[str, Any]]:
        """Every whole line of metrics; a line that a kill cut short is left out."""
        file = self.folder / METRICS
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [parsed(file, line) for line in lines]

    def log(self, line: dict[str, Any]) -> None:
        """Append one line of metrics."""
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                self.writer.add_scalar(name, value, line["step"])

    def save(self, step: int, contents: dict[str, Any]) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.folder, step, {"step": step, **contents})

    def start_events(self, done: int) -> None:
        if self.tensorboard:
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "tensorboard must be installed to write events. pip install 'loopaware[train]'"
                ) from error
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=done)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} must hold json, got {text[:60]!r}. Remove the folder to start anew.") from error
