"""Every exported part keeps the laws of its slot, alone and in a loop."""

from __future__ import annotations

import importlib

import pytest
import torch

from loopaware import Loop, Rows, body, execute, grad, halt, init, readout, testing, update
from parts import DIM, PARTS, Part, half, mixing

SLOTS = ("body", "init", "update", "halt", "readout", "grad", "execute")
every_part = pytest.mark.parametrize("part", [part for part in PARTS if part.slot in SLOTS], ids=str)


@pytest.fixture
def context() -> torch.Tensor:
    return (
        torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    )


# Their state is a pair.
TWO_HALVES = {"Coupled", "Halves", "Reversible"}


def looped(part: Part, rows: int) -> Loop:
    """A loop in which the part stands in its slot, rows halt at different steps, and nothing else is special."""
    torch.manual_seed(0)
    parts = {"body": mixing(), "halt": halt.Patience(halt.Converged(rtol=0.05), times=1)}
    if part.name in TWO_HALVES:
        parts.update(body=body.Coupled(half(), half()), init=init.Halves())
    if part.slot == "halt":
        parts["readout"] = readout.Weighted()
    return Loop(**{**parts, part.slot: part.make()}, max_steps=7, rows=rows)


def some(slot: str):
    return pytest.mark.parametrize("part", [part for part in PARTS if part.slot == slot], ids=str)


# What is exported by `nn` and acts on no state by itself: its tests are in test_nn.py, test_stability.py and
# test_convert.py, with the equations.
BESIDE = {
    "AttentionPositions",
    "Relative",
    "Rotary",
    "LearnedPositions",
    "LowRank",
    "Sinusoidal",
    "adjacency",
    "causal",
    "held",
    "padding",
    "spectral_norm",
}
# Whole models are called with their own input and are no bodies: tests of their own, named after the file.
WHOLE = {"HRM", "TRM", "Albert", "EquilibriumTransformer", "PonderNet"}
WHOLE |= {"UniversalDecoder", "UniversalEncoder", "UniversalTransformer"}
# Solvers have a state of their own and the context of a system: the same checks, and more, in test_solvers.py.
SOLVING = {"ConjugateGradient", "Corrected", "GaussSeidel", "GradientDescent", "Iterate", "Jacobi", "Newton"}
SOLVING |= {"Richardson", "SOR"}
GRAPHED = {"Graphed"}  # has no CPU; test_graphed.py
AROUND = {"Placement", "Pre", "Post", "Sandwich", "Residual"}


def test_every_exported_part_has_a_row():
    exported = {(slot, name) for slot in SLOTS for name in importlib.import_module(f"loopaware.{slot}").__all__}
    exported -= {("body", name) for name in SOLVING} | {("execute", name) for name in GRAPHED}
    exported |= {("nn", name) for name in set(importlib.import_module("loopaware.nn").__all__) - BESIDE - AROUND}
    exported |= {("models", name) for name in set(importlib.import_module("loopaware.models").__all__) - WHOLE}
    assert exported == {(part.slot, part.name) for part in PARTS}


def as_body(part: Part) -> torch.nn.Module:
    """A block or fusion as the body of a loop."""
    made = part.make()
    if part.name in ("Block", "Transformer"):
        return made
    if part.name in ("Add", "Concat", "Gated", "Diagonal", "CrossAttention"):
        return body.Injected(body.Called(torch.nn.Identity()), made)
    return body.Called(made)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("part", [part for part in PARTS if part.slot in ("nn", "models")], ids=str)
def test_blocks_and_models_keep_the_laws_as_bodies(part: Part, rows: int, context: torch.Tensor):
    torch.manual_seed(0)
    block = as_body(part)
    testing.check_body(block, context.flip(0), context)
    loop = Loop(block, 5, rows=rows, update=update.Damped(0.5), halt=halt.Converged(rtol=0.3))
    testing.check_loop(loop, context)
    torch._dynamo.reset()
    testing.check_traceable(loop, context)


@pytest.mark.parametrize("name", ["Block", "CrossAttention", "Transformer"])
def test_padding_is_not_attended_to(name: str, context: torch.Tensor):
    """A padded sequence in a batch equals the sequence alone without its padding."""
    torch.manual_seed(0)
    block = as_body(next(part for part in PARTS if part.name == name))
    loop = Loop(block, 5, update=update.Damped(0.5), halt=halt.Converged(rtol=0.3))
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    padded = torch.where(mask[..., None], context, torch.full_like(context, 7.0))
    out = loop({"x": padded, "mask": mask}, mask=mask)
    for item, length in enumerate([5, 3, 1]):
        alone = loop({"x": context[item : item + 1, :length]})
        testing.assert_close(alone.value, out.value[item : item + 1, :length], "padding changes nothing")
        assert alone.steps.item() == out.steps[item].item()


def refused(part: Part, rows: int) -> bool:
    return part.name == "Grouped" and rows == 1


@pytest.mark.parametrize("rows", [1, 2])
@every_part
def test_the_loop_keeps_its_laws(part: Part, rows: int, context: torch.Tensor):
    if refused(part, rows):
        with pytest.raises(ValueError, match="rows must be at least 2 for halt.Grouped, got 1"):
            looped(part, rows)(context)
        return
    testing.check_loop(looped(part, rows).eval(), context)


@every_part
def test_rows_that_are_padding_change_nothing(part: Part, context: torch.Tensor):
    tokens = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    testing.check_loop(looped(part, 2).eval(), context, mask=tokens)
    if not refused(part, 1):
        testing.check_loop(looped(part, 1).eval(), context, mask=torch.tensor([True, False, True]))
        testing.check_loop(looped(part, 1).eval(), context, mask=tokens)


@every_part
def test_the_unrolled_loop_is_traced_whole(part: Part, context: torch.Tensor):
    torch._dynamo.reset()
    testing.check_traceable(looped(part, 2).eval(), context)


@some("init")
def test_init(part: Part, context: torch.Tensor):
    testing.check_init(part.make(), context)
    testing.check_init(part.make(), {"x": context, "mask": None})


@some("body")
def test_body(part: Part, context: torch.Tensor):
    state = init.Halves()(context.flip(0)) if part.name in TWO_HALVES else context.flip(0)
    testing.check_body(part.make(), state, context)


@some("update")
def test_update(part: Part, context: torch.Tensor):
    testing.check_update(part.make(), context, context.flip(0).tanh())


@pytest.mark.parametrize("rows", [1, 2])
@some("halt")
def test_halt(part: Part, rows: int, context: torch.Tensor):
    if refused(part, rows):
        return
    rule = part.make()
    states = [context * (1 + 0.5**step) for step in range(9)]
    testing.check_halt(rule, states, Rows(rows))
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    testing.check_halt(rule, states, Rows(rows, mask))
    padded = [
        torch.where(mask[..., None], state, torch.full_like(state, 9.0 + step)) for step, state in enumerate(states)
    ]
    torch.manual_seed(0)
    clean = testing.parts.judged(rule, states, Rows(rows, mask))
    torch.manual_seed(0)
    again = testing.parts.judged(rule, padded, Rows(rows, mask))
    real = mask if rows == 2 else mask.any(1)
    for verdict, other in zip(again, clean, strict=True):
        testing.assert_close(verdict.score[real], other.score[real], "padding changes no verdict")
        assert torch.equal(verdict.stop[real], other.stop[real])


@some("readout")
def test_readout(part: Part, context: torch.Tensor):
    for rows in (1, 2):
        testing.check_readout(part.make(), looped(Part("halt", "", lambda: halt.Converged(rtol=0.05)), rows), context)


@some("grad")
def test_grad(part: Part, context: torch.Tensor):
    for rule in (halt.Never(), halt.Converged(rtol=0.05), halt.Converged(rtol=9.0)):
        for rows in (1, 2):
            testing.check_grad(part.make(), looped(part, rows).replace(halt=rule), context)


@some("execute")
def test_execute(part: Part, context: torch.Tensor):
    for rows in (1, 2):
        testing.check_execute(part.make(), Loop(mixing(), 7, rows=rows, halt=halt.Converged(rtol=0.05)), context)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("last", [1, 2, 4])
@pytest.mark.parametrize("rtol", [0.3, 0.05, 0.01])
def test_truncated_is_the_last_steps_of_every_row(last: int, rtol: float, rows: int, context: torch.Tensor):
    """Against the naive twin, which cuts each row by itself, whatever its neighbours do."""
    loop = Loop(mixing(), 7, rows=rows, halt=halt.Converged(rtol=rtol), execute=execute.Unrolled())
    got = loop.replace(grad=grad.Truncated(last=last))(context)
    expected = testing.naive(loop, context, attached=last)
    testing.assert_close(got[:3], expected[:3], "values are those of a plain run")
    weights = list(loop.parameters())
    pair = [torch.autograd.grad(output.value.square().sum(), weights) for output in (got, expected)]
    testing.assert_close(pair[0], pair[1], "the gradient is that of each row's last steps")


def test_truncated_replays_dropout(context: torch.Tensor):
    torch.manual_seed(3)
    loop = Loop(body.Stack(mixing(), body.Called(torch.nn.Dropout(0.2))), 7, halt=halt.Converged(rtol=0.6))
    torch.manual_seed(5)
    plain = loop(context)
    torch.manual_seed(5)
    cut = loop.replace(grad=grad.Truncated(last=1))(context)
    assert plain.halted.any()
    testing.assert_close(cut[:3], plain[:3], "the same numbers are drawn")


def test_loops_nest(context: torch.Tensor):
    inner = Loop(mixing(), 4, rows=2, halt=halt.Converged(rtol=0.3))
    outer = Loop(body.Called(Inner(inner)), 3, halt=halt.Converged(rtol=0.05))
    testing.check_loop(outer, context)


class Inner(torch.nn.Module):
    def __init__(self, loop: Loop):
        super().__init__()
        self.loop = loop

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.loop(state).value
