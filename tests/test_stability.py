"""What keeps loops stable and what shows whether they are, against closed forms and dense Jacobians."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.utils import parametrize

from loopaware import Loop, body, grad, halt, jacobian, nn, observe, readout, testing, train, update

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]


def attending(**options) -> Loop:
    torch.manual_seed(0)
    return Loop(nn.Block(4, 2, placement=nn.Post(), hidden=8), 6, **options)


def linear(matrix: torch.Tensor, steps: int = 5, **options) -> Loop:
    return Loop(lambda state, context, index: state @ matrix, steps, **options)


def dense(loop: Loop, context, item: int, length: int) -> torch.Tensor:
    """The Jacobian of one more step of one sequence without its padding, from autograd's own dense one."""
    x = context["x"] if isinstance(context, dict) else context
    out = loop(context, mask=None if not isinstance(context, dict) else context["mask"])
    alone = x[item : item + 1, :length]
    carry = loop.start(alone)
    state = out.carry.state[item : item + 1, :length].detach()
    found = torch.autograd.functional.jacobian(
        lambda h: loop.advance(carry._replace(state=h, index=loop.max_steps - 1), alone).state, state
    )
    return found.reshape(state.numel(), state.numel())


# Jacobian penalty


@pytest.mark.parametrize("rows", [1, 2])
def test_the_penalty_is_the_squared_norm_of_the_dense_jacobian(rows: int, monkeypatch: pytest.MonkeyPatch):
    """With sqrt(d) times each unit vector in place of noise, the mean over probes is exactly the expectation."""
    for lengths, context in (([5, 5, 5], X), ([5, 3, 1], {"x": X, "mask": MASK})):
        loop = attending(rows=rows)
        mask = None if isinstance(context, torch.Tensor) else MASK
        calls = iter(range(20))

        def unit(leaf: torch.Tensor, calls=calls) -> torch.Tensor:
            return (math.sqrt(20) * torch.eye(20)[next(calls)]).view(5, 4).expand_as(leaf)

        monkeypatch.setattr(torch, "randn_like", unit)
        found = train.stability.jacobian(loop, loop(context, mask=mask).carry, context, probes=20)
        monkeypatch.undo()
        for item, length in enumerate(lengths):
            expected = dense(loop, context, item, length).square().sum() / (4 * length)
            own = found[item] if rows == 1 else found[item, :length].mean()
            testing.assert_close(own.detach(), expected, "E|v^T J|^2 / d = |J|_F^2 / d, padding aside")
        assert rows == 1 or not found[~MASK].any() or mask is None


def test_the_penalty_is_unbiased_with_noise():
    matrix = torch.randn(4, 4)
    many = torch.zeros(3000, 4)
    loop = linear(matrix)
    found = train.stability.jacobian(loop, loop(many).carry, many)
    error = found.std() / math.sqrt(3000)
    assert (found.mean() - matrix.square().sum() / 4).abs() < 4 * error


def test_the_penalty_teaches_attention_and_the_update():
    loop = attending(update=update.Gated(4), halt=halt.Converged(rtol=0.3))
    train.stability.jacobian(loop, loop(X).carry, X).mean().backward()
    dead = [name for name, weight in loop.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not dead


def test_the_penalty_calms_a_loop_and_costs_no_graph_without_gradients():
    loop = attending()
    optimizer = torch.optim.Adam(loop.parameters(), lr=0.02)
    sizes = []
    for _ in range(15):
        size = train.stability.jacobian(loop, loop(X).carry, X, probes=4).mean()
        optimizer.zero_grad()
        size.backward()
        optimizer.step()
        sizes.append(size.item())
    assert sizes[-1] < 0.6 * sizes[0]
    with torch.no_grad():
        assert not train.stability.jacobian(loop, loop(X).carry, X).requires_grad


def test_a_signal_of_bounded_length_is_not_overrun():
    table = torch.randn(3, 4)
    loop = Loop(body.Timed(body.Called(torch.tanh), lambda index: table[index]), 3)
    assert torch.isfinite(train.stability.jacobian(loop, loop(X).carry, X)).all()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0. One is enough"):
        train.stability.jacobian(loop, loop(X).carry, X, probes=0)


def test_padding_belongs_to_no_jacobian():
    """Where a body lets padding in, what is measured is the part of J from real positions to real positions."""
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    loop = Loop(lambda state, context, index: torch.einsum("ij,bjd->bid", mix, state), 2)
    carry = loop(X, mask=MASK).carry
    found = train.stability.jacobian(loop, carry, X, probes=3000)
    radius = observe.spectral_radius(loop, carry, X, iterations=400)
    for item, length in enumerate([5, 3, 1]):
        block = mix[:length, :length]
        assert found[item].item() == pytest.approx(block.square().sum().item() / length, rel=0.1)
        assert radius[item].item() == pytest.approx(torch.linalg.eigvals(block).abs().max().item(), rel=1e-2)


def test_states_that_are_trees_and_parts_that_do_not_move():
    loop = Loop(lambda state, context, index: (state[0] / 2, torch.ones(3, 4)), 2, init=lambda x: (x, x[:, 0]))
    found = train.stability.jacobian(loop, loop(X).carry, X, probes=400)
    testing.assert_close(observe.spectral_radius(loop, loop(X).carry, X), torch.full((3,), 0.5), "the larger of two")
    assert (found - 0.25 * 20 / 24).abs().max() < 0.05
    still = Loop(lambda state, context, index: torch.ones_like(state), 2)
    assert not train.stability.jacobian(still, still(X).carry, X).any()


# Penalties on trajectories


def recorded(loop: Loop, *arguments, **options) -> observe.Trajectory:
    with observe.record(loop, states=True) as tape:
        loop(*arguments, **options)
    return tape.only


def test_penalties_have_their_equations():
    stop = halt.Converged(rtol=0.0, atol=1.0)
    path = recorded(Loop(lambda state, context, index: state / 2, 9, halt=stop), torch.tensor([[8.0], [4.0], [2.0]]))
    assert path.steps.tolist() == [3, 2, 1]  # states 4, 2, 1; 2, 1; 1
    testing.assert_close(train.objectives.activation(path), torch.tensor([7.0, 2.5, 1.0]), "(16 + 4 + 1) / 3")
    testing.assert_close(train.objectives.temporal_activation(path), torch.tensor([2.5, 1.0, 0.0]), "(4 + 1) / 2")
    testing.assert_close(train.objectives.norm_stabiliser(path), torch.tensor([2.5, 1.0, 0.0]), "the same on one line")
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    path = recorded(linear(turn), torch.ones(1, 3, 2))
    testing.assert_close(train.objectives.norm_stabiliser(path), torch.zeros(1), "turning keeps the norm")
    assert train.objectives.temporal_activation(path) > 0.1


@pytest.mark.parametrize("name", ["activation", "temporal_activation", "norm_stabiliser"])
def test_penalties_see_trees_and_no_padding_and_are_alive(name: str):
    penalty = getattr(train.objectives, name)
    layer = torch.nn.Linear(4, 4)
    for rows in (1, 2):
        loop = Loop(lambda state, context, index: layer(state), 4, rows=rows, halt=halt.Converged(rtol=0.9))
        whole = penalty(recorded(loop, X, mask=MASK), MASK)
        other = penalty(recorded(loop, torch.where(MASK[..., None], X, 9.0), mask=MASK), MASK)
        testing.assert_close(other, whole, "padding changes nothing")
        alone = penalty(recorded(loop, X[1:2, :3]))
        testing.assert_close(alone[0], whole[1] if rows == 1 else whole[1, :3], "batch N equals batch 1")
        assert rows == 1 or not whole[~MASK].any()
        assert torch.autograd.grad(whole.sum(), layer.weight)[0].any()
    twin = Loop(lambda state, context, index: {"a": layer(state["a"]), "b": layer(state["b"])}, 4)
    path = recorded(twin.replace(init=lambda x: {"a": x, "b": x}), X)
    single = recorded(Loop(lambda state, context, index: layer(state), 4), X)
    testing.assert_close(penalty(path), penalty(single), "the mean over the tensors of a state")


def test_penalties_and_gradients_need_states():
    with observe.record(loop := linear(torch.eye(4))) as tape:
        loop(X)
    for ask in (train.objectives.activation, lambda path: observe.gradients(path, X.sum())):
        with pytest.raises(ValueError, match=r"states of a trajectory must be recorded, got None\. Take observe\.rec"):
            ask(tape.only)


# Spectral normalisation


def operator(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The dense matrix of an affine map."""
    found = torch.autograd.functional.jacobian(module, x)
    return found.reshape(-1, x.numel())


@pytest.mark.parametrize("bound", [0.5, 2.0])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torch.nn.Linear(5, 7), (5,)),
        (lambda: torch.nn.Conv1d(2, 3, 3, padding=1), (1, 2, 9)),
        (lambda: torch.nn.Conv1d(2, 3, 3, padding=2, dilation=2), (1, 2, 9)),
        (lambda: torch.nn.Conv2d(2, 4, 3, stride=2, padding=2, groups=2), (1, 2, 5, 5)),
        (lambda: torch.nn.ConvTranspose1d(2, 3, 3, stride=2), (1, 2, 5)),
        (lambda: torch.nn.ConvTranspose2d(2, 3, (3, 1), padding=(1, 0)), (1, 2, 5, 4)),
        (lambda: torch.nn.Conv3d(1, 2, (1, 3, 3)), (1, 1, 2, 4, 4)),
    ],
)
def test_no_map_stretches_more_than_the_bound(make, shape, bound: float):
    module = nn.spectral_norm(make(), bound)
    norm = torch.linalg.matrix_norm(operator(module, torch.zeros(shape)), 2).item()
    assert norm <= bound * 1.001
    if isinstance(module, torch.nn.Linear):
        assert norm == pytest.approx(bound, rel=1e-3)
        testing.assert_close(
            torch.linalg.matrix_norm(module.weight.detach(), 2), torch.tensor(bound), "the norm of the weight"
        )


def test_all_maps_of_a_body_are_bounded_saved_and_taught():
    block = nn.spectral_norm(nn.Block(6, 2), 0.9)
    maps = [inner for inner in block.modules() if isinstance(inner, torch.nn.Linear)]
    assert len(maps) == 6
    for inner in maps:
        assert torch.linalg.matrix_norm(inner.weight.detach(), 2) == pytest.approx(0.9, rel=1e-3)
    testing.parts.check_module(block.eval())
    other = nn.spectral_norm(nn.Block(6, 2), 0.9).eval()
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 3, 6)
    testing.assert_close(other(x), block(x), "loaded, it is the same")
    testing.check_loop(Loop(block, 3).eval(), x)
    testing.parts.check_alive(block, block.train()(x))


def test_held_weights_are_one_map_for_all_steps():
    torch.manual_seed(0)
    block = nn.spectral_norm(nn.Block(4, 2, placement=nn.Post()), 0.9)
    weight = block.feedforward[0] if isinstance(block.feedforward, torch.nn.Sequential) else block.attention.out
    with torch.no_grad():
        weight.parametrizations["weight"].original.add_(torch.randn_like(weight.weight))  # the estimate lags behind
    first = copy.deepcopy(block)
    results = {}
    for rule in (grad.Full(), grad.Checkpointed(2)):
        twin = copy.deepcopy(first)
        with nn.held(twin):
            value = Loop(twin, 4, grad=rule)(X).value
            results[rule] = (value, *torch.autograd.grad(value.square().sum(), list(twin.parameters())))
    testing.assert_close(*results.values(), "steps that are run again see the same weights")
    with nn.held(first):
        testing.parts.check_alive(first, Loop(first, 5, grad=grad.Truncated(2))(X).value)
        assert first.attention.query.weight is first.attention.query.weight
    assert first.attention.query.weight is not first.attention.query.weight


def test_spectral_norm_refuses_what_it_cannot_bound():
    layer = torch.nn.Linear(2, 2)
    for bound in (0.0, math.inf):
        with pytest.raises(ValueError, match=f"bound must be above 0 and finite, got {bound}. Below one"):
            nn.spectral_norm(layer, bound)
    with pytest.raises(ValueError, match="must hold a linear map or a convolution to be bounded, got ReLU. Other"):
        nn.spectral_norm(torch.nn.ReLU())
    half = torch.nn.Sequential(torch.nn.Linear(2, 2), nn.spectral_norm(layer))
    with pytest.raises(ValueError, match="must be without parametrization, got one that has it: 1. spectral_norm is"):
        nn.spectral_norm(half)
    assert not parametrize.is_parametrized(half[0]), "nothing is changed then"
    with pytest.raises(ValueError, match="must pad with zeros to be bounded, got 'circular' in Conv1d. Other padding"):
        nn.spectral_norm(torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"))
    torch.nn.init.zeros_(half[0].weight)
    with pytest.raises(ValueError, match="a map must not be zero to be normalised, got zeros in Linear. Initialise"):
        nn.spectral_norm(half[0])


# Dropout


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inner", [update.Replace(), update.Momentum(0.3), update.LSTM(4)], ids=lambda part: type(part))
def test_one_mask_for_all_steps_of_a_run(inner, shared: bool):
    drop = update.Dropout(inner, 0.4, shared=shared)
    loop = Loop(body.Called(torch.nn.Linear(4, 4)), 6, update=drop, readout=readout.Stacked())
    mask, _ = loop.start(X).update
    testing.assert_close(mask.unique(), torch.tensor([0.0, 1 / 0.6]), "hidden, or scaled by 1 / (1 - rate)")
    assert torch.equal(mask, mask[:, :1].expand_as(mask)) == shared
    assert not torch.equal(mask, mask[:1].expand_as(mask)), "rows have masks of their own"
    torch.manual_seed(3)
    whole = loop(X)
    if isinstance(inner, update.Replace):
        hidden = whole.carry.update[0] == 0
        assert all(torch.equal(state == 0, hidden) for state in whole.value), "the same features at every step"
    for cut in range(1, 6):
        torch.manual_seed(3)
        piece = loop(X, max_steps=cut)
        torch.manual_seed(cut)  # nothing is drawn after the start
        rest = loop(X, carry=piece.carry)
        testing.assert_close(rest[:3], whole[:3], f"cut at step {cut}, it is the same loop with the same mask")
        assert torch.equal(rest.carry.update[0], whole.carry.update[0])
    torch.manual_seed(3)
    piece = loop(X, max_steps=2)
    testing.assert_close(loop.eval()(X, carry=piece.carry)[:3], whole[:3], "a run keeps its mask to its end")
    testing.assert_close(loop.eval()(X).value, loop.replace(update=inner)(X).value, "evaluation changes nothing")


def test_dropout_keeps_its_rate_its_fixed_point_and_checkpoints():
    drop = update.Dropout(update.Damped(0.5), 0.25)
    mask, inner = drop.start(torch.ones(200, 50))
    assert inner is None and mask.mean().item() == pytest.approx(1.0, abs=0.02)
    assert not drop.keeps_fixed_points and drop.eval().keeps_fixed_points
    assert not update.Dropout(update.GRU(4), 0.1).eval().keeps_fixed_points
    drop.train()
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.normal_(layer.weight, std=0.1)
    loop = Loop(body.Injected(body.Called(layer), nn.Add()), 80, update=drop)
    carry = loop(X).carry
    again = loop.advance(carry, X)
    testing.assert_close(again.state, carry.state, "a masked map has a fixed point")
    found = []
    for rule in (grad.Full(), grad.Checkpointed(3)):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(loop.replace(grad=rule)(X, max_steps=7).value.sum(), layer.weight))
    testing.assert_close(found[0], found[1], "replayed with the same mask")


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan])
def test_dropout_refuses_a_rate_out_of_range(rate: float):
    with pytest.raises(ValueError, match=f"rate must be above 0 and below 1, got {rate}. Take the inner update"):
        update.Dropout(update.Replace(), rate)


# Gradients step by step


@pytest.mark.parametrize("rule", [grad.Full(), grad.Checkpointed(3)])
@pytest.mark.parametrize(("factor", "verdict"), [(0.25, "vanishing"), (0.9, "neither"), (4.0, "exploding")])
def test_a_linear_map_has_the_growth_of_its_factor(factor: float, verdict: str, rule):
    stop = halt.Any(halt.Converged(rtol=0.0, atol=1e-30))
    x = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]], requires_grad=True)
    loop = Loop(lambda state, context, index: state * factor, 9, halt=stop, grad=rule)
    with observe.record(loop, states=True) as tape:
        value = loop(x).value
    health = observe.gradients(tape.only, value[0].norm())
    testing.assert_close(health.norms[:, 0], factor ** torch.arange(8.0, -1, -1), "dL/dh_t = a^(T - t)")
    testing.assert_close(health.growth[0], torch.tensor(factor), "growth is the factor")
    assert health.vanishing.tolist() == [verdict == "vanishing", False]
    assert health.exploding.tolist() == [verdict == "exploding", False]
    assert tape.only.steps[1] == 1 and health.growth[1].isnan(), "one step has no growth"
    assert not health.norms[:, 1].any() and "unknown in 1" in health.describe()
    value.sum().backward()  # the graph is still there


def test_thresholds_and_losses_on_many_values():
    loop = linear(torch.diag(torch.tensor([0.5, 0.5])), 4)
    x = torch.ones(2, 3, 2, requires_grad=True)
    with observe.record(loop, states=True) as tape:
        value = loop(x).value
    health = observe.gradients(tape.only, value, torch.ones_like(value))
    testing.assert_close(health.norms[-1], torch.full((2,), math.sqrt(6)), "over everything in a row")
    assert not health.vanishing.any()
    assert observe.gradients(tape.only, value.sum(), low=0.2).vanishing.all(), "0.5 ** 3 < 0.2"
    assert "vanishing in 0 rows, exploding in 0" in health.describe()
    with pytest.raises(ValueError, match=r"low must be above 0 and below high, got 2.0 and 1.0. Ratios around one"):
        observe.gradients(tape.only, value.sum(), low=2.0, high=1.0)


@pytest.mark.parametrize("rule", [grad.Truncated(2), grad.OneStep()])
def test_steps_without_a_gradient_are_refused(rule):
    loop = attending(grad=rule)
    with observe.record(loop, states=True) as tape:
        value = loop(X).value
    with pytest.raises(
        ValueError, match=r"every step must be differentiated .* got none at steps \[1, 2, 3, 4.*grad.Full"
    ):
        observe.gradients(tape.only, value.sum())


def test_early_exits_may_be_all_that_is_taught():
    loop = attending(readout=readout.Every())
    with observe.record(loop, states=True) as tape:
        value = loop(X).value
    norms = observe.gradients(tape.only, value[2].square().sum()).norms
    assert norms[:3].all() and not norms[3:].any()


# Contraction and the spectral radius


@pytest.mark.parametrize("factor", [0.5, -0.25])
def test_contraction_is_the_factor_of_a_linear_map(factor: float):
    loop = Loop(lambda state, context, index: factor * state + context, 40, halt=halt.Converged(rtol=1e-3))
    with observe.record(loop) as tape:
        loop(x := torch.tensor([[1.0, -3.0], [0.5, 20.0]]))
    path = tape.only
    testing.assert_close(observe.contraction(path), torch.full((2,), abs(factor)), "residuals shrink by the factor")
    testing.assert_close(path.distances[0], (factor * x).norm(dim=-1), "|h_1 - h_0|")
    with observe.record(loop) as tape:
        loop(x, max_steps=1)
    assert observe.contraction(tape.only).isnan().all()


def test_rounding_is_no_contraction():
    with observe.record(loop := Loop(lambda state, context, index: state / 2 + context, 60)) as tape:
        loop(torch.ones(1, 3))
    assert observe.contraction(tape.only).item() == pytest.approx(0.5, rel=1e-2)
    assert abs(observe.contraction(tape.only, floor=-1.0).item() - 0.5) > 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_spectral_radius_is_the_largest_eigenvalue(seed: int, symmetric: bool):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 3
    matrix = matrix + matrix.T if symmetric else matrix
    x = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    loop = linear(matrix, 3)
    found = observe.spectral_radius(loop, loop(x).carry, x, iterations=200)
    expected = torch.linalg.eigvals(matrix).abs().max()
    assert (found / expected - 1).abs().max() < 2e-3


def test_the_spectral_radius_of_attention_with_padding():
    for rows in (1, 2):
        loop = attending(rows=rows)
        context = {"x": X, "mask": MASK}
        carry = loop(context, mask=MASK).carry
        found = observe.spectral_radius(loop, carry, context, iterations=200)
        expected = [torch.linalg.eigvals(dense(loop, context, i, n)).abs().max() for i, n in enumerate([5, 3, 1])]
        assert (found / torch.stack(expected) - 1).abs().max() < 2e-2
    rows = torch.tensor([True, False, True])
    loop = attending()
    carry = loop(X, mask=rows).carry
    assert observe.spectral_radius(loop, carry, X)[1] < 1e-6, "padding has no map"


def test_the_spectral_radius_is_seen_without_noise_or_gradients():
    loop = attending()
    carry = loop(X).carry
    before = torch.get_rng_state()
    with torch.no_grad():
        found = observe.spectral_radius(loop, carry, X)
    assert torch.equal(torch.get_rng_state(), before) and not found.requires_grad
    alone = observe.spectral_radius(loop, loop(X[1:2]).carry, X[1:2])
    testing.assert_close(alone, found[1:2], "batch N equals batch 1")
    shift = Loop(lambda state, context, index: state @ torch.diag(torch.ones(3), 1), 2)
    assert observe.spectral_radius(shift, shift(X).carry, X).max() < 1e-6, "nilpotent"
    with pytest.raises(ValueError, match="iterations must be at least 4, got 3. The second half"):
        observe.spectral_radius(loop, carry, X, iterations=3)


def test_the_memory_of_the_update_may_belong_to_the_map():
    """The heavy ball: with r = 1 its eigenvalues solve z^2 - (a + m) z + m = 0; complex ones have |z| = sqrt(m)."""
    loop = Loop(lambda state, context, index: 0.5 * state, 4, update=update.Momentum(0.64))
    carry = loop(X).carry
    testing.assert_close(observe.spectral_radius(loop, carry, X), torch.full((3,), 0.5), "held")
    found = observe.spectral_radius(loop, carry, X, memory=True, iterations=300)
    assert (found - 0.8).abs().max() < 2e-3


def test_a_step_is_taken_anew_for_rows_that_have_stopped():
    loop = Loop(lambda state, context, index: state / 2, 9, halt=halt.Converged(atol=10.0))
    out = loop(X)
    assert out.halted.all()
    taken = jacobian.step(loop, out.carry, X)
    testing.assert_close(taken.there[0], out.carry.state / 2, "whether stopped or not")
