"""The command line: recipes are listed, every option of every recipe is explained and can be set."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from loopaware import __version__, cli
from loopaware.recipes import BENCHMARKS, RECIPES


def said(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    left = 0
    try:
        cli.main(words)
    except SystemExit as left_with:
        left = left_with.code or 0
    assert left == status
    got = capsys.readouterr()
    return got.out if status == 0 else got.err


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")


COMMANDS = [*(("run", name) for name in RECIPES), *(("bench", name) for name in BENCHMARKS)]


def function(name: str):
    module, _, attribute = {**RECIPES, **BENCHMARKS}[name].function.partition(":")
    return getattr(importlib.import_module(module), attribute)


def test_recipes_are_listed_with_what_they_show_and_take(capsys):
    text = said(["recipes"], capsys)
    for name, recipe in {**RECIPES, **BENCHMARKS}.items():
        assert name in text and recipe.shows.split()[0] in text and recipe.takes.split(",")[0] in text


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_every_option_is_explained(command, name, capsys):
    text = said([command, name, "--help"], capsys)
    for option in inspect.signature(function(name)).parameters:
        flag = f"--{option.replace('_', '-')}"
        line = next((line for line in text.splitlines() if re.search(rf"{flag}\b", line)), "")
        assert line, f"{name} --help does not name {flag}"
        words = re.sub(r"[│\s]+", " ", line.split(flag, 1)[1])
        assert len(re.findall(r"[a-z]{2,}", words)) >= 3, f"{name} --help does not explain {flag}: {line}"


def test_a_wrong_option_is_refused_and_named(capsys):
    assert "--nonsense" in said(["run", "distances", "--nonsense", "3"], capsys, status=2)


def test_the_version_is_the_packages(capsys):
    assert said(["--version"], capsys).strip() == __version__


def test_errors_are_one_line_and_tracebacks_are_on_demand(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["run", "nothing"])
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("LOOPAWARE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a recipe must be one of"):
        cli.main(["run", "nothing"])
