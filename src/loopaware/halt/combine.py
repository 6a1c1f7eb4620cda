"""Halting rules made of rules.

In: rules. Out: a rule; it is learned if one inside is. Soft weights (ACT) of the first rule inside count until the row
stops, and the step at which it stops gets what is left to one; other rules put their whole weight on that step.
Deliberately elsewhere: the rules that look at states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loopaware.checks import bounded, shown
from loopaware.halt.measure import combined, hard
from loopaware.protocols import Halt, Memory, Rows, State, Verdict


class Any(nn.Module):
    """Stop when one of the rules does: stop = s_1 or s_2 or ...

    Its score, and its weights until it stops, are those of the first rule.

    Args:
        rules: at least one.

    >>> from loopaware import halt
    >>> Any(halt.Converged(), halt.Entropy(lambda state: state)).learned
    False
    """

    def __init__(self, *rules: Halt):
        super().__init__()
        self.rules = checked(rules, "halt.Any")
        self.parts = nn.ModuleList(rule for rule in rules if isinstance(rule, nn.Module))
        self.learned = any(rule.learned for rule in rules)
        self.stops = any(rule.stops for rule in rules)
        self.mixes = rules[0].mixes

    def start(self, state: State, rows: Rows) -> Memory:
        return tuple(rule.start(state, rows) for rule in self.rules), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        stops, first, inner = ask(self.rules, old, new, memory[0], index)
        verdict, spent = combined(first, stops.any(0), memory[1])
        return verdict, (inner, spent)

    def __repr__(self) -> str:
        return f"Any({', '.join(map(repr, self.rules))})"


class All(nn.Module):
    """Stop when all of the rules do, at the same step: stop = s_1 and s_2 and ...

    Its score, and its weights until it stops, are those of the first rule.

    Args:
        rules: at least one.

    >>> from loopaware import halt
    >>> All(halt.Converged(), halt.Never()).stops
    False
    """

    def __init__(self, *rules: Halt):
        super().__init__()
        self.rules = checked(rules, "halt.All")
        self.parts = nn.ModuleList(rule for rule in rules if isinstance(rule, nn.Module))
        self.learned = any(rule.learned for rule in rules)
        self.stops = all(rule.stops for rule in rules)
        self.mixes = rules[0].mixes

    def start(self, state: State, rows: Rows) -> Memory:
        return tuple(rule.start(state, rows) for rule in self.rules), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        stops, first, inner = ask(self.rules, old, new, memory[0], index)
        verdict, spent = combined(first, stops.all(0), memory[1])
        return verdict, (inner, spent)

    def __repr__(self) -> str:
        return f"All({', '.join(map(repr, self.rules))})"


class Patience(nn.Module):
    """Stop when a rule has said so several times in a row: stop = s_t and s_{t-1} and ... and s_{t-times+1}.

    Use it where a rule fires by chance, above all on algorithmic tasks.

    Args:
        rule: any halting rule.
        times: how many times in a row.

    Raises:
        ValueError: `times` is below one.

    References: W. Zhou et al., "BERT Loses Patience", 2020, arXiv 2006.04152.

    >>> from loopaware import halt
    >>> Patience(halt.Converged(rtol=5e-2), times=2)
    Patience(rule=Converged(rtol=0.05, atol=0.0), times=2)
    """

    def __init__(self, rule: Halt, times: int = 2):
        super().__init__()
        self.rule = rule
        self.times = bounded("times", times, "1 is the rule itself.")
        self.learned, self.stops, self.mixes = rule.learned, rule.stops, rule.mixes

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows), rows.zeros(state, torch.long), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        count = (memory[1] + 1) * verdict.stop
        verdict, spent = combined(verdict, count >= self.times, memory[2])
        return verdict, (inner, count, spent)

    def __repr__(self) -> str:
        return f"Patience(rule={self.rule!r}, times={self.times})"


class Grouped(nn.Module):
    """Let neighbouring rows stop together: a group stops when every real row of it does, at the same step.

    Groups are blocks of `size` along the last row axis (patches, chunks, beams); a group never spans sequences.

    Args:
        rule: any halting rule.
        size: rows of a group; the last one may be shorter.

    Raises:
        ValueError: rows are sequences, which must not wait for one another.

    >>> from loopaware import halt
    >>> Grouped(halt.Converged(), size=4).size
    4
    """

    def __init__(self, rule: Halt, size: int):
        super().__init__()
        self.rule = rule
        self.size = bounded("size", size, "Give the number of rows that stop together.")
        self.learned, self.stops, self.mixes = rule.learned, rule.stops, rule.mixes

    def start(self, state: State, rows: Rows) -> Memory:
        if rows.axes < 2:
            raise ValueError(
                f"rows must be at least 2 for halt.Grouped, got {rows.axes}. Sequences never wait for others."
            )
        return self.rule.start(state, rows), rows.real(state), rows.zeros(state)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, inner = self.rule(old, new, memory[0], index)
        verdict, spent = combined(verdict, self.together(verdict.stop | ~memory[1]), memory[2])
        return verdict, (inner, memory[1], spent)

    def together(self, stop: Tensor) -> Tensor:
        """Every row's group. Shapes: (*rows) -> (*rows)."""
        count = stop.shape[-1]
        blocks = nn.functional.pad(stop, (0, -count % self.size), value=True).unflatten(-1, (-1, self.size))
        return blocks.all(-1).repeat_interleave(self.size, -1)[..., :count]

    def __repr__(self) -> str:
        return f"Grouped(rule={self.rule!r}, size={self.size})"


class Watched(nn.Module):
    """Ask a rule at every step and never stop: the score is recorded, weights are not, the loop runs to its bound.

    Use it to train a learned rule on all steps, or to see what a rule would have said.

    Args:
        rule: any halting rule.

    >>> from loopaware import halt
    >>> Watched(halt.Residual()).stops
    False
    """

    stops = False
    mixes = False

    def __init__(self, rule: Halt):
        super().__init__()
        self.rule = rule
        self.learned = rule.learned

    def start(self, state: State, rows: Rows) -> Memory:
        return self.rule.start(state, rows)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        verdict, memory = self.rule(old, new, memory, index)
        return hard(torch.zeros_like(verdict.stop), verdict.score), memory

    def __repr__(self) -> str:
        return f"Watched(rule={self.rule!r})"


class Switched(nn.Module):
    """One rule in training, another in evaluation; a run keeps the rule that it began with, wherever it goes on.

    Use it where a loop is trained otherwise than it is run: at drawn depths and stopped by what it predicts
    (`Switched(halt.Drawn(depth), halt.KL(head))`), or on all steps and stopped by what that taught
    (`Switched(halt.Watched(rule), rule)`). Which mode it is says `module.train()`, as for dropout. It is learned if the
    rule of training is; it stops, or spreads its weights, if one of the two does.

    Args:
        training: any halting rule.
        evaluation: any other; it may share the first one's parameters, and if it is learned it should.

    Raises:
        ValueError: the rule of evaluation is learned and that of training is not, so that nothing would teach it.

    >>> from loopaware import halt
    >>> rule = halt.Residual()
    >>> Switched(halt.Watched(rule), rule).learned
    True
    """

    def __init__(self, training: Halt, evaluation: Halt):
        super().__init__()
        self.rules = (evaluation, training)
        given = [rule for rule in (training, evaluation) if isinstance(rule, nn.Module)]
        inside = {part for rule in given for part in rule.modules() if part is not rule}
        self.parts = nn.ModuleList(dict.fromkeys(rule for rule in given if rule not in inside))
        self.learned = training.learned
        self.stops = training.stops or evaluation.stops
        self.mixes = training.mixes or evaluation.mixes
        if evaluation.learned and not training.learned and any(weight.requires_grad for weight in self.parameters()):
            raise ValueError(
                f"a rule that is learned must be asked in training too, got {shown(evaluation)} beside "
                f"{shown(training)}. Take halt.Watched(rule) there, or freeze what was trained before: "
                "rule.requires_grad_(False)."
            )

    @property
    def now(self) -> Halt:
        """The rule of the mode it is in."""
        return self.rules[self.training]

    def start(self, state: State, rows: Rows) -> Memory:
        return self.training, self.now.start(state, rows)

    def forward(self, old: State, new: State, memory: Memory, index: int) -> tuple[Verdict, Memory]:
        began, inner = memory
        verdict, inner = self.rules[began](old, new, inner, index)
        return verdict, (began, inner)

    def foreseen(self, memory: Memory) -> Tensor | None:
        """After how many steps each row stops, where the rule of the run knows before. Shapes: -> (*rows)."""
        began, inner = memory
        known = getattr(self.rules[began], "foreseen", None)
        return None if known is None else known(inner)

    def __repr__(self) -> str:
        return f"Switched(training={self.rules[1]!r}, evaluation={self.rules[0]!r})"


def checked(rules: tuple[Halt, ...], user: str) -> tuple[Halt, ...]:
    if not rules:
        raise ValueError(f"{user} must hold at least one rule, got none. Pass {user}(first, second, ...).")
    return rules


def ask(rules: tuple[Halt, ...], old: State, new: State, memory: Memory, index: int) -> tuple[Tensor, Verdict, Memory]:
    """Every rule's stop (rules, *rows), the first rule's verdict, and the memories."""
    answers = [rule(old, new, held, index) for rule, held in zip(rules, memory, strict=True)]
    return torch.stack([v.stop for v, _ in answers]), answers[0][0], tuple(held for _, held in answers)
