"""Runs as plain Python functions: what `loopaware run NAME` starts.

In: typed arguments. Out: a folder with a table, a report and results. `RECIPES` names each function without importing
it. Deliberately elsewhere: the parts they are made of; a recipe only puts library parts together.
"""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """A run: where its function is ("module:function"), what it shows, how long it takes on two cores."""

    function: str
    shows: str
    takes: str


RECIPES = {
    "distances": Recipe(
        "loopaware.recipes.distances:run",
        "Graph distances learned on 16 nodes and solved on 100: learned halting makes depth follow the problem; "
        "the same net at a fixed large depth, and an unshared stack, fail.",
        "4 minutes",
    ),
    "reactions": Recipe(
        "loopaware.recipes.reactions:run",
        "A pretrained looped ALBERT reads real chemical reactions: accuracy by loops, and what each training-free "
        "halting rule saves.",
        "2 minutes, and a download of 3 MB",
    ),
}
