"""The command line: the one place where strings become objects.

In: words typed by a person. Out: a recipe that runs, a model that is converted, or one clear error. Deliberately
elsewhere: what recipes do (`loopaware.recipes`), whose functions' arguments are the options, and `loopaware.convert`.
"""

from __future__ import annotations

import os
import sys

from cyclopts import App

from loopaware import __version__
from loopaware.cli.bench import app as bench
from loopaware.cli.convert import app as convert
from loopaware.cli.recipes import app as recipes
from loopaware.cli.run import app as run

app = App(
    name="loopaware",
    version=__version__,
    help="Layers that run again and again, decide row by row when to stop, and can show why. "
    "`loopaware recipes` lists what can be run.",
)
app.command(recipes)
app.command(run)
app.command(bench)
app.command(convert)

EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError)


def main(words: list[str] | None = None) -> None:
    """Run the command in `words` (those of the process by default) and leave the process.

    Errors that name value and remedy are printed without a traceback; LOOPAWARE_TRACEBACK=1 shows it. Leaves with 0 if
    all went well, 1 after an error, 130 if interrupted.
    """
    try:
        app(words)
    except KeyboardInterrupt:
        sys.exit(say("stopped. The same command goes on from the last checkpoint.", 130))
    except EXPECTED as error:
        if os.environ.get("LOOPAWARE_TRACEBACK"):
            raise
        sys.exit(say(f"{error}", 1))


def say(message: str, status: int) -> int:
    print(f"loopaware: {message}", file=sys.stderr)
    return status
