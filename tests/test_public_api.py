"""What a user may rely on is there, documented and light to import, and the source keeps the rules of the house."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import loopaware

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "loopaware"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = sorted(
    {"loopaware", *(found.name for found in pkgutil.walk_packages(loopaware.__path__, "loopaware."))}
    - {"loopaware.__main__"}
)
HEAVY = {"accelerate", "cyclopts", "matplotlib", "rich", "tensorboard", "tokenizers", "transformers"}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def public(body: list[ast.stmt]) -> list[Function]:
    """Functions of a module and methods of its classes whose names, and whose classes' names, are no one's secret."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += public(node.body)
        elif isinstance(node, Function) and (not node.name.startswith("_") or node.name.startswith("__")):
            found.append(node)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name: str):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} says what lives in it"
    for export in getattr(module, "__all__", ()):
        value = getattr(module, export)
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert value.__doc__, f"{name}.{export} says what it is"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="loopaware has no 'Halting'"):
        _ = loopaware.Halting
    assert set(loopaware.__all__) <= set(dir(loopaware))


def test_importing_loads_torch_and_nothing_heavy():
    code = f"import sys, loopaware; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split() == []


def environment() -> dict[str, str]:
    """This process's paths, whether the package is installed or found through them."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE.parent), *filter(None, sys.path)])}


@every_file
def test_files_and_functions_are_short(path: Path):
    lines = len(path.read_text().splitlines())
    limit = 149 if path == SOURCE / "loop.py" else 400
    assert lines <= limit, f"{path.name} has {lines} lines, at most {limit}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, Function):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path.name}: {node.name} has {length} lines, at most 60"


@every_file
def test_nothing_is_pickled(path: Path):
    """Nothing writes pickles; released ones are read by PyTorch's restricted reader alone."""
    nodes = list(ast.walk(parsed(path)))
    restricted = [
        node.func
        for node in nodes
        if isinstance(node, ast.Call)
        and any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    ]
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "dill", "joblib", "shelve"}, f"{path.name}: line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("save", "load") or node in restricted, f"{path.name}: line {node.lineno}"


@every_file
def test_public_signatures_name_every_option(path: Path):
    for function in public(parsed(path).body):
        assert function.args.kwarg is None, f"{path.name}: {function.name} swallows options"


def test_imports_point_one_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SOURCE.parent))
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out
