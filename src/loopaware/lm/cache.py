"""Keys and values of past tokens: a slot for each layer, and, of layers in the loop, for each step.

In: keys and values of new tokens, from transformers' attention, which calls `update`. Out: those of all tokens, for the
rows at hand. A `LoopCache` is what `generate` hands around; a `View` is what attention is given during one pass: it
knows the step, and which rows are in the batch and alive. Deliberately elsewhere: which step a token serves
(`loopaware.lm.policies`).

Buffers grow by a quarter, so that reading is a view and a new token costs no copy of the past. Rows that are left when
others have stopped are read without a copy where they stand side by side; else each step copies what it is about to
read into one buffer that all layers and steps share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from loopaware.lm.policies import Exact, Latest, Policy

Pair = tuple[Tensor, Tensor]


class Slot:
    """Keys and values of one layer at one step, in buffers that may be longer than what they hold.

    Shapes: each (B, heads, capacity, features); the first `length` positions hold something.
    """

    def __init__(self):
        self.buffers: list[Tensor] = []
        self.length = 0

    def put(self, start: int, new: Pair) -> None:
        """Let the positions from `start` on be `new`, and the last ones."""
        end = start + new[0].shape[2]
        self.buffers = self.buffers or [empty(each, start) for each in new]
        graph = torch.is_grad_enabled() and any(each.requires_grad for each in (*self.buffers, *new))
        if graph:  # what attention has seen must stay as it is for the backward pass
            pairs = zip(self.buffers, new, strict=True)
            self.buffers = [torch.cat((old[:, :, :start], one), 2) if start else one for old, one in pairs]
        else:
            self.buffers = [grown(old, start, end) for old in self.buffers]
            for old, one in zip(self.buffers, new, strict=True):
                old[:, :, start:end] = one
        self.length = end

    def part(self, start: int, end: int) -> Pair:
        """Some positions of all rows."""
        keys, values = (buffer[:, :, start:end] for buffer in self.buffers)
        return keys, values

    def index(self, rows: Tensor) -> None:
        """Let the batch be these rows."""
        self.buffers = [buffer[:, :, : self.length].index_select(0, rows) for buffer in self.buffers]


def empty(like: Tensor, length: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], length, like.shape[3])


def grown(buffer: Tensor, start: int, end: int) -> Tensor:
    """A buffer that can be written to up to `end`, with the first `start` positions kept."""
    if buffer.shape[2] >= end and not buffer.requires_grad:
        return buffer
    new = empty(buffer, end + max(end // 4, 32))
    new[:, :, :start] = buffer[:, :, :start].detach()
    return new


@dataclass
class Pass:
    """One pass of the model over new tokens: what its views share.

    `alive` says which of the new tokens are stepped now; None is all. `read` is how many steps stood behind the state
    that is read now, `reads` whether any was; `ran` counts tokens for which the body was run, step by step.
    """

    start: int
    count: int
    alive: Tensor | None = None
    read: int = 0
    reads: bool = False
    ran: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class View:
    """The cache as attention sees it in one pass: for some rows, at one step, or outside the loop (None)."""

    cache: LoopCache
    run: Pass
    rows: Tensor | None = None
    span: tuple[int, int] | None = None
    step: int | None = None
    policy: Policy = field(default_factory=Latest)

    def at(self, step: int) -> View:
        """At a step of the loop."""
        self.cache.depth = max(self.cache.depth, step + 1)
        return replace(self, step=step, policy=self.cache.policy)

    def reading(self) -> View:
        """For layers behind the loop that read its state after each step, before it is known which is the last."""
        self.run.reads = True
        return replace(self, step=self.run.read, policy=Exact() if self.cache.policy.frozen else Latest())

    def among(self, index: Tensor) -> View:
        """For some of the rows. Shapes: index (k)."""
        rows = index if self.rows is None else self.rows.index_select(0, index)
        first, last = int(rows[0]), int(rows[-1])
        side = last - first + 1 == len(rows)  # in order, as execute gathers them
        return replace(self, rows=rows, span=(first, len(rows)) if side else None)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: Any = None) -> Pair:
        """Take in the new tokens' keys and values; those of all tokens. Called by transformers' attention.

        Shapes: (k, heads, new, features) each -> (k, heads, all, features).
        """
        run, step = self.run, self.step
        if step is None:
            slot, earlier = self.cache.once.setdefault(layer_idx, Slot()), None
        else:
            slot, earlier = self.cache.stepped(layer_idx, self.policy.slot(step), run.start)
        if step is None or self.policy.writes(step):
            slot.put(run.start, self.kept(slot, earlier, (key_states, value_states)))
        keys, values = slot.part(0, run.end)
        return self.chosen(keys, "keys"), self.chosen(values, "values")

    def kept(self, slot: Slot, earlier: Slot | None, new: Pair) -> Pair:
        """The new tokens' keys and values in all rows: who is not stepped keeps those of the step before."""
        alive = None if self.step is None or self.policy.frozen else self.run.alive
        if self.rows is None and alive is None:
            return new
        source = next((one for one in (earlier, slot) if one is not None and one.length >= self.run.end), None)
        old = None if source is None else source.part(self.run.start, self.run.end)
        if alive is not None and self.rows is not None:
            alive = alive.index_select(0, self.rows)
        pair = [self.merged(each, None if old is None else old[i], alive) for i, each in enumerate(new)]
        return pair[0], pair[1]

    def merged(self, new: Tensor, old: Tensor | None, alive: Tensor | None) -> Tensor:
        """`new` in the rows at hand that are alive, else `old`. Shapes: (k, h, n, d), (B, h, n, d) -> (B, h, n, d)."""
        if old is None:
            batch = len(new) if self.rows is None else self.cache.batch
            old = new.new_zeros(batch, *new.shape[1:])
        if alive is not None:
            alive = alive[:, None, :, None] if alive.ndim == 2 else alive[:, None, None, None]
            new = torch.where(alive, new, self.chosen(old))
        return new if self.rows is None else old.index_copy(0, self.rows, new)

    def chosen(self, whole: Tensor, spare: str | None = None) -> Tensor:
        """The rows at hand: in place, or copied, into the spare buffer that is named where no graph may hold it."""
        if self.rows is None:
            return whole
        if self.span is not None:
            return whole.narrow(0, *self.span)
        if spare is None or torch.is_grad_enabled():
            return whole.index_select(0, self.rows)
        return self.cache.copied(whole, self.rows, spare)


class LoopCache(transformers.Cache):
    """Keys and values of past tokens for models with a loop, as `generate` wants a cache.

    Layers outside the loop have one slot, layers in the loop as many as the policy says, and more when a token takes
    more steps than any before: a new step's slot begins as a copy of the latest. Hand it to `generate` or to a model as
    `past_key_values`, and read from it what was done.

    Args:
        policy: which steps of a token serve later ones; None takes `Latest()`.

    Shapes: steps (B, T) long, of all tokens that were seen; 0 of padding.

    >>> cache = LoopCache(Latest())
    >>> cache.get_seq_length(), cache.steps
    (0, None)
    """

    def __init__(self, policy: Policy | None = None):
        super().__init__(layers=[])
        self.policy = Latest() if policy is None else policy
        self.once: dict[int, Slot] = {}
        self.looped: dict[int, list[Slot]] = {}
        self.taken: list[Tensor] = []
        self.spare: dict[str, Tensor] = {}
        self.length = self.depth = self.ran = self.batch = 0

    def view(self, count: int, batch: int) -> View:
        """What attention is given in a pass over `count` new tokens of `batch` sequences.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        if self.length and batch != self.batch:
            raise ValueError(
                f"past_key_values must hold {batch} sequences, got {self.batch}. Start from a new cache, or repeat it "
                "with batch_repeat_interleave."
            )
        if self.length:
            self.trim()
        else:
            self.reset()
        self.batch = batch
        return View(self, Pass(self.length, count))

    def trim(self) -> None:
        """Forget what no pass has ended with: it was cut short, or taken back."""
        for slot in self.filled():
            slot.length = min(slot.length, self.length)

    def stepped(self, layer: int, step: int, start: int) -> tuple[Slot, Slot | None]:
        """The slot of a layer at a step, made if it is new, and that of the step before."""
        slots = self.looped.setdefault(layer, [])
        while len(slots) <= step:
            source = slots[-1] if slots else self.once.get(layer)
            slots.append(Slot())
            if start and source is not None and source.length >= start:
                slots[-1].put(0, source.part(0, start))
        return slots[step], slots[step - 1] if step else None

    def commit(self, run: Pass, steps: Tensor) -> None:
        """End a pass: new tokens become past ones. Shapes: steps (B, new) long."""
        for layer, slots in self.looped.items():
            for step, slot in enumerate(slots):
                source = slots[step - 1] if step else self.once.get(layer)
                if slot.length < run.end and source is not None and source.length >= run.end:
                    slot.put(run.start, source.part(run.start, run.end))
        self.length = run.end
        self.ran += run.ran
        self.taken.append(steps)

    @property
    def steps(self) -> Tensor | None:
        """How many steps each token took; None before the first. Shapes: -> (B, T) long."""
        self.taken = [torch.cat(self.taken, 1)] if self.taken else []
        return self.taken[0] if self.taken else None

    def copied(self, whole: Tensor, rows: Tensor, spare: str) -> Tensor:
        """Some rows, good until others are asked for under this name; new memory each time is ten times dearer."""
        shape = (len(rows), *whole.shape[1:])
        need = math.prod(shape)
        held = self.spare.get(spare)
        if held is None or held.numel() < need or held.dtype != whole.dtype or held.device != whole.device:
            held = self.spare[spare] = whole.new_empty(need + need // 4)
        return torch.index_select(whole, 0, rows, out=held[:need].view(shape))

    def filled(self) -> list[Slot]:
        """All slots that hold something."""
        looped = (slot for slots in self.looped.values() for slot in slots)
        return [slot for slot in (*self.once.values(), *looped) if slot.buffers]

    @property
    def bytes_per_token(self) -> int:
        """What one token of one sequence takes."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for slot in self.filled() for b in slot.buffers)

    def index(self, rows: Tensor) -> None:
        """Let the batch be these rows, in this order, some perhaps several times. Shapes: rows (k)."""
        for slot in self.filled():
            slot.index(rows.to(slot.buffers[0].device))
        self.taken = [steps.index_select(0, rows.to(steps.device)) for steps in self.taken]
        self.batch = len(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams. Shapes: beam_idx (B)."""
        self.index(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences. Shapes: indices (k)."""
        self.index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self.index(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n forgets n, as transformers has it.

        Raises:
            ValueError: the number is above zero, or there are not so many tokens.
        """
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(
                f"tokens_to_remove must be from {-self.length} to 0, got {tokens_to_remove}. -n forgets n tokens."
            )
        self.length += tokens_to_remove
        self.trim()
        self.taken = [] if self.steps is None else [self.steps[:, : self.length]]

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.policy)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens were seen, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many keys a mask covers, and from which on."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    @property
    def batch_size(self) -> int:
        """How many sequences it holds; -1 if none yet."""
        return self.batch if self.length else -1

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return self.length > 0

    def __repr__(self) -> str:
        return f"LoopCache(policy={self.policy}, length={self.length}, batch={self.batch}, depth={self.depth})"
