"""`execute.Compiled` equals the plain run in outputs and gradients, and compiles a step once for all that is alike."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from loopaware import Loop, body, execute, grad, halt, init, observe, readout, testing, tree, update
from loopaware import nn as blocks
from loopaware.execute import compiled
from parts import DIM, mixing


@pytest.fixture
def backend() -> CompileCounterWithBackend:
    """Traces a graph, runs it with PyTorch's own operations, and counts."""
    return CompileCounterWithBackend("eager")


@pytest.fixture
def both() -> CompileCounterWithBackend:
    """Traces a graph of the backward pass too, as inductor does."""
    return CompileCounterWithBackend("aot_eager")


@pytest.fixture
def context() -> torch.Tensor:
    return torch.randn(3, 5, DIM) * torch.tensor([0.1, 1.0, 3.0])[:, None, None]


def pair(backend, **parts) -> tuple[Loop, Loop]:
    """A loop whose rows stop at different steps, compiled and as it comes."""
    plain = Loop(**{"body": mixing(), "max_steps": 7, "halt": halt.Converged(rtol=0.05), **parts})
    return plain.replace(execute=execute.Compiled(backend=backend)), plain


def compare(fast: Loop, plain: Loop, context, **options) -> None:
    """Values, steps and verdicts; and the gradients, if any; with the same random numbers."""
    torch.manual_seed(1)
    out = fast(context, **options)
    torch.manual_seed(1)
    expected = plain(context, **options)
    testing.assert_close(out[:3], expected[:3], "compiled steps equal the plain run")
    assert out.carry.index == expected.carry.index
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(expected.value)):
        testing.assert_close(
            gradients(fast, out.value), gradients(plain, expected.value), "compiled steps have the plain gradients"
        )


def gradients(loop: Loop, value) -> tuple[torch.Tensor, ...]:
    weights = [weight for weight in loop.parameters() if weight.requires_grad]
    total = torch.stack([leaf.square().sum() for leaf in tree.leaves(value)]).sum()
    return torch.autograd.grad(total, weights, materialize_grads=True)


def test_a_step_is_compiled_once_for_all_steps_and_batches(both, context: torch.Tensor):
    loop, plain = pair(
        both,
        body=body.Timed(blocks.Block(DIM, 2, placement=blocks.Post(), dropout=0.1), blocks.Sinusoidal(DIM)),
        max_steps=12,
        halt=halt.Never(),
    )
    counts = []
    for training in (True, False):
        loop.train(training), plain.train(training)
        for size, length in ((3, 5), (7, 5), (4, 5), (5, 5)):
            given = torch.randn(size, length, DIM)
            compare(loop, plain, given)
            with torch.no_grad():
                compare(loop, plain, given)
            counts.append(both.frame_count)
    # In training: the first step, whose state has no gradient, and all others; and without gradients. All again when a
    # second size of batch is met, and once more for evaluation, in which there is no dropout.
    assert counts[:4] == [3, 6, 6, 6]
    assert counts[4:] == [9] * 4


def test_the_index_is_no_reason_to_compile_again(backend, context: torch.Tensor):
    signals = [
        blocks.Sinusoidal(DIM),
        blocks.LearnedPositions(4, DIM),
        lambda index: torch.ones(DIM) * index / 7,
        lambda index: torch.full((DIM,), float(index)),
        lambda index: 0.1 / torch.full((DIM,), 1.0 + index),
    ]
    with torch.no_grad():
        for number, signal in enumerate(signals, start=1):
            compare(*pair(backend, body=body.Timed(mixing(), signal), halt=halt.Never()), context)
            assert backend.frame_count == number
        drawn = halt.Sampled(halt.Linear(DIM, bias=-1.0))
        fast, plain = pair(backend, halt=drawn, rows=2)
        compare(fast.eval(), plain.eval(), context)
    assert backend.frame_count == len(signals) + 1


def test_a_branch_on_the_index_is_compiled_for_each_branch(backend, context: torch.Tensor):
    fast, plain = pair(
        backend, body=lambda state, x, index: state + 1 if index < 3 else state / 2, halt=halt.Never(), max_steps=9
    )
    compare(fast, plain, context)
    assert backend.frame_count == 2


RULES = [
    grad.Full(),
    grad.Truncated(2),
    grad.Truncated(3, least=1),
    grad.Checkpointed(3),
    grad.Checkpointed(budget=10**6),
    grad.OneStep(),
    grad.Phantom(2),
    grad.Implicit(),
]


def test_every_gradient_rule(both, context: torch.Tensor):
    """One body under all rules: its backward graphs are run once and many times, in either order."""
    shared, count = mixing(), []
    for rule in [*RULES, *reversed(RULES)]:
        fast, plain = pair(
            both, body=shared, grad=rule, max_steps=30, halt=halt.Converged(rtol=1e-5), update=update.Damped(0.7)
        )
        compare(fast, plain, context)
        count.append(both.frame_count)
    assert count[-1] == count[len(RULES)] <= 4


def test_steps_that_are_undone(backend, context: torch.Tensor):
    def half() -> torch.nn.Module:
        return body.Called(torch.nn.Sequential(torch.nn.LayerNorm(DIM // 2), torch.nn.Linear(DIM // 2, DIM // 2)))

    fast, plain = pair(backend, body=body.Coupled(half(), half()), init=init.Halves(), grad=grad.Reversible())
    compare(fast.eval(), plain.eval(), context)


PARTS = {
    "tokens": {"rows": 2},
    "weights": {"halt": halt.ACT(halt.Linear(DIM, bias=-0.5)), "readout": readout.Weighted()},
    "draws": {
        "halt": halt.Sampled(halt.Linear(DIM, bias=-1.0)),
        "body": body.Stack(mixing(), body.Called(torch.nn.Dropout(0.3))),
    },
    "memory": {"update": update.LSTM(DIM), "halt": halt.Patience(halt.Converged(rtol=0.1), times=2)},
    "a mask that stays": {"update": update.Dropout(update.Damped(0.5), 0.3)},
    "prediction": {"halt": halt.KL(torch.nn.Linear(DIM, 3).requires_grad_(False), 1e-4)},
    "every state": {"readout": readout.Every(), "halt": halt.Never()},
    "stacked states": {"readout": readout.Stacked(), "halt": halt.Never()},
    "a start that is learned": {"init": init.Learned(DIM)},
}


@pytest.mark.parametrize("name", PARTS)
def test_it_equals_the_plain_run(name: str, both, context: torch.Tensor):
    fast, plain = pair(both, **PARTS[name])
    tokens = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    compare(fast, plain, context)
    compare(fast, plain, context, mask=tokens)
    with torch.no_grad():
        compare(fast.eval(), plain.eval(), context, mask=tokens)


def test_growing_readouts_and_recordings_compile_nothing_more(backend, context: torch.Tensor):
    fast, plain = pair(backend)
    compare(fast, plain, context)
    count = backend.frame_count
    for kind in (readout.Every(), readout.Stacked(), readout.Weighted()):
        compare(fast.replace(readout=kind), plain.replace(readout=kind), context)
    with observe.record(fast) as tape:
        fast(context)
    with observe.record(plain) as expected:
        plain(context)
    testing.assert_close(tuple(tape.only), tuple(expected.only), "a recording is that of the plain run")
    for _ in range(5):  # loops are made anew in the middle of training, as by models.TRM
        compare(fast.replace(halt=halt.Watched(halt.Converged(rtol=0.05))), plain.replace(halt=halt.Never()), context)
    assert backend.frame_count == count + 2  # another rule


def test_what_no_step_makes_anew_is_handed_on(backend, context: torch.Tensor):
    """By identity: gradients of a place of rest tell by it what moves."""
    fast, _ = pair(backend, update=update.Dropout(update.Damped(0.5), 0.3))
    start = fast.start(context)
    out = fast(context, carry=start)
    assert out.carry.update[0] is start.update[0] and out.carry.state is not start.state


def test_a_cut_loop_goes_on(backend, context: torch.Tensor):
    fast, plain = pair(backend, update=update.Momentum(0.3), halt=halt.Patience(halt.Converged(rtol=0.1), times=2))
    whole = plain(context)
    for cut in range(1, 7):
        piece = fast(context, max_steps=cut)
        testing.assert_close(fast(context, carry=piece.carry)[:3], whole[:3], f"cut at step {cut}, it is the same")


def test_the_context_is_that_of_now(backend, context: torch.Tensor):
    block = blocks.Block(DIM, 2, cross=True)
    fast, plain = pair(backend, body=block, halt=halt.Never(), max_steps=3)
    for _ in range(2):
        mask = torch.rand(3, 5) < 0.7
        given = {"x": context, "mask": mask, "memory": torch.randn(3, 9, DIM), "memory_mask": torch.rand(3, 9) < 0.5}
        compare(fast, plain, given, mask=mask)
        compare(fast, plain, {"x": context})


def test_modes_may_be_mixed(backend, context: torch.Tensor):
    fast, plain = pair(backend)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            compare(fast, plain, context.clone())
    compare(fast, plain, context)
    compare(fast, plain, context.clone().requires_grad_())
    compare(copy.deepcopy(fast).double(), copy.deepcopy(plain).double(), context.double())


class Inner(torch.nn.Module):
    def __init__(self, loop: Loop):
        super().__init__()
        self.loop = loop

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.loop(state).value


def test_loops_nest(backend, context: torch.Tensor):
    fast, plain = pair(backend, rows=2, max_steps=4, halt=halt.Converged(rtol=0.3))
    around = Loop(body.Called(Inner(plain)), 3, halt=halt.Converged(rtol=0.05))
    compare(Loop(body.Called(Inner(fast)), 3, halt=halt.Converged(rtol=0.05)), around, context)
    for inner in (fast, plain.replace(execute=execute.Unrolled())):
        outer = Loop(body.Called(Inner(inner)), 3, halt=around.halt, execute=fast.execute)
        compare(outer, around, context)
        with observe.record(outer) as tape:
            outer(context)
        assert [len(calls) for calls in tape.values()] == [1, 3]


def test_under_a_tracer_it_runs_every_step(context: torch.Tensor):
    fast, plain = pair(backend="eager")
    torch._dynamo.reset()
    traced = torch.compile(fast, fullgraph=True, backend="eager")(context)
    testing.assert_close(traced[:3], plain(context)[:3], "the traced loop equals the loop")
    assert traced.carry.index == 7
    with torch.no_grad():
        exported = torch.export.export(fast.eval(), (context,)).module()(context)
    testing.assert_close(exported[0], plain(context).value, "the exported loop equals the loop")


def test_bodies_share_nothing_and_loops_of_one_body_share_all(backend, context: torch.Tensor):
    fast, plain = pair(backend)
    other, other_plain = pair(backend)
    with torch.no_grad():
        compare(fast, plain, context)
        compare(other, other_plain, context)
        assert backend.frame_count == 2
        for steps in range(1, 7):
            compare(fast.replace(max_steps=steps), plain.replace(max_steps=steps), context)
        assert backend.frame_count == 2
        compare(fast.replace(update=update.Damped(0.5)), plain.replace(update=update.Damped(0.5)), context)
        assert backend.frame_count == 3
        compare(fast.replace(update=update.Damped(0.9)), plain.replace(update=update.Damped(0.9)), context)
        compare(fast.replace(halt=halt.Converged(rtol=0.9)), plain.replace(halt=halt.Converged(rtol=0.9)), context)
        compare(fast, plain, context)


def test_a_loop_copied_is_another_loop(backend, context: torch.Tensor):
    fast, plain = pair(backend)
    names = list(plain.state_dict())
    compare(fast, plain, context)
    assert list(fast.state_dict()) == names == [name for name, _ in fast.named_parameters()]
    twin, other = copy.deepcopy(fast), copy.deepcopy(plain)
    with torch.no_grad():
        for each in (twin, other):
            each.body.block.function.linear.weight.mul_(0.1)
    compare(twin, other, context)
    compare(fast, plain, context)


def test_what_was_compiled_dies_with_the_body(backend, context: torch.Tensor):
    gc.collect()
    before = len(compiled.FUNCTIONS)
    fast, plain = pair(backend)
    compare(fast, plain, context)
    assert len(compiled.FUNCTIONS) == before + 1
    gone = weakref.ref(fast.body), weakref.ref(fast)
    del fast, plain
    gc.collect()
    assert [each() for each in gone] == [None, None] and len(compiled.FUNCTIONS) == before


@dataclass(frozen=True, slots=True)
class Halved:
    """A body that no weak reference can point to."""

    by: float = 2.0

    def __call__(self, state, context, index):
        return state / self.by


def test_any_callable_is_a_body(backend, context: torch.Tensor):
    for given in (Halved(), Halved(3.0), lambda state, context, index: state / 4, Halved(5.0).__call__):
        compare(*pair(backend, body=given, halt=halt.Converged(atol=0.1, rtol=0.0)), context)


def test_the_repr_names_the_backend(backend):
    assert repr(execute.Compiled()) == "Compiled(backend='inductor', check=True)"
    assert repr(execute.Compiled(backend, check=False)) == "Compiled(backend=CompileCounterWithBackend, check=False)"


def test_a_state_that_is_not_finite_is_noticed(backend):
    loop = Loop(lambda state, context, index: state / 0, 7, execute=execute.Compiled(backend))
    with pytest.raises(FloatingPointError, match="got nan or inf after 1 steps in rows"):
        loop(torch.ones(2, 3))
    assert not loop.replace(execute=execute.Compiled(backend, check=False))(torch.ones(2, 3)).value.isfinite().any()


def test_a_step_that_is_no_single_graph_is_refused(backend, context: torch.Tensor):
    fast, _ = pair(backend, body=lambda state, x, index: state / 2 if state.sum() > 0 else state)
    with pytest.raises(RuntimeError, match="a step must be a single graph for execute.Compiled, got .*execute.Eager()"):
        fast(context)
    inner = Loop(mixing(), 3)
    fast, _ = pair(backend, body=body.Called(Inner(inner)))
    with pytest.raises(RuntimeError, match="Give loops inside the body execute.Unrolled()"):
        fast(context)


def test_a_mistake_of_the_step_is_told_by_the_step(backend, context: torch.Tensor):
    fast, _ = pair(backend, body=lambda state, x, index: state[..., :4])
    with pytest.raises(ValueError, match="the body's proposal must have the shape of the state"):
        fast(context)


def test_a_backend_that_fails_is_named(context: torch.Tensor):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    fast, _ = pair(broken)
    with pytest.raises(RuntimeError, match="the backend of execute.Compiled must be able to .*OSError: no compiler"):
        fast(context)


def test_inductor_without_a_compiler_is_named(context: torch.Tensor):
    from torch._inductor import config, utils

    fast, _ = pair("inductor")
    with (
        utils.fresh_cache(),
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(RuntimeError, match="Inductor needs a C\\+\\+ compiler on this machine: install one, or take"),
    ):
        fast(context)


def test_a_graph_for_every_call_is_refused(backend, context: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "LIMIT", 3)
    loop, _ = pair(backend, body=body.Timed(mixing(), torch.as_tensor), halt=halt.Never())
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(RuntimeError, match="a body's step must need at most 3 graphs, got one more"),
    ):
        loop(context)


def test_pytorch_may_warn_where_warnings_are_errors(backend, context: torch.Tensor):
    """And only PyTorch."""
    import warnings

    class Loud(readout.Every):
        def fold(self, folded, state, verdict, alive):
            warnings.warn("folded", UserWarning, stacklevel=1)
            return ()

    fast, _ = pair(backend)
    fast(context)
    with pytest.raises(UserWarning, match="folded"):
        fast.replace(readout=Loud())(context)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inductor(dropout: float, context: torch.Tensor):
    """Machine code equals PyTorch's operations: outputs, gradients, and draws."""
    block = body.Timed(blocks.Block(DIM, 2, placement=blocks.Post(), dropout=dropout), blocks.Sinusoidal(DIM))
    fast, plain = pair("inductor", body=block, rows=2, halt=halt.Converged(rtol=0.2), update=update.Damped(0.5))
    for training in (True, False):
        fast.train(training), plain.train(training)
        for given in (context, torch.randn(7, 5, DIM), torch.randn(4, 9, DIM)):
            compare(fast, plain, given)
            with torch.no_grad():
                compare(fast, plain, given)
    for rule in (grad.Truncated(2), grad.Checkpointed(3), grad.OneStep()):
        compare(fast.replace(grad=rule), plain.replace(grad=rule), context)
    # At rest: elsewhere the gradient of Implicit moves by some per cent with the last digits of the input.
    fast, plain = pair("inductor", halt=halt.Converged(rtol=1e-5), grad=grad.Implicit(), max_steps=50)
    compare(fast, plain, context)
