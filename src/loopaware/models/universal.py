"""The Universal Transformer: M. Dehghani et al., "Universal Transformers", 2018, arXiv 1807.03819. One layer of a
transformer, repeated on all tokens, each of which may halt by itself.

    A^t = LN(H^{t-1} + P^t + MHSA(H^{t-1} + P^t));   H^t = LN(A^t + Transition(A^t))
    P^t_{i,2j} = sin(i / 10000^{2j/d}) + sin(t / 10000^{2j/d}),  P^t_{i,2j+1} with cosines;   i, t = 1, 2, ...

P^t is added again at every step and stays in the residual stream. In: states (B, T, D), or tokens (B, T) for the whole
model, and masks of the real ones. Out: an `Output`. Deliberately elsewhere: losses (`train.objectives`).

tensor2tensor, the authors' code (models/research/universal_transformer_util.py), runs another model:
- norms before the sub-layers and behind the loop: `tied_block(..., placement=Pre())`, `norm=LayerNorm(dim, eps=1e-6)`;
- sines and cosines in two halves, a learned vector for each step, both counted from 0: `tensor2tensor_signal`;
- halting is judged before the step, on state + signal: `halt.ACT(halt.Before(halt.Linear(dim, bias=1.0), signal))`;
- the answer is a recursive mean, `readout.Tensor2Tensor()`; act_type "accumulated" is `readout.Weighted()` with nothing
  given back at the bound, "global" rows=1 with probabilities averaged where `halt.Linear` averages states; in all of
  them halted tokens go on being updated: `tensor2tensor_act`;
- recurrences are `update=`: highway is `update.Gated`, but its gate may also read the start of the loop; gru is
  `update.GRU` and lstm `update.LSTM`, but behind attention alone, without transition and step signal and with norms
  before and behind the cell, and where a GRU keeps z h its gru keeps (1 - z) p; skip and dwa (a softmax over features)
  have no counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopaware import readout as readouts
from loopaware import tree
from loopaware import update as updates
from loopaware.checks import between, bounded, shown
from loopaware.halt.measure import hard
from loopaware.loop import Loop
from loopaware.models.coordinates import Coordinates, HalvedWaves, tensor2tensor_signal
from loopaware.nn import Block, FeedForward, LayerNorm, Placement, Post
from loopaware.protocols import Body, Carry, Context, Halt, Output, Rows, State, Update, Verdict, partial
from loopaware.tokens import Tokens

__all__ = [
    "Coordinates",
    "HalvedWaves",
    "UniversalDecoder",
    "UniversalEncoder",
    "UniversalTransformer",
    "tensor2tensor_act",
    "tensor2tensor_signal",
    "tied_block",
]

Signal = Callable[..., Tensor]


def tied_block(
    dim: int, heads: int, *, hidden: int | None = None, placement: Placement | None = None, decoder: bool = False
) -> Block:
    """The layer that is repeated: ReLU between the maps, norms as in the paper (`Post()`) if not told otherwise.

    A decoder's is causal and attends to a memory. For dropout or another transition build the `Block` itself.

    >>> tied_block(8, 2, decoder=True).attention.causal
    True
    """
    return Block(
        dim,
        heads,
        causal=decoder,
        cross=decoder,
        placement=Post() if placement is None else placement,
        norm=lambda features: LayerNorm(features, eps=1e-6),  # tensor2tensor's; the paper names none
        feedforward=FeedForward(dim, hidden, nn.ReLU()),
    )


class Step(nn.Module):
    """One step, as a body: proposal = block(H + P^t)."""

    def __init__(self, block: Body, signal: Signal | None):
        super().__init__()
        self.block = block
        self.signal = signal

    def told(self, state: Tensor, context: Context, index: int) -> Tensor:
        if self.signal is None:
            return state
        start = context.get("start") if isinstance(context, Mapping) else None
        return self.signal(state, index) if start is None else self.signal(state, index, start)

    def forward(self, state: Tensor, context: Context, index: int) -> State:
        return self.block(self.told(state, context, index), context, index)

    @property
    def partial(self) -> bool:
        """Whether the block can run for some tokens; the signal is told to all."""
        return partial(self.block)

    def some(self, state: Tensor, context: Context, index: int, tokens: Tokens, held: Any) -> tuple[Tensor, Any]:
        """`forward` of some tokens. Keys are held where the signal of a token that has stopped is known to stay."""
        assert partial(self.block)
        told, signal = self.told(state, context, index), self.signal
        if signal is None or (isinstance(signal, Coordinates) and signal.steps is None):
            return self.block.some(told, context, index, tokens, held)
        return self.block.some(told, context, index, tokens.afresh, None)[0], None


def tokenwise(step: Step, max_steps: int, halt: Halt | None, update: Update | None) -> Loop:
    """The loop in which tokens halt by themselves, with the readout that the rule wants."""
    readout = readouts.Weighted() if halt is not None and halt.mixes else readouts.Last()
    return Loop(step, max_steps, rows=2, update=update, halt=halt, readout=readout)


def drawn(loop: Loop, x: Tensor) -> Tensor | None:
    """Where the positions of each sequence start in this run. Shapes: x (B, T, D) -> (B) long."""
    step = getattr(loop.body, "step", loop.body)
    shift = getattr(getattr(step, "signal", None), "shift", 0) if loop.training else 0
    return torch.randint(shift + 1, x.shape[:1], device=x.device) if shift else None


class UniversalEncoder(nn.Module):
    """One block, repeated on a sequence until each token halts: H^t = block(H^{t-1} + P^t).

    Without a rule every token takes all steps. A token that halts keeps its state, to which others still attend. The
    answer is the last state, or the mean if the rule mixes; other parts: `encoder.loop = encoder.loop.replace(...)`.

    Args:
        block: a body, such as `tied_block(dim, heads)`.
        signal: `(state, index) -> state`, such as `Coordinates(Sinusoidal(dim), Sinusoidal(dim))`; None tells nothing.
        halt: None never halts; the paper's adaptive model has `halt.ACT(halt.Linear(dim, bias=-3.0))`.
        update: None takes the proposal.
        norm: of the answer; blocks with `Pre()` want one.

    Shapes: x (B, T, D), mask (B, T) bool, True = real -> value (B, T, D), steps and halted (B, T).

    References: M. Dehghani et al., as above.

    >>> UniversalEncoder(tied_block(8, 2), 6)(torch.zeros(1, 2, 8)).steps
    tensor([[6, 6]])
    """

    def __init__(
        self,
        block: Body,
        max_steps: int,
        *,
        signal: Signal | None = None,
        halt: Halt | None = None,
        update: Update | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.loop = tokenwise(Step(block, signal), max_steps, halt, update)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor, mask: Tensor | None = None, start: Tensor | None = None) -> Output:
        start = drawn(self.loop, x) if start is None else start
        out = self.loop({"x": x, "mask": mask, "start": start}, mask=mask)
        return out._replace(value=self.norm(out.value))


class UniversalDecoder(nn.Module):
    """One causal block, repeated on a sequence that also looks at a memory, until each token halts.

    As `UniversalEncoder`, with `tied_block(dim, heads, decoder=True)`. Neither states nor steps of a token depend on
    later ones, as long as tokens halt by themselves.

    Shapes: x (B, T, D), memory (B, S, D), masks (B, T) and (B, S) bool, True = real -> value (B, T, D).

    Raises:
        ValueError: a `Block` is not causal or does not look at a memory.

    >>> UniversalDecoder(tied_block(8, 2, decoder=True), 6)(torch.zeros(1, 2, 8), torch.ones(1, 5, 8)).value.shape
    torch.Size([1, 2, 8])
    """

    def __init__(
        self,
        block: Body,
        max_steps: int,
        *,
        signal: Signal | None = None,
        halt: Halt | None = None,
        update: Update | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        if isinstance(block, Block) and not (block.attention.causal and block.cross is not None):
            raise ValueError(
                f"a decoder's block must be causal and look at a memory, got causal={block.attention.causal}, "
                f"cross={block.cross is not None}. Take tied_block(dim, heads, decoder=True)."
            )
        self.loop = tokenwise(Step(block, signal), max_steps, halt, update)
        self.norm = nn.Identity() if norm is None else norm

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Output:
        start = drawn(self.loop, x) if start is None else start
        context = {"x": x, "mask": mask, "memory": memory, "memory_mask": memory_mask, "start": start}
        out = self.loop(context, mask=mask)
        return out._replace(value=self.norm(out.value))


class UniversalTransformer(nn.Module):
    """Encoder and decoder between token embeddings and a head: logits = W decoder(E y, encoder(E x)) + b.

    Shapes: source (B, S), target (B, T) long, masks of their shapes, True = real -> value (B, T, vocabulary), what
    follows each token of the target; steps and halted are the decoder's.

    Raises:
        ValueError: a size is below 1.

    >>> encoder, decoder = UniversalEncoder(tied_block(8, 2), 3), UniversalDecoder(tied_block(8, 2, decoder=True), 3)
    >>> model = UniversalTransformer(encoder, decoder, dim=8, vocabulary=11)
    >>> model(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 3]])).value.shape
    torch.Size([1, 2, 11])
    """

    def __init__(self, encoder: UniversalEncoder, decoder: UniversalDecoder, dim: int, vocabulary: int):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        bounded("dim", dim, "Give the features of encoder and decoder.")
        # N(0, 1), as in tensor2tensor after its factor of sqrt(dim).
        self.tokens = nn.Embedding(bounded("vocabulary", vocabulary, "Count the tokens."), dim)
        self.head = nn.Linear(dim, vocabulary)

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Output:
        x = self.tokens(source)
        start = drawn(self.encoder.loop, x)  # one for both: a copy stands where its original does
        memory = self.encoder(x, source_mask, start).value
        out = self.decoder(self.tokens(target), memory, target_mask, source_mask, start)
        return out._replace(value=self.head(out.value))

    @torch.no_grad()
    def generate(
        self, source: Tensor, length: int, begin: int, end: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The likeliest token, again and again; after `end` only that. Shapes: source, mask (B, S) -> (B, length)."""
        memory = self.encoder(self.tokens(source), mask).value
        target = source.new_full((len(source), 1), begin)
        for _ in range(length):
            state = self.decoder(self.tokens(target), memory, memory_mask=mask).value[:, -1]
            new = self.head(state).argmax(-1)
            if end is not None:
                new = new.masked_fill((target[:, 1:] == end).any(1), end)
            target = torch.cat([target, new[:, None]], 1)
        return target[:, 1:]


def tensor2tensor_act(loop: Loop, dim: int, bias: float = 1.0, epsilon: float = 0.01) -> Loop:
    """The loop of an encoder or decoder, run as tensor2tensor's ACT: tokens that have halted go on being updated.

    value = p block(H + P^t) + (1 - p) value;   p = sigmoid(w (H + P^t) + b), the rest to one when it halts, then 0

    Only to reproduce its models: `encoder.loop = tensor2tensor_act(encoder.loop, dim)`. A sequence ends when all its
    tokens have halted; till then others attend to what a halted token becomes, not to its answer; nothing is given back
    at the bound. Block and signal are kept; update, rule and readout are not. The carry's state holds `updates` and
    `remainder` (B, T), whose mean sum is its ponder loss; the output, the steps of each sequence. (Till 30 August
    2018 it had `previous_state * 1 - update_weights`, brackets missing; this is the code since then.)

    Raises:
        ValueError, TypeError: epsilon is out of range, or the loop is another.

    >>> loop = tensor2tensor_act(UniversalEncoder(tied_block(8, 2), 6).loop, 8)
    >>> 2 <= loop(torch.randn(1, 2, 8)).steps.item() <= 6
    True
    """
    between("epsilon", epsilon, 0.0, 0.5, "It is what may be left for the last update.")
    if not isinstance(loop.body, Step):
        raise TypeError(f"loop must be that of an encoder or decoder, got {shown(loop.body)} as its body. See above.")
    body, rule = Pondered(loop.body, dim, bias, epsilon), Spent(epsilon)
    return loop.replace(body=body, rows=1, init=begun, update=updates.Replace(), halt=rule, readout=Answer())


class Pondered(nn.Module):
    """The body of `tensor2tensor_act`: a step of all tokens, and its share in each token's answer."""

    def __init__(self, step: Step, dim: int, bias: float, epsilon: float):
        super().__init__()
        self.step = step
        self.epsilon = epsilon
        self.head = nn.Linear(dim, 1)
        nn.init.constant_(self.head.bias, bias)

    def forward(self, state: dict[str, Tensor], context: Context, index: int) -> dict[str, Tensor]:
        told, spent = self.step.told(state["state"], context, index), state["probability"]
        new = self.step.block(told, context, index)
        share = torch.sigmoid(self.head(told)[..., 0]).to(spent)
        running = spent < 1
        stops = running & (spent + share > 1 - self.epsilon)
        rest = (1 - spent) * stops
        share = torch.where(stops, rest, share * running)
        return {
            "state": new,
            "value": torch.lerp(state["value"], new.to(spent), share[..., None]),
            "probability": torch.where(stops, 1.0, spent + share),  # exactly 1, which a rounded sum may miss
            "remainder": state["remainder"] + rest,
            "updates": state["updates"] + running,
        }


def begun(context: Context) -> dict[str, Tensor]:
    """The state before the first step. Shapes: state, value (B, T, D), the others (B, T)."""
    x = tree.content(context)
    value = readouts.blank(x)
    return {"state": x, "value": value, **dict.fromkeys(("probability", "remainder", "updates"), value[..., 0])}


@dataclass(frozen=True)
class Spent:
    """Stop a sequence when all its tokens have halted."""

    epsilon: float
    learned, stops, mixes = True, True, False  # learned: by the head in the body

    def start(self, state: State, rows: Rows) -> Rows:
        return rows

    def __call__(self, old: State, new: State, memory: Rows, index: int) -> tuple[Verdict, Rows]:
        least = -memory.largest(-new["probability"])
        return hard(least >= 1 - self.epsilon, least), memory


@dataclass(frozen=True)
class Answer:
    """The value that was mixed in the state."""

    weighted = True

    def start(self, state: State, rows: Rows) -> None: ...
    def fold(self, folded: None, state: State, verdict: Verdict, alive: Tensor) -> None: ...
    def finish(self, folded: None, carry: Carry) -> Tensor:
        return carry.state["value"].to(carry.state["state"].dtype)
