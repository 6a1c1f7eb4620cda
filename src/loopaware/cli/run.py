"""`loopaware run NAME`: start a recipe; its function's arguments are the options."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from loopaware.recipes import RECIPES

app = App(
    name="run", help="Run a recipe: train, measure, and write a report. `loopaware recipes` tells what they show."
)
for name, recipe in RECIPES.items():
    app.command(recipe.function, name=name, help=recipe.shows)


@app.default
def unknown(*names: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
    """Refuse what is no recipe."""
    if not names:
        app.help_print([])
        return
    raise ValueError(
        f"a recipe must be one of {', '.join(RECIPES)}, got {names[0]!r}. `loopaware recipes` tells what each shows."
    )
