"""Steps on a bounded number of sequences, whose places are filled again as they stop.

In: `advance`, the carry of a batch that serves as a queue, a number of steps. Out: the carry after them, as `Eager`
would have it. Deliberately elsewhere: batches that only get thinner (`execute.Compacted`), the queue itself
(`loopaware.serve.encode`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from loopaware import tree
from loopaware.checks import bounded
from loopaware.execute import Eager
from loopaware.execute.compacted import Still
from loopaware.protocols import Advance, Carry


@dataclass(frozen=True)
class Continuous:
    """Run at most `places` sequences of a batch at a time; where one has stopped, the next of the batch begins.

    Use it where batches must stay small, and full, while depths differ: give a policy large batches, such as
    `ByLength(256)`, and the loop `execute=Continuous(32)`. The result is that of `Eager` to rounding, gradients
    included. Sequences of a step stand at different steps of their own, so that its number has no meaning: bodies and
    rules that read it are refused when they do. Of sequences whose tokens halt by themselves a place is free when all
    tokens have stopped.

    Args:
        places: sequences that are run at a time.
        check: raise where a real position of the state is not finite, at the end.
        shared: entries of the context that all sequences share although their first axis is of the batch's size.

    Raises:
        TypeError: the body or the rule reads the number of the step, or draws random numbers by it.
        ValueError: `places` is below one; the readout collects states step by step; as `execute.Compacted`.
        FloatingPointError: as `Eager`.

    >>> from loopaware import Loop, halt
    >>> rule = halt.Converged(atol=0.1, rtol=0.0)
    >>> loop = Loop(lambda state, context, index: state / 2, 99, halt=rule, execute=Continuous(places=2))
    >>> loop(torch.tensor([[1.0], [0.3], [8.0]])).steps
    tensor([4, 2, 7])
    """

    gathers = True
    places: int
    check: bool = True
    shared: tuple[str, ...] | None = None

    def __post_init__(self):
        bounded("places", self.places, "A sequence needs a place to run in.")

    def __call__(self, advance: Advance, carry: Carry, steps: int) -> Carry:
        if not getattr(advance.readout, "settles", False):
            raise ValueError(
                "readout must fold nothing of a row after it has stopped where places are filled again, got "
                f"{advance.readout!r}. Take readout.Last() or readout.Weighted(), or execute.Eager()."
            )
        run = Queue(self, advance, carry, steps)
        while run.filled():
            run.step()
        return Eager(self.check)(advance, run.whole(), 0)


class Queue:
    """A run under way: the sequences at work, how many steps each has taken, who waits, and who is done."""

    def __init__(self, rule: Continuous, advance: Advance, carry: Carry, steps: int):
        self.rule, self.all, self.advance, self.steps = rule, advance, advance, steps
        self.start, self.carry = carry, carry._replace(index=Anywhere())
        self.waiting: list[int] = carry.sequences.nonzero().flatten().tolist() if steps else []
        self.idle = sorted({*range(len(carry.alive))} - {*self.waiting})
        self.places: list[int] = []
        self.taken: list[int] = []
        self.most = 0
        self.done: list[tuple[list[int], Carry]] = []
        self.still = Still(carry)

    def filled(self) -> bool:
        """Let go who is done, and fill free places; whether there is anyone to be stepped. Waits for the device."""
        alive = self.carry.sequences.tolist() if self.places else []
        stay = [i for i, on in enumerate(alive) if on and self.taken[i] < self.steps]
        free = self.rule.places - len(stay)
        new, self.waiting = self.waiting[:free], self.waiting[free:]
        if len(stay) == len(self.places) and not new:
            return bool(stay)
        go = [i for i in range(len(alive)) if i not in stay]
        parts = []
        if go:
            self.done.append(([self.places[i] for i in go], self.some(go, self.carry)))
        if stay or not new:
            parts.append(self.some(stay, self.carry))
        if new:
            parts.append(self.some(new, self.start)._replace(index=Anywhere()))
        self.places = [self.places[i] for i in stay] + new
        self.taken = [self.taken[i] for i in stay] + [0] * len(new)
        self.carry = tree.map(lambda *leaves: torch.cat(leaves), *parts)
        if self.places:
            places = torch.tensor(self.places, device=self.start.alive.device)
            self.advance = self.all.among(places, len(self.start.alive), self.rule.shared)
        return bool(self.places)

    def some(self, places: list[int], carry: Carry) -> Carry:
        return tree.gather(torch.tensor(places, dtype=torch.long, device=carry.alive.device), carry)

    def step(self) -> None:
        before, self.carry = self.carry, self.advance(self.carry)
        self.taken = [count + 1 for count in self.taken]
        self.most = max(self.most, *self.taken)
        self.still.stepped(before, self.carry)

    def whole(self) -> Carry:
        """The carry of all sequences, in their order."""
        if not self.done:
            return self.start
        parts = [carry for _, carry in self.done]
        order = [place for places, _ in self.done for place in places]
        if self.idle:
            parts.append(self.some(self.idle, self.start))
            order += self.idle
        back = torch.tensor(order, device=self.start.alive.device).argsort()
        whole = tree.map(lambda *leaves: torch.cat(leaves).index_select(0, back), *parts)
        return self.still.kept(whole)._replace(rows=self.start.rows, index=self.start.index + self.most)


class Anywhere:
    """The number of a step where each sequence stands at its own: whoever reads it is told so."""

    def __add__(self, other: object) -> Anywhere:
        return self if isinstance(other, int) and other == 1 else self.refused()  # the driver counts on

    def refused(self, *_: object) -> NoReturn:
        raise TypeError(
            "the number of a step must not be read where sequences stand at different steps, got a body or rule that "
            "reads it. Take execute.Compacted() or execute.Eager() in place of serve.Continuous."
        )

    @classmethod
    def __torch_function__(cls, *_: object) -> NoReturn:
        cls().refused()

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = refused
    __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = refused
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = refused
    __index__ = __int__ = __float__ = __format__ = __str__ = __len__ = __iter__ = __getitem__ = refused
