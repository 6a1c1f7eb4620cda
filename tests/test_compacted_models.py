"""Models leave out tokens that have stopped, and stay the models they are: values, gradients, keys that are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopaware import Loop, body, execute, grad, halt, observe, readout, testing, tokens
from loopaware import nn as blocks
from loopaware.counting import counter
from loopaware.models import Transformer, UniversalDecoder, UniversalEncoder
from loopaware.models.universal import Coordinates, Step, tensor2tensor_act, tensor2tensor_signal, tied_block
from test_compacted import DIM, ONLY, Case, Mixing, Scripted, compared, reported

STEPS = 6
LENGTHS = torch.tensor([7, 3, 0, 1, 5])


def waves() -> blocks.Sinusoidal:
    return blocks.Sinusoidal(DIM)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "stack": lambda: Transformer(3, DIM, 2),
    "one block": lambda: Transformer(1, DIM, 2, placement=blocks.Post(), norm=nn.RMSNorm),
    "causal stack": lambda: Transformer(2, DIM, 2, causal=True, positions=blocks.Rotary(DIM // 2)),
    "encoder": lambda: Step(tied_block(DIM, 2, hidden=5), Coordinates(waves(), waves())),
    "positions alone": lambda: Step(tied_block(DIM, 2, hidden=5), Coordinates(waves(), shift=3)),
    "no signal": lambda: Step(tied_block(DIM, 2, hidden=5), None),
    "learned steps": lambda: Step(tied_block(DIM, 2, placement=blocks.Pre()), tensor2tensor_signal(DIM, STEPS)),
    "injected stack": lambda: body.Injected(Transformer(2, DIM, 2), blocks.Add()),
    "injected encoder": lambda: body.Injected(
        Step(tied_block(DIM, 2, hidden=5), Coordinates(None, waves())), blocks.Add()
    ),
    "decoder": lambda: Step(tied_block(DIM, 2, hidden=5, decoder=True), Coordinates(waves(), waves())),
}
HOLDING = ("one block", "positions alone", "no signal", "injected stack", "injected encoder")


def context(batch: int = 5, length: int = 7) -> dict[str, Tensor]:
    """What all of these bodies may read, in double precision."""
    torch.manual_seed(3)
    return {
        "x": torch.randn(batch, length, DIM).double(),
        "mask": blocks.padding(LENGTHS[:batch], length),
        "memory": torch.randn(batch, 2, DIM).double(),
        "memory_mask": torch.rand(batch, 2) < 0.7,
        "start": torch.tensor([0, 3, 1, 2, 0])[:batch],
    }


@pytest.mark.parametrize("name", BODIES)
def test_bodies_can_be_run_in_part(name: str):
    testing.check_body(BODIES[name]().double(), torch.randn(3, 7, DIM).double(), context(3))


@pytest.mark.parametrize("part", [ONLY, execute.Compacted(break_even=2e3)], ids=["always", "where it pays"])
@pytest.mark.parametrize("rule", [grad.Full(), grad.Checkpointed(2)], ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_values_and_gradients_are_those_of_the_masked_run(name: str, rule: Any, part: execute.Compacted):
    """With stops that were written down, and with a learned rule that mixes all states; padded."""
    inputs = context()
    for stop, mixed in (
        (Scripted(torch.randint(1, STEPS + 2, (5, 7))), readout.Last()),
        (halt.ACT(halt.Linear(DIM, bias=-0.5)), readout.Weighted()),
    ):
        loop = Loop(BODIES[name](), STEPS, rows=2, halt=stop, readout=mixed).double()
        compared(Case(loop, inputs, inputs["mask"]), part, rule)


@pytest.mark.parametrize("name", BODIES)
def test_only_tokens_that_are_alive_are_run(name: str):
    """Counted by PyTorch: a quarter of the tokens goes on for ten steps, in every sequence."""
    ends = torch.ones(5, 8, dtype=torch.long)
    ends[:, :2] = 10
    inputs = context(5, 7) | {"x": torch.randn(5, 8, DIM).double(), "mask": torch.ones(5, 8, dtype=torch.bool)}
    loop = Loop(BODIES[name](), 10, rows=2, halt=Scripted(ends)).double()
    _, ran = reported(loop, inputs, break_even=0)
    assert ran.body == (40, *[10] * 9) and not ran.reason
    counts, cost = [], observe.cost(loop, inputs)
    for own in (loop, loop.replace(execute=ONLY)):
        with torch.no_grad(), counter() as seen:
            own(inputs)
        counts.append(seen.get_total_flops())
    assert counts[0] == cost.dense > counts[1] == pytest.approx(cost.spent(ran), rel=1e-9)


@pytest.mark.parametrize("name", BODIES)
def test_keys_are_held_where_nothing_moves_them(name: str):
    made: Any = BODIES[name]().double()
    run = torch.rand(5, 7) < 0.5
    _, held = made.some(context()["x"], context(), 1, tokens.Tokens(run), None)
    assert (held is not None) == (name in HOLDING)


def test_who_can_be_run_in_part():
    assert all(make().partial for make in BODIES.values())
    mixing = blocks.Block(DIM, 2, feedforward=Mixing())
    stack = Transformer(2, DIM, 2)
    stack.norm = Mixing()
    assert not stack.partial and not Step(mixing, None).partial
    stack = Transformer(2, DIM, 2)
    stack.blocks[-1].register_forward_hook(lambda *call: None)
    assert not stack.partial
    first = Transformer(2, DIM, 2)
    first.blocks[0].register_forward_hook(lambda *call: seen.append(call[2].shape))
    seen: list[Any] = []
    loop = Loop(first, 3, rows=2, halt=Scripted(torch.tensor([[1, 2, 3]])), execute=ONLY)
    loop(torch.randn(1, 3, DIM))
    assert first.partial and seen == [(1, 3, DIM)] * 3, "blocks before the last are run for all, hooks too"


@pytest.mark.parametrize("training", [True, False])
def test_whole_models_are_as_they_were(training: bool):
    """Encoder and decoder with ACT, positions that start late in training, and the same parts compacted."""
    rule = lambda: halt.ACT(halt.Linear(DIM, bias=-0.5))  # noqa: E731 - one for each model
    signal = Coordinates(waves(), waves(), shift=4)
    encoder = UniversalEncoder(tied_block(DIM, 2), STEPS, signal=signal, halt=rule()).double().train(training)
    decoder = UniversalDecoder(tied_block(DIM, 2, decoder=True), STEPS, signal=signal, halt=rule(), norm=nn.Identity())
    decoder = decoder.double().train(training)
    inputs, found = context(), []
    for part in (execute.Eager(), ONLY):
        for model in (encoder, decoder):
            model.loop = model.loop.replace(execute=part)
        torch.manual_seed(1)
        out = encoder(inputs["x"], inputs["mask"])
        both = decoder(inputs["x"], out.value, inputs["mask"], inputs["mask"])
        weights = [*encoder.parameters(), *decoder.parameters()]
        found.append((out[:3], both[:3], torch.autograd.grad(both.value.square().sum(), weights)))
    assert found[0][0][1].unique().numel() > 2, "tokens stop at different steps"
    testing.assert_close(found[1], found[0], "the same model")


def test_halting_as_in_tensor2tensor_leaves_sequences_out():
    """There halted tokens go on being updated, so whole sequences leave and no token does."""
    torch.manual_seed(0)
    loop = tensor2tensor_act(UniversalEncoder(tied_block(DIM, 2), 9).loop, DIM, bias=-1.0).double()
    with torch.no_grad():
        loop.body.head.weight.mul_(3)
    inputs = context()
    out, ran = reported(loop, inputs, break_even=0)
    testing.assert_close(out[:3], loop(inputs)[:3], "the same answer")
    assert not getattr(loop.body, "partial", False) and len(set(out.steps.tolist())) > 1
    assert sum(ran.body) == out.steps.sum()
