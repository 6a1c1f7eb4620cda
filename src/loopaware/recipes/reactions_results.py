"""What `loopaware run reactions` counts, and what follows from the counts.

In: for each batch, how many hidden tokens were told right, by loop and by rule. Out: accuracies, mean loops, and how a
rule compares with uniform depth at equal mean loops. Deliberately elsewhere: running (`loopaware.recipes.reactions`),
showing (`loopaware.recipes.reactions_report`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopaware.protocols import Halt

QUESTION, SEQUENCE, TOKEN = "sequence, by its hidden tokens", "sequence, by all tokens", "token"
LOOKS = (1, 2, 4, 8, 12, 32)


class Outcome(NamedTuple):
    """What a rule did to a batch. Shapes: right (B,) hidden tokens told right; steps, stopped (B, T)."""

    right: Tensor
    steps: Tensor
    stopped: Tensor


class Trial(NamedTuple):
    """A halting rule, what halts by it, how it is run, and the most loops it may take."""

    family: str
    name: str
    level: str
    how: Callable[..., Outcome]
    rule: Halt
    cap: int


class Compared(NamedTuple):
    """A rule against uniform depth. `error` is the standard error of `difference`, over reactions.

    `loops` is the mean over real tokens; `operations` those of loops and of the rule's head, against the released
    depth; `same_loops` and `same_operations` are accuracies of uniform depth; `difference` is to the former; `halted`
    is the share of tokens that the rule stopped.
    """

    accuracy: float
    loops: float
    operations: float
    same_loops: float
    difference: float
    error: float
    same_operations: float
    halted: float


@dataclass
class Tally:
    """Counts of one trial.

    Shapes: right (seeds, reactions); by_step (2, cap + 1), how many visible and hidden tokens took so many steps.
    """

    trial: Trial
    right: Tensor
    by_step: Tensor
    stopped: int = 0
    seeds: set[int] = field(default_factory=set)

    @classmethod
    def empty(cls, trial: Trial, seeds: int, reactions: int) -> Tally:
        return cls(trial, torch.zeros(seeds, reactions), torch.zeros(2, trial.cap + 1))

    def add(self, seed: int, reaction: Tensor, outcome: Outcome, mask: Tensor, asked: Tensor) -> None:
        """Shapes: reaction (B,) which one each row is; mask, asked (B, T)."""
        self.seeds.add(seed)
        self.right[seed].index_add_(0, reaction, outcome.right.float())
        for hidden, where in enumerate((mask & ~asked, asked)):
            self.by_step[hidden] += torch.bincount(outcome.steps[where], minlength=self.trial.cap + 1)
        self.stopped += int(outcome.stopped[mask].sum())

    @property
    def tokens(self) -> float:
        return float(self.by_step.sum())

    @property
    def loops(self) -> float:
        """The mean over real tokens."""
        return float((self.by_step.sum(0) * torch.arange(self.by_step.shape[1])).sum()) / self.tokens


@dataclass
class Results:
    """Counts of a run. Shapes: right (seeds, loops + 1, reactions), nothing at index 0; asked (seeds, reactions)."""

    depth: int
    right: Tensor
    asked: Tensor
    head: float
    tallies: list[Tally] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, depth: int, seeds: int, loops: int, reactions: int, head: float) -> Results:
        return cls(depth, torch.zeros(seeds, loops + 1, reactions), torch.zeros(seeds, reactions), head)

    def add(self, seed: int, reaction: Tensor, right: Tensor, asked: Tensor, residuals: Tensor) -> None:
        """Shapes: reaction, asked (B,); right, residuals (loops, B)."""
        self.right[seed, 1:].index_add_(1, reaction, right.float())
        self.asked[seed].index_add_(0, reaction, asked.float())
        self.residuals.append(residuals)

    @property
    def loops(self) -> int:
        return self.right.shape[1] - 1

    @property
    def curve(self) -> Tensor:
        """Accuracy at uniform depth by seed. Shapes: -> (seeds, loops), the first after one loop."""
        return (self.right.sum(-1) / self.asked.sum(-1, keepdim=True))[:, 1:]

    @property
    def change(self) -> Tensor:
        """Each sequence's largest relative change of a token's state. Shapes: -> (loops, all sequences)."""
        return torch.cat(self.residuals, 1)

    def compared(self, tally: Tally) -> Compared:
        """The rule against uniform depth."""
        seeds = sorted(tally.seeds)
        asked, right = self.asked[seeds].sum(0), tally.right[seeds].sum(0)
        total, count = asked.sum(), len(asked)
        operations = tally.loops * (1 + self.looked(tally) * self.head)
        same_loops, same_operations = (self.mixed(seeds, loops) for loops in (tally.loops, operations))
        difference = (right - same_loops).sum() / total
        spread = (right - same_loops - difference * asked).square().sum() * (count / max(count - 1, 1))
        return Compared(
            accuracy=float(right.sum() / total),
            loops=tally.loops,
            operations=operations / self.depth,
            same_loops=float(same_loops.sum() / total),
            difference=float(difference),
            error=float(spread.sqrt() / total),
            same_operations=float(same_operations.sum() / total),
            halted=tally.stopped / tally.tokens,
        )

    def mixed(self, seeds: list[int], loops: float) -> Tensor:
        """Hidden tokens told right by a mix of two neighbouring uniform depths. Shapes: -> (reactions,)."""
        loops = min(loops, self.loops)
        below = min(int(loops), self.loops - 1)
        return torch.lerp(self.right[seeds, below], self.right[seeds, below + 1], loops - below).sum(0)

    def looked(self, tally: Tally) -> float:
        """The share of tokens that a rule needs its head for."""
        if tally.trial.family == "state change":
            return 0.0
        return float(tally.by_step[1].sum()) / tally.tokens if tally.trial.level == QUESTION else 1.0

    def best(self, level: str, cap: int, within: float = 0.005) -> tuple[Trial, Compared] | None:
        """The rule with the fewest loops among those that lose at most `within` against the released depth."""
        found = []
        for tally in self.tallies:
            if (tally.trial.level, tally.trial.cap) == (level, cap):
                seeds = sorted(tally.seeds)
                goal = float(self.right[seeds, self.depth].sum() / self.asked[seeds].sum()) - within
                found.append((tally.trial, self.compared(tally), goal))
        kept = [(trial, compared) for trial, compared, goal in found if compared.accuracy >= goal]
        return min(kept, key=lambda pair: pair[1].loops, default=None)

    def ranges(self, cap: int) -> dict[str, tuple[float, float]]:
        """The lowest and the highest accuracy of each family of rules by hidden tokens."""
        found: dict[str, list[float]] = {}
        for tally in self.tallies:
            if (tally.trial.level, tally.trial.cap) == (QUESTION, cap):
                found.setdefault(tally.trial.family, []).append(self.compared(tally).accuracy)
        return {family: (min(values), max(values)) for family, values in found.items()}

    def summary(self) -> dict[str, Any]:
        """Everything that the report shows, as plain numbers."""
        return {
            "released_depth": self.depth,
            "reactions": self.asked.shape[1],
            "hidden_tokens_by_seed": self.asked.sum(1).int().tolist(),
            "accuracy_by_loops": [round(value, 4) for value in self.curve.mean(0).tolist()],
            "accuracy_by_loops_and_seed": [[round(value, 4) for value in seed] for seed in self.curve.tolist()],
            "smallest_state_change": float(self.change.min()),
            "head_share": self.head,
            "rules": [
                {"rule": tally.trial.name, "halts": tally.trial.level, "most_loops": tally.trial.cap}
                | {name: round(value, 4) for name, value in self.compared(tally)._asdict().items()}
                for tally in self.tallies
            ],
        }
