"""`loopaware bench NAME`: measure something against a named baseline, in one run."""

from __future__ import annotations

from loopaware.cli.run import group
from loopaware.recipes import BENCHMARKS

app = group(
    "bench",
    BENCHMARKS,
    "a benchmark",
    "Measure one thing against a named baseline in the same run: ratios of medians, with a check that both compute the "
    "same. Nothing is reported if they do not.",
)
