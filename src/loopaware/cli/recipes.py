"""`loopaware recipes`: what can be run, what it shows, how long it takes."""

from __future__ import annotations

from cyclopts import App

app = App(name="recipes", help="List the recipes with what they show and how long they take.")


@app.default
def recipes() -> None:
    """List the recipes with what they show and how long they take."""
    from rich.console import Console
    from rich.table import Table

    from loopaware.recipes import RECIPES

    table = Table("recipe", "shows", "takes", show_lines=True)
    for name, recipe in RECIPES.items():
        table.add_row(name, recipe.shows, recipe.takes)
    console = Console()
    console.print(table)
    console.print("Start one with: loopaware run NAME   (loopaware run NAME --help explains its options)")
