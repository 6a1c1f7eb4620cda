"""A loop inside a transformer: a body that repeats, a rule per row that says when to stop, a choice of gradients.

`Loop` and its parts are loaded here; `train`, `observe` and the other rooms when they are first named, so that
`import loopaware` costs little more than `import torch`. Deliberately elsewhere: everything; this file only names it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loopaware import body, execute, grad, halt, hub, init, nn, readout, solve, tree, update
from loopaware.loop import Loop
from loopaware.protocols import Carry, Output, Rows, Status, Verdict

if TYPE_CHECKING:
    from loopaware import convert, lm, models, observe, recipes, serve, tasks, testing, train

__version__ = "0.1.0"

__all__ = [
    "Carry",
    "Loop",
    "Output",
    "Rows",
    "Status",
    "Verdict",
    "body",
    "convert",
    "execute",
    "grad",
    "halt",
    "init",
    "lm",
    "models",
    "nn",
    "observe",
    "readout",
    "recipes",
    "serve",
    "solve",
    "tasks",
    "testing",
    "train",
    "tree",
    "update",
]

hub.watch()

_LATER = ("convert", "lm", "models", "observe", "recipes", "serve", "tasks", "testing", "train")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"loopaware.{name}")
    raise AttributeError(f"loopaware has no {name!r}. Its rooms are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
