"""`loopaware run NAME`: start a recipe; its function's arguments are the options."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from loopaware.recipes import RECIPES, Recipe


def group(name: str, recipes: dict[str, Recipe], kind: str, text: str) -> App:
    """A command with a recipe behind each word; any other word is refused."""
    app = App(name=name, help=f"{text} `loopaware recipes` lists them.")
    for word, recipe in recipes.items():
        app.command(recipe.function, name=word, help=recipe.shows)

    @app.default
    def unknown(*names: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
        """Refuse what is none."""
        if not names:
            app.help_print([])
            return
        raise ValueError(
            f"{kind} must be one of {', '.join(recipes)}, got {names[0]!r}. `loopaware recipes` tells what each shows."
        )

    return app


app = group("run", RECIPES, "a recipe", "Run a recipe: train, measure, and write a report.")
