"""What the documents show is what runs: every block of Python in them is executed, file by file, top to bottom."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOTS = ("body", "init", "update", "halt", "readout", "grad", "execute")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> list[str]:
    """The Python blocks, each behind as many empty lines as stand before it, so that errors name the page's line."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def test_blocks_are_found_with_their_lines():
    text = "words\n\n```python\nx = 1\n```\n\n```console\n$ rm x\n```\n```python\nassert x == 2\n```\n"
    first, second = blocks(text)
    space: dict = {}
    exec(compile(first, "page", "exec"), space)
    with pytest.raises(AssertionError) as caught:
        exec(compile(second, "page", "exec"), space)
    assert caught.traceback[-1].lineno + 1 == 11


@every_page
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        exec(compile(block, str(page), "exec", dont_inherit=True), space)


def test_the_readme_has_examples():
    assert len(blocks(PAGES[0].read_text())) >= 1
    assert len(blocks(PAGES[1].read_text())) >= 1


@every_page
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("slot", SLOTS)
def test_every_part_has_a_line_in_the_docs(slot: str):
    rows = re.findall(r"^\| `([\w.]+)[(`]", (ROOT / "docs" / "loop.md").read_text(), flags=re.MULTILINE)
    named = {row.removeprefix(f"{slot}.") for row in rows if row.startswith(f"{slot}.")}
    assert named == set(importlib.import_module(f"loopaware.{slot}").__all__)
