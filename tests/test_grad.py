"""Gradient rules against long backpropagation and closed forms: values, gradients, memory, what is refused."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
import torch.multiprocessing
from torch import nn

from loopaware import Loop, body, grad, halt, init, observe, readout, solve, testing, update
from loopaware.grad.attach import linked
from loopaware.nn import Attention, FeedForward

RATES = (0.5, 0.9, 0.97, 0.99)


class Turning(nn.Module):
    """tanh(W h + x), |W| = rate in every direction; without `bend` linear, so that it contracts at exactly `rate`."""

    def __init__(self, dim: int, rate: float, bend: bool = True):
        super().__init__()
        self.weight = nn.Parameter(rate * torch.linalg.qr(torch.randn(dim, dim))[0])
        self.bend = bend

    def forward(self, state, context, index):
        new = state @ self.weight + context
        return torch.tanh(new) if self.bend else new


def gradients(loop: Loop, x: torch.Tensor) -> torch.Tensor:
    """Of a fixed linear form of the value, in all parameters and the input."""
    x = x.clone().requires_grad_()
    leaves = testing.parts.tree.leaves(loop(x).value)
    noise = torch.Generator().manual_seed(3)
    total = sum((leaf * torch.randn(leaf.shape, generator=noise, dtype=leaf.dtype)).sum() for leaf in leaves)
    found = torch.autograd.grad(total, [*loop.parameters(), x], materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("bend", [False, True])
@pytest.mark.parametrize("rate", RATES)
def test_implicit_equals_long_backpropagation(rate: float, bend: bool):
    """1,500 steps; without a bend twice as many, since 1,500 * .99^1500 = 4e-4 are left over at .99."""
    torch.manual_seed(0)
    loop = Loop(Turning(7, rate, bend).double(), 1500 if bend else 3000, init=init.Zeros())
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = gradients(loop, x)
    for solver in (solve.Picard(1e-10, 4000), solve.Anderson(1e-10, 500), solve.Broyden(1e-10, 500)):
        assert apart(gradients(loop.replace(grad=grad.Implicit(solver)), x), expected) < 1e-6, solver
        both = loop.replace(grad=grad.Implicit(solver, forward=solver))
        assert apart(gradients(both, x), expected) < 1e-6, solver


@pytest.mark.parametrize(
    "change",
    [
        update.Replace(),
        update.Damped(0.4),
        update.Momentum(0.5),
        update.Residual(6, gain=0.7),
        update.Gated(6),
        update.GRU(6),
        update.LSTM(6),
        update.Dropout(update.Damped(0.5), 0.2),
    ],
    ids=lambda change: type(change).__name__,
)
def test_implicit_differentiates_state_and_memory_together(change):
    """Every update that comes to rest, also those whose fixed points are not the body's."""
    torch.manual_seed(0)
    loop = Loop(Turning(6, 0.6), 400, init=init.Zeros(), update=change).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    for forward in (None, solve.Anderson(1e-12, 200)):
        implicit = loop.replace(grad=grad.Implicit(solve.Anderson(1e-12, 200), forward))
        both = []
        for each in (implicit, loop):
            torch.manual_seed(4)  # dropout draws its mask
            both.append(gradients(each, x))
        assert apart(*both) < 1e-8


def test_implicit_of_a_tree():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Turning(4, 0.6), Turning(4, 0.5)

        def forward(self, state, context, index):
            left, right = state["left"], state["right"][0]
            return {"left": self.one(right, context, index), "right": (self.two(left, context, index),)}

    torch.manual_seed(0)
    loop = Loop(Pair(), 200, init=lambda x: {"left": 0 * x, "right": (0 * x,)}).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    implicit = loop.replace(grad=grad.Implicit(solve.Anderson(1e-12, 200)))
    assert apart(gradients(implicit, x), gradients(loop, x)) < 1e-8


def test_implicit_rows_do_not_depend_on_each_other():
    torch.manual_seed(0)
    loop = Loop(Turning(5, 0.9), 300, init=init.Zeros(), halt=halt.Converged(rtol=1e-9), grad=grad.Implicit()).double()
    x = torch.randn(4, 5, dtype=torch.float64) * torch.tensor([[0.01], [0.1], [1.0], [9.0]])
    whole = x.clone().requires_grad_()
    loop(whole).value.sum().backward()
    for row in range(4):
        alone = x[row : row + 1].clone().requires_grad_()
        loop(alone).value.sum().backward()
        testing.assert_close(alone.grad, whole.grad[row : row + 1], "batch N equals batch 1, in gradients too")


def test_implicit_forward_stops_rows_and_lets_the_rule_judge():
    torch.manual_seed(0)
    solver = solve.Anderson(tolerance=1e-5)
    loop = Loop(Turning(5, 0.95), 200, init=init.Zeros(), halt=halt.Converged(rtol=1e-3))
    x = torch.randn(3, 5) * torch.tensor([[0.01], [1.0], [5.0]])
    found = loop.replace(grad=grad.Implicit(forward=solver))
    out, plain = found(x), loop.replace(halt=halt.Never())(x)
    torch.testing.assert_close(out.value, plain.value, rtol=1e-3, atol=1e-4)
    assert out.halted.all() and (out.steps < 60).all() and len(set(out.steps.tolist())) > 1
    with torch.no_grad():
        testing.assert_close(found(x)[:3], (out.value.detach(), *out[1:3]), "evaluation finds the same")
    short = found(x, max_steps=3)
    assert (short.steps == 3).all() and not short.halted.all(), "the bound holds, and who is not at rest says so"


def test_phantom_lies_between_one_step_and_implicit():
    torch.manual_seed(0)
    loop = Loop(Turning(6, 0.8), 300, init=init.Zeros()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    exact = gradients(loop, x)
    one = gradients(loop.replace(grad=grad.OneStep()), x)
    testing.assert_close(gradients(loop.replace(grad=grad.Phantom(1, 1.0)), x), one, "one whole step is OneStep")
    far = [apart(gradients(loop.replace(grad=grad.Phantom(count, 0.7)), x), exact) for count in (1, 4, 16, 64)]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-3 and apart(one, exact) > 0.1


def test_a_signal_of_few_steps_is_not_overrun_by_the_step_that_is_differentiated():
    from loopaware.nn import LearnedPositions

    for rule in (grad.OneStep(), grad.Phantom(3), grad.Implicit()):
        timed = body.Timed(Turning(4, 0.5), LearnedPositions(5, 4))
        assert Loop(timed, 5, grad=rule)(torch.ones(2, 4)).value.isfinite().all()


def test_implicit_warns_where_nothing_contracts():
    torch.manual_seed(0)
    loop = Loop(Turning(4, 3.0, bend=False), 5, grad=grad.Implicit(solve.Picard(max_steps=5)))
    loss = loop(torch.randn(2, 4)).value.sum()
    with pytest.warns(RuntimeWarning, match=r"must reach a residual of 0.1, got up to .* in sequences \[0, 1\]"):
        loss.backward()


def test_implicit_refuses_second_derivatives():
    loop = Loop(Turning(4, 0.5), 5, grad=grad.Implicit())
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="must not be differentiated again, got create_graph=True"):
        torch.autograd.grad(loop(x).value.sum(), x, create_graph=True)


class Half(nn.Module):
    """What stands in a residual, with dropout."""

    def __init__(self, dim: int, layer: nn.Module):
        super().__init__()
        self.norm, self.layer, self.dropout = nn.LayerNorm(dim), layer, nn.Dropout(0.1)

    def forward(self, state, context, index):
        return self.dropout(self.layer(self.norm(state) + context[..., : state.shape[-1]]))


def coupled(dim: int, steps: int) -> Loop:
    """Attention and feed-forward in a reversible block, behind a layer that must be taught too."""
    block = body.Coupled(Half(dim, Attention(dim, 2)), Half(dim, FeedForward(dim)))
    return Loop(block, steps, init=init.Halves(init.Projected(2 * dim, 2 * dim)))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rule", [halt.Never(), halt.Converged(rtol=0.05)], ids=["all steps", "early stops"])
def test_reversible_equals_full_with_dropout(rule, dtype, limit):
    torch.manual_seed(0)
    loop = coupled(8, 64).replace(halt=rule).to(dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    both = []
    for rule_ in (grad.Full(), grad.Reversible()):
        torch.manual_seed(5)
        both.append(gradients(loop.replace(grad=rule_), x))
    assert loop.training and apart(both[1], both[0]) < limit
    torch.manual_seed(6)
    assert apart(gradients(loop, x), both[0]) > 1e-3, "other dropout is another gradient"
    if rule != halt.Never():
        assert len(set(loop(x).steps.tolist())) > 1 or loop(x).halted.all()


def test_reversible_can_be_differentiated_twice_and_is_freed():
    torch.manual_seed(0)
    loop = coupled(4, 6).replace(grad=grad.Reversible()).double()
    out = loop(torch.randn(2, 3, 8, dtype=torch.float64))
    total = out.value[0].sum() + out.value[1].square().sum()
    first = torch.autograd.grad(total, list(loop.parameters()), retain_graph=True)
    again = torch.autograd.grad(total, list(loop.parameters()))
    testing.assert_close(first, again, "the same states are computed back again")
    gone = weakref.ref(out.value[0].untyped_storage())
    del out, total
    gc.collect()
    assert gone() is None, "nothing keeps a graph that nobody holds"


def test_coupled_is_undone_exactly():
    torch.manual_seed(0)
    step = coupled(4, 1).body.double()
    state = tuple(torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(2))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    moved = step(state, x, 0)
    torch.manual_seed(1)
    testing.assert_close(step.inverse(moved, x, 0), state, "with the same random numbers it is undone")
    torch.manual_seed(2)
    assert (step.inverse(moved, x, 0)[0] - state[0]).abs().max() > 1e-3, "with others it is not"


def peak(rule: object, steps: int) -> int:
    torch.manual_seed(0)
    loop = coupled(16, steps).replace(grad=rule)
    x = torch.randn(4, 15, 32)
    with torch.random.fork_rng():
        return observe.peak(lambda: torch.cat(loop(x).value, -1).square().sum().backward()).bytes


def test_memory_against_full_backpropagation():
    full = {steps: peak(grad.Full(), steps) for steps in (16, 64)}
    assert 3 < full[64] / full[16] < 4.5, "grows with the steps"
    assert peak(grad.Reversible(), 64) <= 0.1 * full[64]
    assert peak(grad.Checkpointed(8), 64) <= 0.4 * full[64]
    assert peak(grad.OneStep(), 64) <= 0.1 * full[64]


@pytest.mark.parametrize("rule", [grad.OneStep(), grad.Phantom(3), grad.Truncated(4)], ids=str)
def test_memory_is_flat_in_the_number_of_steps(rule):
    assert peak(rule, 16) == peak(rule, 256)


def test_memory_of_implicit_is_flat_in_the_number_of_steps():
    def bytes_of(steps: int) -> int:
        torch.manual_seed(0)
        loop = Loop(Turning(32, 0.9), steps, init=init.Zeros(), grad=grad.Implicit())
        x = torch.randn(16, 15, 32)
        return observe.peak(lambda: loop(x).value.sum().backward()).bytes

    sizes = [bytes_of(steps) for steps in (16, 64, 256)]
    assert max(sizes) <= 1.01 * min(sizes)


def test_a_budget_is_kept_and_an_impossible_one_refused():
    torch.manual_seed(0)
    loop = Loop(body.Injected(body.Called(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))), added), 60)
    x = torch.randn(8, 16)
    full = observe.peak(lambda: loop(x).value.sum().backward()).bytes
    exact = gradients(loop, x)
    for share in (0.5, 0.3):
        rule = grad.Checkpointed(budget=int(share * full))
        assert (
            observe.peak(lambda rule=rule: loop.replace(grad=rule)(x).value.sum().backward()).bytes
            <= 1.3 * share * full
        )
        testing.assert_close(gradients(loop.replace(grad=rule), x), exact, "the gradient is exact")
    assert gradients(loop.replace(grad=grad.Checkpointed(budget=100 * full)), x).isfinite().all()
    with pytest.raises(ValueError, match=r"budget must be at least \d+ bytes for 60 steps of this loop, got 1000\."):
        loop.replace(grad=grad.Checkpointed(budget=1000))(x)


def added(state, x):
    return state + x


def test_random_windows_are_those_of_fixed_ones():
    torch.manual_seed(0)
    loop = Loop(Turning(5, 0.8), 9, halt=halt.Converged(rtol=0.05)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    fixed = [gradients(loop.replace(grad=grad.Truncated(last)), x) for last in (1, 2, 3)]
    seen = set()
    for _ in range(24):
        drawn = gradients(loop.replace(grad=grad.Truncated(last=3, least=1)), x)
        seen |= {last for last, one in enumerate(fixed, 1) if apart(drawn, one) < 1e-12}
    assert seen == {1, 2, 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grad.Checkpointed(every=2, budget=9), "every must be None when a budget is given, got 2"),
        (lambda: grad.Checkpointed(budget=0), "budget must be at least 1, got 0"),
        (lambda: grad.Truncated(last=2, least=3), "least must be at most last, got 3 and 2"),
        (lambda: grad.Phantom(count=0), "count must be at least 1, got 0"),
        (lambda: grad.Phantom(rate=0.0), "rate must be above 0.0 and at most 1.0, got 0.0"),
        (lambda: solve.Picard(tolerance=0.0), "tolerance must be above 0.0 and at most 1.0, got 0.0"),
        (lambda: solve.Anderson(memory=0), "memory must be at least 1, got 0"),
        (lambda: solve.Broyden(max_steps=0), "max_steps must be at least 1, got 0"),
        (
            lambda: Loop(Turning(4, 0.5), 3, grad=grad.Reversible()),
            r"body must have an inverse for Reversible\(\), got Turning\. Take body\.Coupled",
        ),
        (
            lambda: coupled(4, 3).replace(grad=grad.Reversible(), update=update.Damped(0.5)),
            r"update must take the body's proposal as it is for Reversible\(\), got Damped\(rate=0\.5\)",
        ),
        (
            lambda: Loop(Turning(4, 0.5), 3, grad=grad.Implicit(), readout=readout.Every()),
            r"readout must return the last state when no other carries a gradient, got Every\(\) with Implicit",
        ),
        (
            lambda: Loop(Turning(4, 0.5), 3, grad=grad.Phantom(), halt=halt.Residual()),
            "grad must differentiate every step when halting is learned, got Phantom",
        ),
        (lambda: init.Halves()(torch.ones(1, 3)), "features must be even to be halved, got 3"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pair_of_halves_is_asked_for():
    with pytest.raises(TypeError, match=r"state of body.Coupled must be a tuple of two tensors, got \(2, 4\)\. Start"):
        body.Coupled(Turning(4, 0.5), Turning(4, 0.5))(torch.ones(2, 4), torch.ones(2, 4), 0)


def test_what_was_cut_off_gets_a_zero_and_not_nothing():
    """Data-parallel training fails on parameters that nothing reaches."""
    for rule in (grad.OneStep(), grad.Phantom(), grad.Implicit(), grad.Truncated(2)):
        loop = Loop(body.Injected(Turning(4, 0.5), lambda state, x: state), 9, init=init.Learned(4), grad=rule)
        loop(torch.ones(3, 4)).value.sum().backward()
        assert torch.equal(loop.init.vector.grad, torch.zeros(4)), rule
        assert all(parameter.grad is not None for parameter in loop.parameters()), rule
    start = loop.start(torch.ones(2, 4))
    assert linked(start._replace(state=start.state * float("nan")), start).state.isnan().all()


@pytest.mark.parametrize("solver", [solve.Picard(1e-12, 900), solve.Anderson(1e-12), solve.Broyden(1e-12)], ids=str)
def test_solvers_solve_row_by_row(solver):
    torch.manual_seed(0)
    matrix = 0.9 * torch.linalg.qr(torch.randn(4, 6, 6, dtype=torch.float64))[0]
    right = torch.randn(4, 6, dtype=torch.float64) * torch.tensor([[0.0], [1e-6], [1.0], [1e6]])
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, right)

    def function(x, rows=slice(None)):
        return (matrix[rows] @ x[..., None])[..., 0] + right[rows]

    found = solver(function, torch.zeros_like(right))
    assert found.solved.all() and (found.residual <= 1e-12).all() and found.steps[0] == 1
    torch.testing.assert_close(found.value, exact, rtol=1e-9, atol=1e-15)
    for row in range(4):
        alone = solver(lambda x, row=row: function(x, slice(row, row + 1)), torch.zeros_like(right[:1]))
        testing.assert_close(alone.value, found.value[row : row + 1], "a row is solved by itself")
        assert alone.steps.item() == found.steps[row].item()
    some = torch.tensor([True, False, True, False])
    part = solver(function, torch.ones_like(right), some)
    assert part.steps[~some].tolist() == [0, 0] and torch.equal(part.value[~some], torch.ones(2, 6).double())
    short = solver(function, torch.zeros_like(right), None, 3)
    assert short.steps.max() == 3 and not short.solved[1:].any() and short.solved[0]


@pytest.mark.parametrize("solver", [solve.Picard(), solve.Anderson(), solve.Broyden()], ids=str)
def test_solvers_keep_the_best_iterate_and_end_where_nothing_is_finite(solver):
    def function(x):
        return torch.stack([x[0] / 2 + 1, x[1].square() + 2, x[2] * float("nan")])

    found = solver(function, torch.full((3, 2), 1.5))
    assert found.solved.tolist() == [True, False, False] and found.value.isfinite().all()
    assert found.residual[1] <= (1.5**2 + 2 - 1.5) / (1.5**2 + 2) + 1e-6, "never worse than the start"
    assert found.steps[2] == 1 and found.residual[2] == float("inf")


def test_accelerated_solvers_need_fewer_steps():
    torch.manual_seed(0)
    symmetric = torch.linalg.eigh(torch.randn(30, 30, dtype=torch.float64)).eigenvectors
    matrix = symmetric @ torch.diag(torch.linspace(-0.9, 0.99, 30, dtype=torch.float64)) @ symmetric.T
    right = torch.randn(2, 30, dtype=torch.float64)
    steps = [
        solver(lambda x: x @ matrix + right, torch.zeros_like(right)).steps.max().item()
        for solver in (solve.Picard(1e-8, 5000), solve.Anderson(1e-8, 5000), solve.Broyden(1e-8, 5000, memory=60))
    ]
    assert steps[1] < steps[0] / 4 and steps[2] < steps[0] / 10


RULES = [grad.Full(), grad.Checkpointed(2), grad.Truncated(3), grad.OneStep(), grad.Phantom(2), grad.Implicit()]


def replica(rank: int, port: int, folder: str) -> None:
    """One of two processes: each rule in data-parallel training, on its half of a batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = {}
    for rule in RULES:
        torch.manual_seed(0)
        loop = Loop(body.Injected(Turning(5, 0.5), added), 8, init=init.Learned(5), grad=rule)
        model = nn.parallel.DistributedDataParallel(Wrapped(loop))
        for _ in range(2):  # a second pass fails if the first left a parameter behind
            model.zero_grad()
            model(x[2 * rank : 2 * rank + 2]).square().sum().backward()
        found[str(rule)] = torch.cat([parameter.grad.flatten() for parameter in loop.parameters()])
    if rank == 0:
        from safetensors.torch import save_file

        save_file(found, f"{folder}/found.safetensors")
    torch.distributed.destroy_process_group()


class Wrapped(nn.Module):
    def __init__(self, loop: Loop):
        super().__init__()
        self.loop = loop

    def forward(self, x):
        return self.loop(x).value


@pytest.mark.slow
def test_every_rule_trains_in_two_processes(tmp_path):
    import socket

    from safetensors.torch import load_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(replica, (port, str(tmp_path)), nprocs=2)
    found = load_file(tmp_path / "found.safetensors")
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for rule in RULES:
        torch.manual_seed(0)
        loop = Loop(body.Injected(Turning(5, 0.5), added), 8, init=init.Learned(5), grad=rule)
        (loop(x).value.square().sum() / 2).backward()  # replicas average
        alone = torch.cat([parameter.grad.flatten() for parameter in loop.parameters()])
        torch.testing.assert_close(found[str(rule)], alone, rtol=1e-4, atol=1e-5)
