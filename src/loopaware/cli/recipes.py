"""`loopaware recipes`: what can be run, what it shows, how long it takes."""

from __future__ import annotations

from cyclopts import App

app = App(name="recipes", help="List recipes and benchmarks with what they show and how long they take.")


@app.default
def recipes() -> None:
    """List recipes and benchmarks with what they show and how long they take."""
    from rich.console import Console
    from rich.table import Table

    from loopaware.recipes import BENCHMARKS, RECIPES

    table = Table("command", "shows", "takes", show_lines=True)
    for command, recipes in {"run": RECIPES, "bench": BENCHMARKS}.items():
        for name, recipe in recipes.items():
            table.add_row(f"{command} {name}", recipe.shows, recipe.takes)
    console = Console()
    console.print(table)
    console.print(
        "Start one with: loopaware run NAME   (loopaware run NAME --help explains its options; bench likewise)"
    )
