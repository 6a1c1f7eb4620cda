"""The same work by x-transformers and torchdeq: `make rivals` installs them apart from loopaware and runs this.

In: options of the command line. Out: tables on the terminal, and results.json: medians of runs in turns. Answers and
gradients are compared first, and nothing is reported if they differ by more than the bounds named in the two files.
Deliberately elsewhere: comparisons that need no other package (`loopaware bench`).
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from equilibrium import RIVAL as TORCHDEQ
from equilibrium import Rest, equilibria
from fixed_depth import LOOP, RIVAL, SEQUENCES, TOKENS, Depth, exit_of_two_sequences, fixed_depth

from loopaware import files
from loopaware.recipes.shared import show

FULL = {
    "depth": {"dims": [64, 256, 512], "batch": 16, "tokens": 128, "heads": 8, "steps": 12},
    "rest": {"dim": 512, "rows": 256, "width": 128, "heads": 4, "batch": 16, "tokens": 64},
}
SMALL = {
    "depth": {"dims": [16], "batch": 3, "tokens": 9, "heads": 2, "steps": 4},
    "rest": {"dim": 8, "rows": 7, "width": 16, "heads": 2, "batch": 3, "tokens": 5},
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--folder", type=Path, default=Path("runs/rivals"), help="where results.json goes")
    words.add_argument("--repeats", type=int, default=7, help="timed runs of each way, in turns; medians count")
    words.add_argument("--threads", type=int, default=1, help="processor threads that PyTorch may use")
    words.add_argument("--small", action="store_true", help="tiny shapes: that it works, not how fast")
    options = words.parse_args()
    torch.set_num_threads(options.threads)
    plan = SMALL if options.small else FULL
    depths = fixed_depth(**plan["depth"], repeats=options.repeats)
    rests = equilibria(**plan["rest"], repeats=options.repeats)
    plain = {
        "plan": {**plan, "repeats": options.repeats, "threads": options.threads},
        "versions": {name: version(name) for name in ("torch", "x-transformers", "torchdeq", "loopaware")},
        "depth": [line._asdict() for line in depths],
        "rest": [line._asdict() for line in rests],
        "exit of two sequences": exit_of_two_sequences(),
    }
    files.write(options.folder / "results.json", json.dumps(plain, indent=1))
    show(f"{plan['depth']['steps']} times one block, over {RIVAL}", *table_of_depths(depths))
    print(f"two sequences that stop by themselves, x-transformers: {plain['exit of two sequences']}")
    show("places of rest, forward and backward", *table_of_rests(rests))


def table_of_depths(lines: list[Depth]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(line.dim),
            line.passes,
            f"{line.seconds[RIVAL] * 1e3:.1f}",
            *(f"{line.seconds[name] / line.seconds[RIVAL]:.3f}" for name in (LOOP, SEQUENCES, TOKENS)),
            f"{line.error:.0e}",
        ]
        for line in lines
    ]
    return ["d", "passes", f"{RIVAL}, ms", LOOP, SEQUENCES, TOKENS, "apart"], rows


def table_of_rests(lines: list[Rest]) -> tuple[list[str], list[list[str]]]:
    slow = {line.work: line.seconds for line in lines if line.way == TORCHDEQ}
    rows = [
        [
            line.work,
            line.way,
            f"{line.seconds / slow[line.work]:.3f}",
            f"{line.forward:.1f}",
            f"{line.backward:.1f}",
            *(f"{number:.0e}" for number in (line.residual, line.value, line.gradient)),
        ]
        for line in lines
    ]
    return ["work", "way", "time", "evaluations", "backward", "residual", "value apart", "gradient apart"], rows


if __name__ == "__main__":
    main()
