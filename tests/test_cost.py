"""What `observe.cost` says from shapes is what PyTorch counts while real loops run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from loopaware import Loop, body, execute, grad, halt, init, observe, readout, update
from loopaware import nn as blocks
from loopaware.models import HRM, TRM, EquilibriumTransformer, Transformer, UniversalDecoder, UniversalEncoder
from loopaware.models.trm import tiny_net
from loopaware.models.universal import Coordinates, tied_block
from loopaware.observe.cost import counted
from test_compacted import Scripted, reported

BATCH, LENGTH, DIM, HEADS, STEPS = 5, 7, 12, 3, 6


class Nested(nn.Module):
    """A loop inside a body, which always takes its three steps."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        self.loop = Loop(blocks.Block(DIM, HEADS), 3)

    def forward(self, state: Tensor, context: Any, index: int) -> Tensor:
        return self.loop(self.before(state)).value


def block(**options: Any) -> blocks.Block:
    return blocks.Block(DIM, HEADS, **options)


def stepped(made: Any, **parts: Any) -> Callable[[], Loop]:
    return lambda: Loop(made(), STEPS, **parts)


class Case(NamedTuple):
    """A loop, and the entries of the context that it is given."""

    make: Callable[[], Loop]
    reads: tuple[str, ...] = ("x",)


def waves() -> blocks.Sinusoidal:
    return blocks.Sinusoidal(DIM)


CASES = {
    "block": Case(stepped(block)),
    "causal": Case(stepped(lambda: block(causal=True, positions=blocks.Rotary(DIM // HEADS)))),
    "padded": Case(stepped(lambda: block(placement=blocks.Post())), ("x", "mask")),
    "pairs": Case(stepped(lambda: block(causal=True)), ("x", "pairs")),
    "relative": Case(stepped(lambda: block(positions=blocks.Relative(HEADS, 2)))),
    "cross": Case(stepped(lambda: block(cross=True)), ("x", "memory", "memory_mask")),
    "swiglu": Case(stepped(lambda: block(feedforward=blocks.SwiGLU(DIM), placement=blocks.Sandwich()))),
    "stack": Case(stepped(lambda: body.Stack(block(), block(hidden=5)))),
    "added": Case(stepped(lambda: body.Injected(block(), blocks.Add()))),
    "gated": Case(stepped(lambda: body.Injected(block(), blocks.Gated(DIM)))),
    "looking": Case(stepped(lambda: body.Injected(block(), blocks.CrossAttention(DIM, HEADS))), ("x", "mask")),
    "timed": Case(stepped(lambda: body.Timed(block(), waves()))),
    "nested": Case(stepped(Nested)),
    "convolution": Case(stepped(lambda: body.Called(Convolution()))),
    "gru": Case(stepped(block, update=update.GRU(DIM), init=init.Learned(DIM))),
    "transformer": Case(stepped(lambda: Transformer(3, DIM, HEADS)), ("x", "mask")),
    "encoder": Case(
        lambda: UniversalEncoder(tied_block(DIM, HEADS), STEPS, signal=Coordinates(waves(), waves())).loop,
        ("x", "mask"),
    ),
    "decoder": Case(
        lambda: UniversalDecoder(tied_block(DIM, HEADS, decoder=True), STEPS).loop, ("x", "mask", "memory")
    ),
    "trm": Case(lambda: TRM(nn.Identity(), tiny_net(DIM, HEADS), DIM, 4, STEPS, inner=2, outer=2).loop),
    "hrm": Case(lambda: HRM(nn.Identity(), *(tiny_net(DIM, HEADS) for _ in range(2)), DIM, 4, STEPS).loop),
    "equilibrium": Case(lambda: EquilibriumTransformer(DIM, HEADS, STEPS, grad=grad.Full()).loop, ("x", "mask")),
}


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, state: Tensor) -> Tensor:
        return torch.tanh(self.layer(state.mT)).mT


def context(reads: tuple[str, ...]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {
        "x": torch.randn(BATCH, LENGTH, DIM),
        "mask": blocks.padding(torch.tensor([7, 3, 5, 1, 6]), LENGTH),
        "pairs": torch.rand(BATCH, LENGTH, LENGTH) < 0.7,
        "memory": torch.randn(BATCH, 4, DIM),
        "memory_mask": torch.rand(BATCH, 4) < 0.7,
    }
    return {name.replace("pairs", "mask"): found[name] for name in reads}


@pytest.mark.parametrize("name", CASES)
def test_dense_is_what_a_run_without_halting_counts(name: str):
    case = CASES[name]
    loop = case.make().replace(halt=halt.Never(), readout=readout.Last(), execute=execute.Eager())
    inputs = context(case.reads)
    with torch.no_grad():
        operations, out = counted(loop, inputs)
    assert out.steps.unique().tolist() == [STEPS] and operations > 0
    assert observe.cost(loop, inputs).dense == pytest.approx(operations, rel=0.01)


@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("name", CASES)
def test_spent_is_what_a_compacted_run_of_sequences_counts(name: str, every: bool):
    """Sequences leave the batch; under a readout of every state they leave the body alone."""
    case = CASES[name]
    ends = torch.tensor([1, 4, 2, STEPS, 2])
    read = readout.Every() if every else readout.Last()
    loop = case.make().replace(halt=Scripted(ends), rows=1, readout=read)
    inputs = context(case.reads)
    with torch.no_grad():
        _, ran = reported(loop, inputs, break_even=0)
        operations, _ = counted(loop.replace(execute=execute.Compacted(break_even=0)), inputs)
    cost = observe.cost(loop, inputs)
    assert ran.body == (5, 4, 2, 2, 1, 1) and set(ran.rest) == ({5} if every else {5, 4, 2, 1})
    assert cost.spent(ran) == pytest.approx(operations, rel=0.01) and operations < 0.7 * cost.dense


TOKENWISE = {
    name: CASES[name] for name in ("block", "relative", "causal", "swiglu", "added", "timed", "encoder", "stack")
}
TOKENWISE |= {
    "cross": CASES["cross"],
    "mixed": Case(stepped(lambda: body.Injected(block(), blocks.CrossAttention(DIM, HEADS)))),
    "padded": CASES["padded"],
}


@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_spent_is_what_a_compacted_run_of_tokens_counts(name: str, every: bool):
    """Keys are made for tokens that have stopped too, once where they are held, at every step where a signal moves
    them; queries are padded to the fullest sequence; all but the last body of a stack is run for all tokens.
    """
    ends = torch.randint(1, STEPS + 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    read = readout.Every() if every else readout.Last()
    loop, inputs = (
        TOKENWISE[name].make().replace(halt=Scripted(ends), rows=2, readout=read),
        context(TOKENWISE[name].reads),
    )
    inputs.pop("mask", None)
    with torch.no_grad():
        _, ran = reported(loop, inputs, break_even=0)
        operations, _ = counted(loop.replace(execute=execute.Compacted(break_even=0)), inputs)
    cost = observe.cost(loop, inputs)
    load = [sum(each) for each in zip(*ran.loads, strict=True)]
    assert load[0] == ends.sum() and load[0] < min(load[1:]) and sum(ran.rest) >= load[3]
    assert sum(cost.load) * cost.rows == pytest.approx(cost.body, rel=1e-12) and min(cost.load) >= 0
    assert cost.spent(ran) == pytest.approx(operations, rel=1e-9) and operations < cost.dense


@pytest.mark.parametrize("biased", [False, True], ids=["fused", "with a learned bias"])
def test_attention_is_seen_whatever_kernel_runs_it(biased: bool):
    bias = nn.Parameter(torch.zeros(LENGTH, LENGTH)) if biased else None

    def attended(state: Tensor) -> Tensor:
        heads = state[:, None]
        return scaled_dot_product_attention(heads, key=heads, value=heads, attn_mask=bias)[:, 0]

    cost = observe.cost(Loop(body.Called(attended), STEPS), torch.zeros(BATCH, LENGTH, DIM))
    assert cost.attention == cost.body == 2 * 2 * BATCH * LENGTH**2 * DIM
    assert cost.key_value_bytes == 2 * 2 * BATCH * LENGTH * DIM * 4
