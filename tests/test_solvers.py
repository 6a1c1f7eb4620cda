"""Solvers as loops: against torch.linalg.solve, their known rates, what halting guarantees, and their gradients."""

from __future__ import annotations

import itertools
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loopaware import Loop, body, grad, halt, init, solve, testing, tree, update
from loopaware.body import Iterate, operators
from loopaware.recipes import poisson
from loopaware.recipes.poisson_report import LEARNED, SOR

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "solver_in_a_block.py"


def systems(rows: int = 3, size: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Symmetric positive definite systems whose diagonal outweighs each row, from easy to less so."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, size, size, generator=random, dtype=dtype)
    scale = torch.logspace(-1, 0, rows, dtype=dtype)[:, None, None]
    mixed = scale * (noise + noise.mT)
    matrix = mixed + torch.diag_embed(mixed.abs().sum(-1)) + torch.eye(size, dtype=dtype)
    return {"x": torch.randn(rows, size, generator=random, dtype=dtype), "matrix": matrix}


def exact(context: dict[str, Tensor]) -> Tensor:
    return torch.linalg.solve(context["matrix"], context["x"])


def solving(solver, tolerance: float = 1e-10, max_steps: int = 2000, **parts) -> Loop:
    rule = halt.Below(Iterate.relative, tolerance)
    return Loop(solver, max_steps, init=solver.start, halt=rule, **parts)


def gentle(residual: Tensor, context: dict[str, Tensor]) -> Tensor:
    """A correction that knows nothing but that the matrices above are not large."""
    return residual / context["matrix"].abs().sum(-1).amax(-1, keepdim=True)


def inverse_diagonal(residual: Tensor, context: dict[str, Tensor]) -> Tensor:
    return residual / context["matrix"].diagonal(dim1=-2, dim2=-1)


DENSE = operators.Dense()
SOLVERS = {
    "Jacobi": lambda: body.Jacobi(DENSE),
    "Jacobi, damped": lambda: body.Jacobi(DENSE, damping=0.7),
    "GaussSeidel": lambda: body.GaussSeidel(DENSE),
    "SOR": lambda: body.SOR(DENSE, omega=1.2),
    "Richardson": lambda: body.Richardson(DENSE, rate=0.03),
    "Corrected": lambda: body.Corrected(DENSE, gentle),
    "ConjugateGradient": lambda: body.ConjugateGradient(DENSE),
    "ConjugateGradient, preconditioned": lambda: body.ConjugateGradient(DENSE, inverse_diagonal),
    "GaussSeidel, guess": lambda: body.GaussSeidel(DENSE, guess=init.FromContext()),
    "ConjugateGradient, guess": lambda: body.ConjugateGradient(DENSE, guess=init.FromContext()),
    "Surrogate": lambda: Begun(body.Surrogate(body.ConjugateGradient(DENSE), body.Jacobi(DENSE))),
    "smoothed and corrected": lambda: Begun(body.Stack(body.GaussSeidel(DENSE), body.Corrected(DENSE, gentle))),
}
every_solver = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS.keys())


class Begun(nn.Module):
    """A body made of solvers, started as its first one."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def start(self, context):
        return next(part for part in self.inner.modules() if hasattr(part, "start")).start(context)

    def forward(self, state, context, index):
        return self.inner(state, context, index)


@every_solver
def test_solvers_agree_with_torch(make):
    context = systems()
    out = solving(make(), 1e-13)(context)
    assert out.halted.all()
    testing.assert_close(out.value.x, exact(context), "the solution is that of torch.linalg.solve")


@every_solver
def test_solvers_keep_the_laws_of_loops(make):
    context = systems(dtype=torch.float32)
    loop = solving(make(), 3e-2, 7)
    testing.check_body(loop.body, loop.start(context).state, context)
    testing.check_loop(loop, context)


@pytest.mark.parametrize("name", ["SOR", "ConjugateGradient", "Surrogate"])
def test_unrolled_solvers_are_traced_whole(name: str):
    context = systems(dtype=torch.float32)
    torch._dynamo.reset()
    testing.check_traceable(solving(SOLVERS[name](), 3e-2, 3), context)


@every_solver
def test_a_row_is_solved_as_if_alone(make):
    context = systems(rows=4)
    loop = solving(make(), 3e-3)
    whole = loop(context)
    assert whole.halted.all() and len(set(whole.steps.tolist())) > 1, "each row at a step of its own"
    for row in range(4):
        alone = loop({name: tensor[row : row + 1] for name, tensor in context.items()})
        assert alone.steps.item() == whole.steps[row]
        testing.assert_close(alone.value.x[0], whole.value.x[row], "batch N equals batch 1")


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_halted_row_is_solved_to_its_tolerance(make, dtype: torch.dtype):
    """From the returned x alone; float32 included, where a residual that is only updated would promise too much."""
    context = systems(dtype=dtype)
    for bound in (1, 4, 2000):
        out = solving(make(), 1e-5)(context, max_steps=bound)
        left = (context["x"] - (context["matrix"] @ out.value.x[..., None])[..., 0]).norm(dim=-1)
        solved = left <= 1.001e-5 * context["x"].norm(dim=-1)
        assert torch.equal(solved, out.halted)
    assert out.halted.all()


def test_a_system_without_right_hand_side_is_solved_by_zero():
    context = systems()
    context["x"][1] = 0.0
    for make in SOLVERS.values():
        out = solving(make())(context)
        assert out.halted.all() and not out.value.x[1].abs().gt(1e-9).any()


def test_tokens_may_be_systems_of_their_own():
    context = systems(rows=6)
    tokens = {"x": context["x"].view(2, 3, 7), "matrix": context["matrix"].view(2, 3, 7, 7)}
    for make in SOLVERS.values():
        flat, nested = solving(make())(context), solving(make(), rows=2)(tokens)
        assert torch.equal(nested.steps.flatten(), flat.steps)
        testing.assert_close(nested.value.x.flatten(0, 1), flat.value.x, "rows=2 is rows=1 of more rows")
        together = solving(make(), rows=1)(tokens)
        assert torch.equal(together.steps, nested.steps.amax(1)), "a sequence waits for its last token"


def test_updates_that_mix_states_keep_the_residual_of_linear_systems():
    context = systems()
    for mixed in (update.Damped(0.7), update.Momentum(0.4)):
        out = solving(body.Jacobi(DENSE), 1e-12, update=mixed)(context)
        left = context["x"] - (context["matrix"] @ out.value.x[..., None])[..., 0]
        assert out.halted.all()
        testing.assert_close(out.value.residual, left, "the residual is that of x")


# Known rates, on the five-point grid where theory is exact.


def grid(rows: int, side: int) -> Tensor:
    return torch.randn(rows, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rate(solver: nn.Module, side: int, steps: int) -> float:
    """By how much late steps shrink an error, per step."""
    nothing = torch.zeros(2, side, side, dtype=torch.float64)
    x = grid(2, side)
    loop = Loop(solver, 2 * steps, init=lambda _: solver.start(nothing)._replace(x=x, residual=-POISSON(x, None)))
    early, late = (loop(nothing, max_steps=bound).value.x.flatten(1).norm(dim=1) for bound in (steps, 2 * steps))
    return ((late / early) ** (1 / steps)).max().item()


POISSON = operators.Poisson()


@pytest.mark.parametrize("side", [5, 9, 16])
def test_jacobi_and_gauss_seidel_shrink_errors_as_theory_says(side: int):
    radius = math.cos(math.pi / (side + 1))
    assert rate(body.Jacobi(POISSON), side, 400) == pytest.approx(radius, rel=1e-4)
    assert rate(body.Jacobi(POISSON, damping=0.5), side, 400) == pytest.approx((1 + radius) / 2, rel=1e-3)
    assert rate(body.GaussSeidel(POISSON), side, 400) == pytest.approx(radius**2, rel=1e-4)
    assert rate(body.Richardson(POISSON, rate=0.25), side, 400) == pytest.approx(radius, rel=1e-4)


@pytest.mark.parametrize("side", [5, 9, 16])
def test_the_optimal_omega_is_optimal(side: int):
    best = body.SOR.optimal(math.cos(math.pi / (side + 1)))
    assert best == pytest.approx(2 / (1 + math.sin(math.pi / (side + 1))))
    # The optimum is a defective eigenvalue: its rate is met from above, as steps^(1/steps).
    assert best - 1 < rate(body.SOR(POISSON, best), side, 100) < (best - 1) * 1.03
    steps = {omega: solving(body.SOR(POISSON, omega))(grid(3, side)).steps.max() for omega in (best, 1.0, 1.2, 1.98)}
    assert min(steps, key=steps.__getitem__) == best


def test_gauss_seidel_and_sor_do_not_ask_for_a_grid():
    """The stencil's sweep equals the triangular solve of its matrix, unknowns ordered as on a chessboard."""
    side = 5
    basis = torch.eye(side * side, dtype=torch.float64).view(-1, side, side)
    order = torch.argsort(operators.board(basis[0]).flatten().to(torch.int), descending=True, stable=True)
    matrix = POISSON(basis, None).flatten(1)[order][:, order]
    right = grid(2, side)
    dense = DENSE.sweep(right.flatten(1)[:, order], 1.4, {"matrix": matrix.expand(2, -1, -1)})
    testing.assert_close(POISSON.sweep(right, 1.4, None).flatten(1)[:, order], dense, "a sweep of the chessboard")
    testing.assert_close(POISSON.diagonal(right, None) * torch.ones(25), matrix.diagonal().float(), "the diagonal")


def test_conjugate_gradients_end_after_as_many_steps_as_unknowns():
    context = systems(size=9)
    out = solving(body.ConjugateGradient(DENSE), 1e-12)(context)
    assert out.halted.all() and (out.steps <= 9).all()
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[torch.arange(9) % 3]
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    clustered = {"x": context["x"], "matrix": (turn * values @ turn.mT).expand(3, -1, -1)}
    assert (solving(body.ConjugateGradient(DENSE), 1e-12)(clustered).steps == 3).all(), "one for each eigenvalue"


# Rows that cannot be solved.


def test_singular_and_indefinite_rows_never_claim_to_be_solved():
    context = systems()
    singular = torch.diag_embed(torch.tensor([1.0, 1, 2, 1, 3, 1, 0]))
    context["matrix"][1] = singular
    out = solving(body.ConjugateGradient(DENSE), 1e-6, 7)(context)
    assert out.halted.tolist() == [True, False, True] and out.value.x.isfinite().all()
    context["matrix"][1] = -100 * torch.eye(7)
    out = solving(body.ConjugateGradient(DENSE), max_steps=50)(context)
    assert out.halted.tolist() == [True, False, True] and not out.value.x[1].any(), "it stays where it was"
    out = solving(body.Richardson(DENSE, 0.03), 1e-3, 300)(context)
    assert out.halted.tolist() == [True, False, True] and Iterate.relative(out.value)[1] > 1
    with pytest.raises(FloatingPointError, match=r"finite, got nan or inf after \d+ steps in rows \[1\]"):
        solving(body.Richardson(DENSE, 0.03), max_steps=99_999)(context)
    context["matrix"][1] = singular
    for solver in (body.Jacobi(DENSE), body.ConjugateGradient(DENSE)):
        with pytest.raises(FloatingPointError, match=r"finite, got nan or inf after \d+ steps in rows \[1\]"):
            solving(solver)(context)


def test_a_residual_that_is_nan_never_halts():
    rule = halt.Below(Iterate.relative, 1e-3)
    state = Iterate(torch.ones(1, 2), torch.full((1, 2), float("nan")), torch.ones(1))
    assert not rule(state, state, rule.start(state, testing.parts.Rows()), 0)[0].stop


# Newton and descent.


def cubic(x: Tensor, context: dict[str, Tensor]) -> Tensor:
    """x + x^3 mixed: one root for each target."""
    return x + (context["matrix"] @ x[..., None])[..., 0] ** 3 - context["x"]


def curved(rows: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    context = systems(rows, 5, dtype)
    turn = torch.linalg.qr(context["matrix"]).Q
    return {"x": context["x"] * torch.arange(1, rows + 1)[:, None], "matrix": turn.mT * 0.5 + torch.eye(5, dtype=dtype)}


def measured(solver, measure, tolerance: float, max_steps: int = 60, **parts) -> Loop:
    return Loop(solver, max_steps, init=solver.start, halt=halt.Below(measure, tolerance), **parts)


def test_newton_doubles_the_digits():
    context = curved()
    loop = measured(body.Newton(cubic), Iterate.absolute, 1e-13)
    out = loop(context)
    assert out.halted.all() and (out.steps <= 12).all()
    testing.assert_close(cubic(out.value.x, context), torch.zeros(3, 5, dtype=torch.float64), "a root")
    path = [
        loop.replace(halt=halt.Never())(context, max_steps=step).value.x.sub(out.value.x).norm(dim=1)
        for step in range(1, 10)
    ]
    quick = [(b / a**2)[(a < 0.1) & (a > 1e-6)] for a, b in itertools.pairwise(path)]
    assert torch.cat(quick).numel() >= 4 and (torch.cat(quick) < 50).all(), "errors shrink quadratically"


def test_newton_solves_a_linear_system_in_one_step():
    context = systems()
    out = measured(body.Newton(lambda x, c: (c["matrix"] @ x[..., None])[..., 0] - c["x"]), Iterate.relative, 1e-12)(
        context
    )
    assert (out.steps == 1).all()
    testing.assert_close(out.value.x, exact(context), "the solution is that of torch.linalg.solve")


def test_the_jacobian_is_that_of_each_row():
    context = curved()
    x = context["x"].cos()
    got = body.nonlinear.jacobian(cubic, x, context)
    for row in range(3):
        one = {name: tensor[row : row + 1] for name, tensor in context.items()}
        expected = torch.autograd.functional.jacobian(lambda point, one=one: cubic(point, one), x[row : row + 1])
        testing.assert_close(got[row], expected[0, :, 0], "a row's Jacobian")
    wide = {"x": x.expand(2, 3, 5), "matrix": context["matrix"].expand(2, 3, 5, 5)}
    assert body.nonlinear.jacobian(cubic, wide["x"], wide).shape == (2, 3, 5, 5)


def flat(target: Tensor) -> Tensor:
    """A guess that is zero for targets of nine."""
    return torch.where(target[:, :1] == 9.0, 0.0, target)


def test_newton_at_a_singular_jacobian_stays_and_says_so():
    loop = measured(body.Newton(lambda x, target: x**2 - target), Iterate.absolute, 1e-9, 30)
    target = torch.tensor([[4.0, 1.0], [9.0, 1.0]], dtype=torch.float64)
    assert not loop(target).halted.any() and not loop(target).value.x.any(), "at zero the slope is flat"
    out = measured(body.Newton(lambda x, target: x**2 - target, guess=flat), Iterate.absolute, 1e-9, 30)(target)
    assert out.halted.tolist() == [True, False] and not out.value.x[1].any(), "the second starts where it is flat"
    testing.assert_close(out.value.x[0], target[0].sqrt(), "roots")


def test_descent_finds_the_minimum_of_an_energy():
    context = systems()

    def energy(x: Tensor, context: dict[str, Tensor]) -> Tensor:
        return ((context["matrix"] @ x[..., None])[..., 0] * x).sum(-1) / 2 - (context["x"] * x).sum(-1)

    out = measured(body.GradientDescent(energy, rate=0.03), Iterate.relative, 1e-12, 2000)(context)
    assert out.halted.all()
    testing.assert_close(out.value.x, exact(context), "where the gradient is zero")
    plain = solving(body.Richardson(DENSE, 0.03), 1e-12)(context)
    assert torch.equal(plain.steps, out.steps), "Richardson is descent on the quadratic"


@pytest.mark.parametrize("name", ["Newton", "GradientDescent"])
def test_nonlinear_solvers_keep_the_laws_of_loops(name: str):
    def slope(x: Tensor, context: dict[str, Tensor]) -> Tensor:
        return cubic(x, context).square().sum(-1)

    context = curved(dtype=torch.float32)
    solver = body.Newton(cubic) if name == "Newton" else body.GradientDescent(slope, rate=1e-3)
    loop = measured(solver, Iterate.relative, 0.3, 6)
    testing.check_body(loop.body, loop.start(context).state, context)
    testing.check_loop(loop, context)
    torch._dynamo.reset()
    testing.check_traceable(loop, context)


# Gradients.


def closed_form(context: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    """d(w^T A^-1 b): A^-T w for b, -A^-T w x^T for A."""
    back = torch.linalg.solve(context["matrix"].mT, weight)
    return [back, -back[..., None] * exact(context)[..., None, :]]


def asked(context: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in context.items()}


@pytest.mark.parametrize("name", [name for name in SOLVERS if name[:2] != "Co" and name != "Surrogate"])
def test_long_backpropagation_has_the_gradient_of_the_solution(name: str):
    context, weight = asked(systems()), grid(1, 7)[0, :3]
    out = solving(SOLVERS[name](), 1e-14, 3000)(context)
    found = torch.autograd.grad((out.value.x * weight).sum(), list(context.values()))
    for got, expected in zip(found, closed_form(systems(), weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_have_the_gradients_of_their_steps():
    """Few steps, by finite differences: at the end of the road the derivative of a step is 0/0."""
    context = asked(systems(rows=2, size=4))

    def value(x: Tensor, matrix: Tensor) -> Tensor:
        return solving(body.ConjugateGradient(DENSE), max_steps=2)({"x": x, "matrix": matrix}).value.x

    assert torch.autograd.gradcheck(value, tuple(context.values()))


def test_newton_has_the_gradient_of_the_root():
    context = asked(curved())
    loop = measured(body.Newton(cubic), Iterate.absolute, 1e-13)
    root = loop(context).value.x
    found = torch.autograd.grad(root.square().sum(), context["x"])[0]
    slope = body.nonlinear.jacobian(cubic, root.detach(), tree.detach(context))
    expected = torch.linalg.solve(slope.mT, 2 * root.detach())
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_gradients_of_rows_that_stay_are_not_nan():
    context = asked(systems())
    with torch.no_grad():
        context["x"][0] = 0.0
        context["matrix"][1] = -torch.eye(7)
    out = solving(body.ConjugateGradient(DENSE), max_steps=30)(context)
    for found in torch.autograd.grad(out.value.x.sum(), list(context.values())):
        assert found.isfinite().all()
    target = torch.tensor([[4.0, 1.0], [9.0, 1.0]], requires_grad=True)
    newton = body.Newton(lambda x, target: x**2 - target, guess=flat)
    value = measured(newton, Iterate.absolute, 1e-5, 30)(target).value.x
    assert torch.autograd.grad(value.sum(), target)[0].isfinite().all()


@pytest.mark.parametrize(
    "name", ["Jacobi", "GaussSeidel", "SOR", "Richardson", "Corrected", "Surrogate", "smoothed and corrected"]
)
def test_implicit_gradients_are_those_of_the_solution(name: str):
    context, weight = asked(systems()), grid(1, 7)[0, :3]
    out = solving(SOLVERS[name](), 1e-13, grad=grad.Implicit(solve.Anderson(1e-9)))(context)
    found = torch.autograd.grad((out.value.x * weight).sum(), list(context.values()))
    for got, expected in zip(found, closed_form(systems(), weight), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_implicit_gradient_of_newton_is_that_of_the_root():
    context, other = asked(curved()), asked(curved())
    loop = measured(body.Newton(cubic), Iterate.absolute, 1e-13)
    full, short = loop(other).value.x, loop.replace(grad=grad.Implicit(solve.Anderson(1e-9)))(context).value.x
    pair = [torch.autograd.grad(x.square().sum(), list(c.values())) for x, c in ((full, other), (short, context))]
    for got, expected in zip(pair[1], pair[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["Jacobi", "SOR", "Surrogate", "smoothed and corrected"])
def test_what_halted_promises_outlives_the_implicit_step(name: str):
    """The step that is differentiated is not returned; taken from residuals of .3, it would break a tenth of these."""
    for rows, tolerance in ((5, 1e-5), (200, 0.3)):
        context = asked(systems(rows=rows))
        out = solving(SOLVERS[name](), tolerance, grad=grad.Implicit())(context)
        left = (context["x"] - (context["matrix"] @ out.value.x[..., None])[..., 0]).norm(dim=-1)
        assert out.halted.all() and (left <= tolerance * context["x"].norm(dim=-1)).all()


# A learned step inside a solver, and solvers inside blocks.


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (4, 4), (9, 6), (15, 15), (16, 11)])
def test_a_learned_step_keeps_the_solution_of_every_grid(shape: tuple[int, int]):
    """However bad it is: the net below has learned nothing."""
    cycle = poisson.Cycle(noise=1.0).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    right = POISSON(x, None)
    step = poisson.smoothed(cycle)
    at_rest = Iterate(x, torch.zeros_like(x), torch.ones(2, dtype=torch.float64))
    testing.assert_close(step(at_rest, right, 0).x, x, "no residual, no correction")
    one, two = torch.randn(2, 2, *shape, dtype=torch.float64)
    both = cycle(one, None) - 3 * cycle(two, None)
    testing.assert_close(cycle(one - 3 * two, None), both, "the correction is linear")


def test_every_kernel_is_taught():
    cycle = poisson.Cycle().double()
    loop = poisson.solver(poisson.smoothed(cycle), 1e-12, 9)
    lesson = poisson.drawn(poisson.Plan(8, 9, 1, 3, 1e-2, 4, 2))(0, torch.Generator().manual_seed(0))
    poisson.shrinkage(loop, lesson, 2).backward()
    assert all(kernel.grad.abs().sum() > 0 for kernel in cycle.parameters())


class Scaled(nn.Module):
    """A preconditioner with one learned number for each unknown, positive whatever is learned."""

    def __init__(self, size: int):
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, residual: Tensor, context: dict[str, Tensor]) -> Tensor:
        return self.logarithm.exp() * residual


def test_a_preconditioner_is_learned_through_conjugate_gradients():
    """Systems that share one bad scaling: learned from four unrolled steps, it saves most steps of a solve."""
    context = systems(rows=4, size=24)
    scale = torch.logspace(-1, 1, 24, dtype=torch.float64)
    context["matrix"] = scale[:, None] * context["matrix"] * scale
    truth, learned = exact(context), Scaled(24)
    loop = solving(body.ConjugateGradient(DENSE, learned), 1e-6, 200)
    before = loop(context).steps.double().mean()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.2)
    for _ in range(60):
        error = loop(context, max_steps=4).value.x - truth
        loss = ((context["matrix"] @ error[..., None])[..., 0] * error).sum(-1).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = loop(context)
    assert out.halted.all() and out.steps.double().mean() < 0.5 * before


def test_textbook_multigrid_is_what_textbooks_say():
    """A factor near a third at every side of 2^k - 1, the mark of multigrid; operations for each unknown stay too."""
    cycle = poisson.textbook()
    factors = [poisson.radius(poisson.smoothed(cycle), side) for side in (7, 15, 31)]
    assert all(0.2 < factor < 0.4 for factor in factors)
    assert cycle.operations(15) < cycle.operations(63) < poisson.Cycle().operations(3) < 100
    plain = 2 * 9 - 1
    assert poisson.Cycle().operations(1) == plain + 5 + 1 + plain + 1, "a grid of one has nothing to coarsen"


TINY = {"steps": 12, "smallest": 5, "largest": 7, "tests": (6, 9), "seeds": (0, 1), "batch": 2, "bound": 60, "count": 3}


def test_poisson_end_to_end_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    poisson.run(tmp_path, **TINY)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    read = json.loads((tmp_path / "results.json").read_text())
    assert [result["side"] for result in read["results"]] == [6, 9]
    tallies = read["results"][1]["tallies"]
    assert {f"{LEARNED}, seed 0", f"{LEARNED}, seed 1", SOR} < set(tallies) and all(tallies[SOR]["halted"])
    assert read["broken"]["halted"] == 0 and "the state must be finite, got nan or inf" in read["broken"]["error"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") >= 2 and "Fewer steps than SOR" in page
    poisson.run(tmp_path, **TINY)
    again = json.loads((tmp_path / "results.json").read_text())
    steps = [[t["steps"] for t in result["tallies"].values()] for run in (read, again) for result in run["results"]]
    assert steps[:2] == steps[2:]


def test_poisson_refuses_what_cannot_be(tmp_path: Path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0. Name at least one seed"):
        poisson.run(tmp_path, **{**TINY, "seeds": ()})
    with pytest.raises(ValueError, match="largest must be at least 5, got 4. It cannot be below the smallest"):
        poisson.run(tmp_path, **{**TINY, "largest": 4})
    with pytest.raises(ValueError, match="tolerance must be above 0.0 and at most 1.0, got 0.0"):
        poisson.run(tmp_path, **{**TINY, "tolerance": 0.0})


@pytest.mark.slow
def test_poisson_shows_what_it_promises(tmp_path: Path):
    """With its own settings: three seeds, trained on sides of 8 to 16, never on those of the tests."""
    poisson.run(tmp_path)
    read = json.loads((tmp_path / "results.json").read_text())
    for result in read["results"]:
        sor = result["tallies"][SOR]
        learned = [tally for name, tally in result["tallies"].items() if name.startswith(LEARNED)]
        assert len(learned) == 3 and result["side"] > read["plan"]["largest"]
        for tally in learned:
            assert all(tally["halted"]) and tally["left"] <= 1e-6 * (1 + 1e-9) and tally["radius"] < 0.9
            assert max(tally["steps"]) < min(sor["steps"]) / 4
            assert sum(tally["steps"]) * tally["operations"] < sum(sor["steps"]) * sor["operations"]


def test_the_example_of_a_solver_in_a_block_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "20"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "attention: squared error" in said and "1000 of 1000 sequences solved to 1e-4" in said


def test_conjugate_gradients_ask_for_their_own_start():
    loop = Loop(body.ConjugateGradient(DENSE), 3, init=body.Jacobi(DENSE).start)
    with pytest.raises(TypeError, match="must hold its direction, got none. Start the loop with init=solver.start"):
        loop(systems())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: body.SOR(DENSE, 2.0), "omega must be above 0 and below 2, got 2.0. Nothing converges outside"),
        (lambda: body.SOR.optimal(1.0), "radius must be from 0 to below 1, got 1.0. Jacobi itself must converge"),
        (lambda: body.Jacobi(DENSE, 1.5), "damping must be above 0.0 and at most 1.0, got 1.5"),
        (lambda: body.Richardson(DENSE, 0.0), "rate must be above 0.0 and at most inf, got 0.0"),
        (lambda: body.GradientDescent(cubic, -1.0), "rate must be above 0.0 and at most inf, got -1.0"),
        (lambda: halt.Below(Iterate.relative, 0.0), "tolerance must be above 0.0 and at most inf, got 0.0. Rounding"),
    ],
)
def test_solvers_refuse_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
