"""Figures in one style, and how they become a piece of a page.

In: a size in inches, or a finished matplotlib figure. Out: a figure with its axes, or markup that needs nothing else:
inline SVG, or a PNG inside a data address when the SVG would be heavy. Only matplotlib's objects are used, never
pyplot, so that nothing is shared between two figures. Deliberately elsewhere: the page around it (`report`).
"""

from __future__ import annotations

import base64
import html
import io
import re
from typing import TYPE_CHECKING, Any

from loopaware.checks import between, bounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours without black and yellow: told apart with every common kind of colour vision."""

HEAVY = 400_000
"""Bytes of SVG above which a figure is embedded as PNG."""

_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


def figure(width: float, height: float, columns: int = 1) -> Figure:
    """A figure of `width` x `height` inches with `columns` axes side by side, found in its `axes`.

    Curves differ in colour, marker and line, so that they are told apart in grey too.

    Raises:
        TypeError, ValueError: a size that is no size.

    >>> left, right = figure(8, 3, columns=2).axes
    >>> _ = left.plot([1, 2, 3], [0.2, 0.7, 1.0], label="learned halt")
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    between("width", width, 0, 40, "It is in inches; a page is about 8 wide.")
    between("height", height, 0, 40, "It is in inches; 3 to 5 suits a page.")
    bounded("columns", columns, "One for a single plot.")
    style: dict[Any, Any] = {
        "axes.prop_cycle": cycler(color=PALETTE) + cycler(marker=_MARKERS) + cycler(linestyle=_LINES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
    }
    with rc_context(style):
        made = Figure(figsize=(width, height), layout="constrained")
        made.subplots(1, columns)
    return made


def embed(drawn: Figure, svg: str, name: str, alt: str) -> str:
    """Markup for a figure whose ids all begin with `name`, read aloud as `alt`. `svg` is its `standalone`."""
    svg = _inline(svg, name)
    if len(svg) <= HEAVY:
        label = html.escape(alt)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=160, facecolor="white")
    width, height = (round(96 * side) for side in drawn.get_size_inches())
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def standalone(drawn: Figure, name: str) -> str:
    """The figure as an SVG file; text stays text, so that it can be found and read."""
    from matplotlib import rc_context

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(file, format="svg", facecolor="white", metadata=nothing)
    return file.getvalue()


def _inline(svg: str, name: str) -> str:
    """Whatever a page does not need or must not share is cut."""
    svg = svg[svg.index("<svg ") :].strip()
    svg = re.sub(r"<!--.*?-->|<style[^>]*>.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
