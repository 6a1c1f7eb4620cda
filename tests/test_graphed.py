"""`execute.Graphed` with a stand-in for CUDA: what is copied, replayed, looked at and handed back."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from loopaware import Loop, body, execute, grad, halt, init, observe, readout, testing, tree, update
from loopaware import nn as blocks
from loopaware.execute import graphed
from parts import DIM, mixing

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Tape:
    """Keeps a step and takes it anew at every replay, between tensors that stay where they are, as a graph would."""

    made = 0
    captured = 0

    def __init__(self):
        Tape.made += 1

    def __call__(self, run, write):
        Tape.captured += 1
        with torch.random.fork_rng():
            out = run()

        def again() -> None:
            graphed.write(tuple(out), tuple(run()))
            write(out)

        return again, out


@pytest.fixture(autouse=True)
def counted():
    Tape.made = Tape.captured = 0


@pytest.fixture
def context() -> torch.Tensor:
    return torch.randn(3, 5, DIM) * torch.tensor([0.1, 1.0, 3.0])[:, None, None]


def pair(**parts) -> tuple[Loop, Loop]:
    """A loop whose rows stop at different steps, as a graph and as it comes."""
    plain = Loop(**{"body": mixing(), "max_steps": 7, "halt": halt.Converged(rtol=0.05), **parts}).eval()
    return plain.replace(execute=execute.Graphed(look=3, capture=Tape)), plain


def compare(fast: Loop, plain: Loop, context, **options) -> None:
    with torch.no_grad():
        torch.manual_seed(1)
        out = fast(context, **options)
        torch.manual_seed(1)
        expected = plain(context, **options)
    testing.assert_close(out[:3], expected[:3], "replayed steps equal the plain run")


PARTS = {
    "tokens": {"rows": 2},
    "weighted": {"halt": halt.ACT(halt.Linear(DIM, bias=-0.5)), "readout": readout.Weighted()},
    "memory": {"update": update.Momentum(0.3), "halt": halt.Patience(halt.Converged(rtol=0.1), times=2)},
    "cell": {"update": update.LSTM(DIM), "readout": readout.Tensor2Tensor()},
    "prediction": {"halt": halt.KL(torch.nn.Linear(DIM, 3), 1e-4)},
    "drawn by place and step": {"rows": 2, "halt": halt.Sampled(halt.Linear(DIM, bias=-1.0))},
    "a step signal": {"body": body.Timed(mixing(), lambda index: torch.ones(DIM) * index)},
    "a mask that is not drawn": {"update": update.Dropout(update.Damped(0.5), 0.3)},
    "two halves": {"body": body.Coupled(body.Called(torch.tanh), body.Called(torch.sin)), "init": init.Halves()},
    "never": {"halt": halt.Never()},
}


@pytest.mark.parametrize("name", PARTS)
def test_it_equals_the_plain_run(name: str, context: torch.Tensor):
    half = context[..., :4] if name == "two halves" else context
    if name == "two halves":
        PARTS[name]["halt"] = halt.Converged(rtol=0.05)
    fast, plain = pair(**PARTS[name])
    tokens = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    for given in (half, half.flip(0) * 0.5, half):
        compare(fast, plain, given)
        compare(fast, plain, given, mask=tokens)
    assert Tape.made == 2


def test_training_mode_keeps_what_is_drawn_once(context: torch.Tensor):
    fast, plain = pair(update=update.Dropout(update.Damped(0.5), 0.3))
    compare(fast.train(), plain.train(), context)


@pytest.mark.parametrize("kind", [readout.Every, readout.Stacked])
def test_states_of_all_steps_are_kept(kind: type, context: torch.Tensor):
    fast, plain = pair(readout=kind(), halt=halt.Never())
    compare(fast, plain, context)


def test_a_recording_is_that_of_the_plain_run(context: torch.Tensor):
    fast, plain = pair()
    with torch.no_grad():
        fast(context)
        with observe.record(fast, states=True) as tape:
            fast(context)
            fast(context.flip(0))
        fast(context)
        with observe.record(plain, states=True) as expected:
            plain(context)
            plain(context.flip(0))
    assert Tape.made == 1
    for got, other in zip(tape[""], expected[""], strict=True):
        taken = len(other.alive)
        testing.assert_close(got.steps, other.steps, "steps")
        for name in ("weights", "residuals", "alive", "distances"):
            series = getattr(got, name)
            testing.assert_close(series[:taken], getattr(other, name), name)
            assert name == "residuals" or not series[taken:].any()


class Inner(torch.nn.Module):
    def __init__(self, loop: Loop):
        super().__init__()
        self.loop = loop

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.loop(state).value


def test_loops_inside_are_recorded_at_every_step(context: torch.Tensor):
    """Which a captured step would not do: it runs their Python once."""
    inner = Loop(mixing(), 4, rows=2, execute=execute.Unrolled())
    fast, plain = pair(body=body.Called(Inner(inner)), max_steps=3, halt=halt.Never())
    compare(fast, plain, context)
    with torch.no_grad(), observe.record(fast) as tape:
        fast(context)
    assert [len(calls) for calls in tape.values()] == [1, 3]
    compare(fast, plain, context)
    assert Tape.made == 1


def test_it_looks_at_every_kth_step_only(context: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    looks = []
    monkeypatch.setattr(execute.Eager, "look", lambda self, carry: looks.append(carry.index) or bool(carry.alive.any()))
    loop = Loop(lambda state, x, index: state / 2, 99, halt=halt.Converged(atol=0.1, rtol=0.0))
    with torch.no_grad():
        out = loop.replace(execute=execute.Graphed(look=3, capture=Tape))(torch.ones(1, 2))
        assert (out.steps.item(), out.carry.index, looks) == (4, 6, [0, 3, 6])
        looks.clear()
        capped = loop.replace(execute=execute.Graphed(look=3, capture=Tape), max_steps=4)(torch.full((1, 2), 99.0))
        assert (capped.steps.item(), capped.carry.index, looks) == (4, 4, [0, 3, 4])
        assert not capped.halted.any() and capped.carry.alive.all()
    testing.assert_close(out.value, torch.full((1, 2), 0.0625), "rows that have stopped stay as they are")


def test_a_step_is_captured_once_for_each_index_and_kind_of_input(context: torch.Tensor):
    fast, plain = pair(halt=halt.Never())
    for given in (context, context + 1, context[:2], context, context[:2]):
        compare(fast, plain, given)
    assert (Tape.made, Tape.captured) == (2, 14)
    compare(fast.double(), plain, context.double())
    assert (Tape.made, Tape.captured) == (3, 21)


def test_a_cut_loop_goes_on(context: torch.Tensor):
    fast, plain = pair(update=update.Momentum(0.3), halt=halt.Patience(halt.Converged(rtol=0.1), times=2))
    with torch.no_grad():
        whole = plain(context)
        for cut in range(1, 7):
            piece = fast(context, max_steps=cut)
            testing.assert_close(fast(context, carry=piece.carry)[:3], whole[:3], f"cut at step {cut}")


def test_what_is_returned_is_never_written_again(context: torch.Tensor):
    fast, _ = pair(readout=readout.Every(), update=update.Momentum(0.3))
    with torch.no_grad():
        first = fast(context)
        kept = copy.deepcopy(tuple(first))
        fast(context.flip(0) * 3)
    testing.assert_close(tuple(first), kept, "a later run writes elsewhere")


def test_what_no_step_makes_anew_is_handed_on(context: torch.Tensor):
    fast, _ = pair(update=update.Dropout(update.Damped(0.5), 0.3))
    with torch.no_grad():
        start = fast.train().start(context)
        out = fast(context, carry=start)
    assert out.carry.update[0] is start.update[0] and out.carry.state is not start.state


def test_weights_are_those_of_now(context: torch.Tensor):
    fast, plain = pair()
    compare(fast, plain, context)
    with torch.no_grad():
        for weight in plain.parameters():
            weight.mul_(0.5)
    compare(fast, plain, context)
    assert Tape.made == 1
    linear = plain.body.block.function.linear
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 0.5)
    compare(fast, plain, context)
    assert Tape.made == 2


def test_what_modules_hold_is_that_of_now(context: torch.Tensor):
    head = torch.nn.Linear(DIM, 3)
    fast, plain = pair(halt=halt.KL(head, 1e-3), body=body.Stack(mixing(), body.Called(torch.nn.Dropout(0.5))))
    compare(fast, plain, context)
    plain.halt.threshold = 1e-6
    compare(fast, plain, context)
    compare(fast.train(), plain.train(), context)
    compare(fast.eval(), plain.eval(), context)
    assert Tape.made == 4
    fast.halt = plain.halt = halt.Entropy(head, 1e-6)  # held alike, and another rule
    compare(fast, plain, context)
    fast.update = plain.update = update.Damped(0.5)
    compare(fast, plain, context)
    assert Tape.made == 6
    assert len(graphed.SHELVES[fast].graphs) == 1


class Counting(torch.nn.Module):
    """A body that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, state, context, index):
        self.calls += 1
        return state / 2


class Silent(Tape):
    """Never computes anything again, nor holds it."""

    def __call__(self, run, write):
        return lambda: None, run()


def test_counters_in_modules_do_not_capture_for_ever(context: torch.Tensor):
    loop = Loop(Counting(), 3, execute=execute.Graphed(capture=Silent))
    with torch.no_grad():
        for _ in range(3):
            loop(context)
            loop(context[:2])
    assert (Tape.made, loop.body.calls) == (2, 6)


class Late:
    """A rule that remembers the first state for ever, and hands out its memory as a score."""

    learned = stops = mixes = False

    def start(self, state, rows):
        return state, rows.zeros(state), state

    def __call__(self, old, new, memory, index):
        from loopaware import Verdict

        stop = memory[1] < -1
        return Verdict(stop, stop.to(old.dtype), memory[1]), (memory[0], memory[2].flatten(1).sum(1), old)


def test_memories_that_are_states_are_not_overwritten(context: torch.Tensor):
    fast, plain = pair(halt=Late())
    with torch.no_grad(), observe.record(fast) as got, observe.record(plain) as expected:
        one, two = fast(context), plain(context)
    testing.assert_close(one.carry.halt, two.carry.halt, "memories")
    testing.assert_close(got.only.scores, expected.only.scores, "scores")


def test_modes_may_be_mixed(context: torch.Tensor):
    fast, plain = pair()
    with torch.inference_mode():
        first = fast(context.clone())
    with torch.no_grad():
        second = fast(first.value)
    with torch.inference_mode():
        third = fast(context.clone())
    testing.assert_close(third[:3], first[:3], "the same run")
    compare(fast, plain, first.value)
    assert Tape.made == 1 and second.value.shape == first.value.shape


def test_mappings_may_come_in_any_order(context: torch.Tensor):
    blk = blocks.Block(DIM, 2, cross=True)
    fast, plain = pair(body=blk, halt=halt.Never(), max_steps=2)
    memory = torch.randn(3, 5, DIM)
    compare(fast, plain, {"x": context, "memory": memory})
    compare(fast, plain, {"memory": memory, "x": context})
    assert Tape.made == 1


def test_trees_as_states(context: torch.Tensor):
    """What a body proposes may have its entries in another order than the state."""

    def step(state, x, index):
        return {"b": tree.map(torch.sin, state["b"]), "a": state["b"][0]}

    fast, plain = pair(body=step, init=lambda x: {"a": x, "b": (x * 2, x.sum(-1))}, halt=halt.Never())
    with torch.no_grad():
        got, expected = fast(context).value, plain(context).value
    assert set(got) == {"a", "b"}
    for name in got:
        testing.assert_close(got[name], expected[name], "replayed steps equal the plain run")


def cyclic() -> Loop:
    """A loop whose body reaches the model that holds it."""
    model = torch.nn.ModuleList([torch.nn.Identity()])
    model.append(Loop(body.Called(lambda state: model[0](state)), 3, execute=execute.Graphed(capture=Silent)))
    return model[1]


def test_nothing_outlives_the_loop(context: torch.Tensor):
    loop = cyclic()
    with torch.no_grad():
        loop(context)
    gone = weakref.ref(loop)
    assert loop in graphed.SHELVES
    del loop
    gc.collect()
    assert gone() is None


def test_a_loop_copied_has_graphs_of_its_own(context: torch.Tensor):
    fast, plain = pair()
    compare(fast, plain, context)
    twin, other = copy.deepcopy(fast), copy.deepcopy(plain)
    with torch.no_grad():
        twin.body.block.function.linear.weight.mul_(0.1)
        other.body.block.function.linear.weight.mul_(0.1)
    compare(twin, other, context)
    compare(fast, plain, context)
    assert Tape.made == 2 and set(fast.state_dict()) == set(plain.state_dict())


def test_a_state_that_is_not_finite_is_noticed_at_the_next_look():
    loop = Loop(lambda state, context, index: state / 0, 7, execute=execute.Graphed(look=3, capture=Tape))
    with torch.no_grad():
        with pytest.raises(FloatingPointError, match="got nan or inf after 3 steps in rows"):
            loop(torch.ones(2, 3))
        with pytest.raises(FloatingPointError, match="got nan or inf after 2 steps in rows"):
            loop(torch.ones(2, 3), max_steps=2)
        unchecked = loop.replace(execute=execute.Graphed(check=False, capture=Tape))
        assert not unchecked(torch.ones(2, 3)).value.isfinite().any()


def test_under_a_tracer_it_runs_every_step(context: torch.Tensor):
    fast, plain = pair()
    torch._dynamo.reset()
    with torch.no_grad():
        traced = torch.compile(fast, fullgraph=True, backend="eager")(context)
        testing.assert_close(traced[:3], plain(context)[:3], "the traced loop equals the loop")
    assert Tape.made == 0 and traced.carry.index == 7


def test_it_is_refused_where_nothing_can_be_captured(context: torch.Tensor):
    loop = Loop(mixing(), 3, execute=execute.Graphed())
    with torch.no_grad(), pytest.raises(RuntimeError, match="the device must be a GPU with CUDA for execute.Graphed"):
        loop(context)
    with pytest.raises(RuntimeError, match="gradients must be off for execute.Graphed, got them enabled"):
        loop(context)
    with pytest.raises(ValueError, match="look must be at least 1, got 0. 1 looks at every step"):
        execute.Graphed(look=0)


class Growing:
    learned = stops = mixes = False

    def start(self, state, rows):
        return (rows.zeros(state),)

    def __call__(self, old, new, memory, index):
        from loopaware import Verdict

        stop = memory[0] < -1
        return Verdict(stop, stop.to(old.dtype), memory[0]), (*memory, memory[0])


def test_what_cannot_be_static_is_refused(context: torch.Tensor):
    fast, _ = pair(halt=Growing())
    with torch.no_grad(), pytest.raises(RuntimeError, match="what a step remembers must keep its shapes"):
        fast(context)

    class Thing:
        x = context

    thing = Loop(lambda state, given, index: state + given.x, 3, init=lambda given: given.x)
    with torch.no_grad(), pytest.raises(TypeError, match="must be made of tensors, tuples and mappings .* got Thing"):
        thing.replace(execute=execute.Graphed(capture=Tape))(Thing())


@pytest.mark.parametrize("rule", [grad.Truncated(2), grad.Checkpointed(3), grad.OneStep(), grad.Implicit()])
def test_gradient_rules_are_plain_runs_without_gradients(rule, context: torch.Tensor):
    fast, plain = pair(grad=rule)
    compare(fast, plain, context)


@on_gpu
def test_on_a_gpu(context: torch.Tensor):
    fast, plain = pair(body=body.Timed(mixing(), blocks.Sinusoidal(DIM)))
    fast = fast.replace(execute=execute.Graphed(look=3)).cuda()
    for given in (context, context.flip(0), context[:2], context):
        compare(fast, plain, given.cuda())
