"""Places that are filled again change nothing but the work; whoever reads the number of a step is told so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from torch import Tensor

from loopaware import Loop, execute, grad, halt, observe, readout, serve, testing, update
from loopaware import nn as blocks
from loopaware.protocols import Carry
from loopaware.serve.continuous import Anywhere
from parts import mixing

DIM = 6
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
RULES = [
    halt.Converged(rtol=0.3),
    halt.Patience(halt.Converged(rtol=0.5), times=2),
    halt.ACT(halt.Residual(level=0.0)),
    halt.KL(lambda state: state, 3e-2),
    halt.Never(),
]


def loud(count: int) -> Tensor:
    scales = torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0, 0.2, 9.0])[:count]
    return torch.randn(count, 5, DIM).double() * scales[:, None, None]


@quick
@given(
    places=draw.integers(1, 8),
    rows=draw.sampled_from([1, 2]),
    rule=draw.sampled_from(RULES),
    moving=draw.sampled_from(["damped", "momentum", "lstm"]),
    gradient=draw.sampled_from([grad.Full(), grad.Checkpointed(2), grad.Truncated(2)]),
    hidden=draw.booleans(),
)
def test_filled_places_change_nothing(places: int, rows: int, rule: Any, moving: str, gradient: Any, hidden: bool):
    torch.manual_seed(places)
    moved = {"damped": lambda: update.Damped(0.5), "momentum": lambda: update.Momentum(0.3)}.get(
        moving, lambda: update.LSTM(DIM)
    )()
    mixed = readout.Weighted() if rule.mixes else readout.Last()
    loop = Loop(mixing(), 7, rows=rows, update=moved, halt=rule, readout=mixed).double()
    loop = loop.replace(grad=grad.Full() if rule.learned else gradient)
    own = loop.replace(execute=serve.Continuous(places))
    x, mask = loud(7), torch.rand(7, 5) < 0.7 if hidden else None
    expected, got = loop(x, mask=mask), own(x, mask=mask)
    testing.assert_close(got, expected, "the result is that of a plain run")
    pair = [torch.autograd.grad(out.value.sin().sum(), list(loop.parameters())) for out in (got, expected)]
    testing.assert_close(pair[0], pair[1], "the gradients are those of a plain run")
    part = own(x, mask=mask, max_steps=3)
    testing.assert_close(own(x, carry=part.carry)[:3], expected[:3], "resumed, it is the same run")


def test_continuous_keeps_the_law_of_its_slot():
    for rows in (1, 2):
        loop = Loop(mixing(), 7, rows=rows, halt=halt.Converged(rtol=0.05))
        testing.check_execute(serve.Continuous(2), loop, loud(5).float())


@pytest.mark.parametrize("moving", [update.Momentum(0.1), update.Dropout(update.Damped(0.5), 0.3)], ids=str)
def test_gradients_at_rest(moving: Any):
    """What a step does not move must stay the very same tensor, else the solver takes a dropout mask for a state."""
    loop = Loop(mixing(), 60, update=moving, halt=halt.Converged(rtol=1e-6), grad=grad.Implicit()).double()
    pair = []
    for part in (execute.Eager(), serve.Continuous(2)):
        torch.manual_seed(1)
        out = loop.replace(execute=part)(loud(5))
        pair.append((out[:3], torch.autograd.grad(out.value.sin().sum(), list(loop.parameters()))))
    testing.assert_close(pair[1], pair[0], "the same place, the same gradient")


def test_no_more_than_its_places_and_no_stopped_sequence_is_run():
    seen: list[int] = []

    def halved(state: Tensor, context: Any, index: int) -> Tensor:
        seen.append(len(state))
        return state / 2

    x = torch.tensor([1.0, 8.0, 0.3, 2.0, 0.1, 4.0, 1.0])[:, None]
    loop = Loop(halved, 99, halt=halt.Converged(atol=0.1, rtol=0.0))
    expected = loop(x)
    seen.clear()
    out = loop.replace(execute=serve.Continuous(3))(x)
    testing.assert_close(out[:3], expected[:3], "the result is that of a plain run")
    assert out.steps.tolist() == [4, 7, 2, 5, 1, 6, 4] and max(seen) == 3 and sum(seen) == 29 and len(seen) == 11


def test_nothing_to_run():
    loop = Loop(mixing(), 3, execute=serve.Continuous(2)).double()
    out = loop(loud(3), mask=torch.zeros(3, 5).bool())
    assert out.steps.tolist() == [0, 0, 0] and torch.equal(loop(loud(3), carry=out.carry).value, out.value)
    done = loop(loud(3))
    assert done.carry.index == 3 and torch.equal(loop(loud(3), carry=done.carry).value, done.value)


def test_a_state_that_is_not_finite_is_named():
    loop = Loop(lambda state, context, index: state * 1e200, 3, execute=serve.Continuous(2))
    with pytest.raises(FloatingPointError, match=r"after 3 steps in rows \[0, 1, 2\]"):
        loop(torch.ones(3, 1).double())
    free = loop.replace(execute=serve.Continuous(2, check=False))
    assert free(torch.ones(3, 1).double()).value.isinf().all()


def test_what_sequences_share_is_named():
    def told(state: Tensor, context: Any, index: int) -> Tensor:
        return state + context["table"].sum()

    context = {"x": torch.ones(3, 1), "table": torch.eye(3)}
    with pytest.raises(ValueError, match="the context's 'table' must not be square and of the batch's size"):
        Loop(told, 2, execute=serve.Continuous(2))(context)
    loop = Loop(told, 2, execute=serve.Continuous(2, shared=("table",)))
    assert loop(context).value.flatten().tolist() == [7.0, 7.0, 7.0]


READERS = {
    "a step signal": lambda index: blocks.Sinusoidal(DIM)(index),
    "learned signals": lambda index: blocks.LearnedPositions(5, DIM)(index + 1),
    "a table": lambda index: torch.ones(5)[index],
    "a list": lambda index: [1, 2, 3][index],
    "a filled tensor": lambda index: torch.full((2,), index),
    "a product": lambda index: torch.ones(2) * index,
    "a difference": lambda index: 1.0 - index,
    "a comparison": lambda index: index == 0,
    "a truth": lambda index: not index,
    "a key": lambda index: {0: 1}.get(index),
    "a text": lambda index: f"{index}",
}


@pytest.mark.parametrize("name", READERS)
def test_who_reads_the_number_of_a_step_is_refused(name: str):
    loop = Loop(lambda state, context, index: (READERS[name](index), state)[1], 3)
    assert loop(torch.ones(3, 1)).steps.tolist() == [3, 3, 3]
    with pytest.raises(TypeError, match=r"the number of a step must not be read where .* Take execute\.Compacted\(\)"):
        loop.replace(execute=serve.Continuous(2))(torch.ones(3, 1))


def test_rules_that_draw_by_the_number_of_a_step_are_refused():
    loop = Loop(mixing(), 3, halt=halt.Ponder(halt.Linear(DIM)), readout=readout.Weighted())
    with pytest.raises(TypeError, match="the number of a step must not be read"):
        loop.eval().replace(execute=serve.Continuous(2))(torch.ones(3, 5, DIM))


def test_the_driver_may_count():
    carry = Loop(mixing(), 3).start(torch.ones(1, 5, DIM))
    assert isinstance(Carry(*carry)._replace(index=Anywhere()).index + 1, Anywhere)  # pyright: ignore[reportArgumentType]


def test_recordings_want_another_execution():
    loop = Loop(mixing(), 3, execute=serve.Continuous(2))
    with pytest.raises(ValueError, match=r"or execute\.Eager\(\)"), observe.record(loop):
        loop(torch.ones(3, 5, DIM))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: serve.Continuous(0), "places must be at least 1, got 0"),
        (
            lambda: Loop(mixing(), 3, readout=readout.Stacked(), execute=serve.Continuous(2))(torch.ones(2, 3, DIM)),
            r"readout must fold nothing of a row after it has stopped .* got Stacked\(\)\. Take readout\.Last",
        ),
    ],
)
def test_what_cannot_be_filled_again_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
