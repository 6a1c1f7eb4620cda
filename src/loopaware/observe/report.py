"""A report: one html file with words, tables and figures that opens in any browser, offline.

In: plain text, rows of cells, matplotlib figures. Out: a file with everything inside it and, at its foot, what is
needed to make it again: date, versions, command, seeds, kind of machine. Deliberately elsewhere: what is measured
(`record`, `cost`, the recipes), style and script of the page (`page`), figures as markup (`figures`).
"""

from __future__ import annotations

import html
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import loopaware
from loopaware import files
from loopaware.checks import bounded
from loopaware.observe import figures as drawings
from loopaware.observe.page import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUMBER = re.compile(r"[-+−]?\d[\d,.]*(e[-+]?\d+)?\s*(%|x|×|±.*|\(.*\))?|nan|-?inf|–")


class Report:
    """A page that grows from top to bottom and is written once.

    Use it at the end of a run. All text is taken literally: `<` and `&` are shown, never interpreted. Figures become
    markup when they are added, so the same figure may be changed and added again.

    Args:
        title: the heading of the page.
        seeds: printed at the foot; nothing else is done with them.

    Raises:
        ValueError: an empty title, caption or alternative text; a row that does not fit its table.

    >>> report = Report("Distances", seeds=(0, 1, 2))
    >>> report.table(("nodes", "right"), [(16, 1.0), (64, 0.98)], caption="Share of graphs answered right.")
    >>> report.text("Accuracy <b>is not</b> markup.")
    """

    def __init__(self, title: str, *, seeds: Sequence[int] = ()):
        self.title = _said("title", title, "Name what the report shows.")
        self.seeds = tuple(seeds)
        self._parts: list[str] = []
        self._figures = 0
        self._files: dict[str, str] = {}

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; level 2 opens a chapter, 3 and 4 are below it."""
        if bounded("level", level, "Level 1 is the title.", least=2) > 4:
            raise ValueError(f"level must be at most 4, got {level}. Deeper headings do not help a reader.")
        self._parts.append(f"<h{level}>{html.escape(_said('heading', text, 'Leave it out instead.'))}</h{level}>")

    def text(self, text: str) -> None:
        """Paragraphs, parted by empty lines."""
        paragraphs = re.split(r"\n\s*\n", text.strip())
        self._parts.extend(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs if paragraph)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str) -> None:
        """A table; columns of numbers, or of text such as "0.98 ± 0.01", are set to the right; None is a dash."""
        caption = _said("caption", caption, "Say what the rows compare.")
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row must have {len(columns)} cells, got {len(row)}: {row!r}. One cell per column.")
        cells = [[_shown(cell) for cell in row] for row in rows]
        right = [bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
        head = "".join(_cell("th", name, number, "col") for name, number in zip(columns, right, strict=True))
        lines = "\n".join(f"<tr>{_line(row, right)}</tr>" for row in cells)
        self._parts.append(
            f'<div class="wide"><table>\n<caption>{html.escape(caption)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>"
        )

    def figure(self, figure: Figure, *, alt: str, caption: str = "") -> None:
        """A figure. `alt` says what it shows to whoever cannot see it; `caption` stands below."""
        markup, svg = self._drawn(figure, alt, caption)
        self._parts.append(markup)
        self._files[f"figure{self._figures}"] = svg

    def frames(self, figures: Sequence[Figure], captions: Sequence[str]) -> None:
        """Figures shown one at a time with a slider; one below the other on paper or without scripts.

        Each caption stands below its figure and is its alternative text too.
        """
        if not figures or len(figures) != len(captions):
            raise ValueError(
                f"frames must be one or more figures with a caption each, got {len(figures)} figures "
                f"and {len(captions)} captions. Give one caption per figure."
            )
        shown = "\n".join(self._drawn(*pair, pair[1])[0] for pair in zip(figures, captions, strict=True))
        self._parts.append(
            '<div class="frames" role="group" aria-label="frames">\n<div class="controls" hidden>'
            '<button type="button">back</button>'
            f'<input type="range" min="0" max="{len(figures) - 1}" value="0" aria-label="frame">'
            f'<button type="button">next</button><output aria-live="polite"></output></div>\n{shown}\n</div>'
        )

    def write(self, path: str | Path) -> Path:
        """Write the page and return where it is; each figure stands beside it too, as `figures/figure1.svg`, ...

        Raises:
            OSError: the file system refused; what was there before is untouched.
        """
        made = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>\n" for name, value in _origin(self.seeds))
        written = files.write(path, page(self.title, "\n".join(self._parts), f"<dl>\n{made}</dl>"))
        for name, svg in self._files.items():
            files.write(written.parent / "figures" / f"{name}.svg", svg)
        return written

    def _drawn(self, figure: Figure, alt: str, caption: str) -> tuple[str, str]:
        """Its markup, and its svg by itself."""
        from matplotlib.figure import Figure as Drawing

        if not isinstance(figure, Drawing):
            raise TypeError(
                f"figure must be a matplotlib figure, got {type(figure).__name__}. "
                "Make one with loopaware.observe.figures.figure(width, height)."
            )
        alt = _said("alt", alt, "Say in a sentence what the figure shows.")
        self._figures += 1
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        name = f"figure{self._figures}"
        svg = drawings.standalone(figure, name)
        return f"<figure>{drawings.embed(figure, svg, name, alt)}{below}</figure>", svg


def _said(what: str, text: str, remedy: str) -> str:
    if not text.strip():
        raise ValueError(f"{what} must be text that says something, got {text!r}. {remedy}")
    return text


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return "–" if cell is None else str(cell)
    return f"{cell:.3f}" if cell == 0 or 1e-3 <= abs(cell) < 1e4 else f"{cell:.3g}"


def _cell(tag: str, text: str, number: bool, scope: str = "") -> str:
    attributes = (f' scope="{scope}"' if scope else "") + (' class="number"' if number else "")
    return f"<{tag}{attributes}>{html.escape(text)}</{tag}>"


def _line(row: Sequence[str], right: Sequence[bool]) -> str:
    """The first cell names the row."""
    first, *others = (pair for pair in zip(row, right, strict=True))
    return _cell("th", *first, "row") + "".join(_cell("td", *pair) for pair in others)


def _origin(seeds: Sequence[int]) -> list[tuple[str, str]]:
    """What is needed to make the report again; no names of machines or people."""
    import matplotlib

    versions = {
        "loopaware": loopaware.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "matplotlib": matplotlib.__version__,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return [
        ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("command", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        ("seeds", ", ".join(map(str, seeds)) or "none given"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"),
    ]
