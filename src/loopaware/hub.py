"""Formats of language models that transformers' Auto classes find once `loopaware` is imported.

In: an import of transformers' tables of models, whenever it comes. Out: our entries in them. Nothing is loaded before:
`import loopaware` costs no transformers. Deliberately elsewhere: the models.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

FORMATS = {
    "looped": ("looped_config", "LoopedConfig", "looped_lm", "LoopedForCausalLM"),
    "huginn_raven": ("huginn_config", "HuginnConfig", "huginn", "HuginnForCausalLM"),
    "ouro": ("ouro_config", "OuroConfig", "ouro", "OuroForCausalLM"),
    "relaxed": ("relaxed_config", "RelaxedConfig", "relaxed_lm", "RelaxedForCausalLM"),
}
"""By `model_type`, the files in `loopaware.models` and the classes of config and causal model.

A config has a file of its own that needs none of transformers' models: it is entered while those are not yet loaded.
"""

ENCODERS = {"AutoModel": "LoopedEncoder", "AutoModelForMaskedLM": "LoopedForMaskedLM"}
"""Models in `looped_encoder` with the config of `looped`, by the Auto class that finds them."""

TABLES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")


def enter(table: ModuleType) -> None:
    """Enter our formats into a table of transformers that has been loaded; not those that are just being loaded."""
    for kind, (config_file, config, model_file, model) in FORMATS.items():
        if table.__name__ == TABLES[0]:
            if ours := named(config_file, config):
                table.AutoConfig.register(kind, ours, exist_ok=True)
        elif hasattr(table, "AutoModelForCausalLM") and (whole := named(model_file, model)):
            table.AutoModelForCausalLM.register(whole.config_class, whole, exist_ok=True)
    for auto, model in ENCODERS.items():
        if hasattr(table, auto) and (whole := named("looped_encoder", model)):
            getattr(table, auto).register(whole.config_class, whole, exist_ok=True)


def named(file: str, name: str) -> Any:
    return getattr(importlib.import_module(f"loopaware.models.{file}"), name, None)


def own(config: type, more: Mapping[str, Any]) -> None:
    """Refuse a file of another format; `more` is what it holds besides a config's fields.

    Raises:
        ValueError: its `model_type` is another one.
    """
    expected: str = config.model_type
    kind = more.get("model_type", expected)
    if kind != expected:
        raise ValueError(
            f"model_type must be {expected!r}, got {kind!r}. Load it with AutoModelForCausalLM, or make a loop of it "
            "with `loopaware convert`."
        )


def complete() -> None:
    """Called at the end of a config's file: whoever imports it first has loaded transformers' table on the way."""
    for name in TABLES:
        if name in sys.modules:
            enter(sys.modules[name])


class Watch:
    """Finds nothing itself: lets the table be loaded as ever, and enters our formats when it is."""

    def __init__(self):
        self.busy: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in TABLES or name in self.busy:
            return None
        self.busy.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = After(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class After:
    """A loader that does what another one does, and then enters our formats."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        enter(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def watch() -> None:
    """Enter our formats now, where transformers is loaded, else when it is."""
    sys.meta_path.insert(0, Watch())
    complete()
