"""Learned halting by its equations: weights, gradients, divergences, draws, and what estimators say of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draw
from torch import Tensor, nn

from loopaware import Loop, Rows, grad, halt, observe, readout, testing
from loopaware.train import objectives
from parts import DIM, PARTS, mixing


class Logit(nn.Module):
    """A learned rule that finds its logit in the last feature of the state; the unused number makes it learned."""

    learned, stops, mixes = True, True, False

    def start(self, state, rows):
        return None

    def forward(self, old, new, memory, index):
        score = new[..., -1]
        return halt.measure.hard(score >= 0, score), None


def scripted(context: Tensor) -> Tensor:
    """The body of `told`: step t says what the context's axis 1 holds at t."""
    return context


def told(rule: nn.Module, mix=None) -> Loop:
    """A loop whose state at step t is context[:, t]: features, and last the logit. Shapes: context (B, T, d)."""
    return Loop(
        lambda state, context, index: context[:, index],
        max_steps=99,
        init=lambda context: torch.zeros_like(context[:, 0]),
        halt=rule,
        readout=readout.Weighted() if mix is None else mix,
    )


def script(chances: Tensor, values: Tensor) -> Tensor:
    """A context for `told`. Shapes: chances, values (B, T) -> (B, T, 2)."""
    return torch.stack([values, torch.logit(chances)], -1)


def run(rule: nn.Module, context: Tensor, mix=None):
    loop = told(rule, mix)
    with observe.record(loop, states=True) as tape:
        out = loop(context, max_steps=context.shape[1])
    return out, tape.only


def chances(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


VALUES = torch.tensor([[1.0, -2.0, 3.0, 5.0]], dtype=torch.float64)


def test_act_sums_raw_chances_and_gives_the_rest_to_the_exit():
    given = chances([0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1], [0.995, 0.5, 0.5, 0.5])
    out, path = run(halt.ACT(Logit()), script(given, VALUES.expand(3, -1)))
    expected = torch.tensor([[0.3, 0.3, 0.3, 0.1], [0.1, 0.1, 0.1, 0.7], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    testing.assert_close(path.weights.T, expected, "p_n = h_n, p_N = R, at the exit and at the bound")
    assert out.steps.tolist() == [4, 4, 1] and out.halted.tolist() == [True, False, True]
    testing.assert_close(out.value[:, 0], (expected * VALUES).sum(1), "the answer is the mean under p")
    testing.assert_close(objectives.ponder_cost(path), torch.tensor([4.1, 4.7, 2.0], dtype=torch.float64), "N + R")


def test_the_recursive_mix_has_other_weights():
    """The weights of .3, .3, .3 and a rest of .1, which mathematics and tensor2tensor see differently."""
    given = chances([0.3, 0.3, 0.3, 0.3])
    for at, weight in enumerate([0.1323, 0.189, 0.27, 0.1]):
        out, _ = run(halt.ACT(Logit()), script(given, torch.eye(4)[at : at + 1].double()), readout.Tensor2Tensor())
        assert out.value[0, 0].item() == pytest.approx(weight, abs=1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("exits", [True, False])
def test_act_has_the_papers_gradient(tau: float, exits: bool):
    """Equations 19 and 20, and finite differences: zero for h_N, (y_n - y_N) dL/dy - tau before it."""
    torch.manual_seed(0)
    given = (torch.rand(5, 6, dtype=torch.float64) * (0.4 if exits else 0.12) + 0.02).requires_grad_()
    values = torch.randn(5, 6, dtype=torch.float64)

    def loss() -> tuple[Tensor, Tensor, Tensor]:
        out, path = run(halt.ACT(Logit()), script(given, values))
        answer = out.value[:, 0]
        return (answer.square() + tau * objectives.ponder_cost(path)).sum(), answer, out.steps

    total, answer, steps = loss()
    got = torch.autograd.grad(total, given)[0]
    last = values.gather(1, steps[:, None] - 1)
    before = torch.arange(1, 7) < steps[:, None]
    expected = (2 * answer.detach()[:, None] * (values - last) - tau) * before
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (steps == 6).all() if not exits else (steps < 6).any()
    for row, column in [(0, 0), (1, 1), (4, 2)]:
        pair = []
        for sign in (1, -1):
            with torch.no_grad():
                given[row, column] += sign * 1e-6
                moved, _, then = loss()
                given[row, column] -= sign * 1e-6
            assert torch.equal(then, steps), "the finite difference jumped over a change of N"
            pair.append(moved.item())
        assert (pair[0] - pair[1]) / 2e-6 == pytest.approx(got[row, column].item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", [halt.Ponder, halt.StickBreaking])
def test_the_stick_has_its_closed_form(kind):
    torch.manual_seed(1)
    given = torch.rand(4, 7, dtype=torch.float64) * 0.5
    rule = kind(Logit(), epsilon=1e-9)
    _, path = run(rule, script(given, VALUES[:, :1].expand(4, 7)))
    stay = torch.cumprod(1 - given, 1)
    before = torch.cat([torch.ones(4, 1), stay[:, :-1]], 1)
    closed = torch.cat([(given * before)[:, :-1], before[:, -1:]], 1)
    torch.testing.assert_close(path.weights.T, closed, rtol=1e-12, atol=1e-14)
    steps = (closed * torch.arange(1, 8)).sum(1)
    testing.assert_close(objectives.expected_steps(path), steps, "the expected steps are exact")


def test_the_stick_ends_when_little_is_left():
    given = chances([0.5] * 8, [0.2] * 8)
    out, path = run(halt.Ponder(Logit(), epsilon=0.05), script(given, torch.ones(2, 8).double()))
    assert out.steps.tolist() == [5, 8] and out.halted.tolist() == [True, False]
    testing.assert_close(
        path.weights[4, 0], torch.tensor(0.5**4, dtype=torch.float64), "the rest goes to the exit step"
    )
    testing.assert_close(
        path.weights[7, 1], torch.tensor(0.8**7, dtype=torch.float64), "and to the last step at the bound"
    )


def test_gradients_of_the_stick_are_those_of_its_closed_form():
    given = chances([0.3, 0.6, 0.2], [0.1, 0.2, 0.9]).requires_grad_()
    values = VALUES[:, :3].expand(2, 3)
    out, path = run(halt.Ponder(Logit(), epsilon=1e-6), script(given, values))
    losses = torch.stack(path.states)[..., 0].square()
    got = torch.autograd.grad(objectives.expected(path, losses).sum(), given, retain_graph=True)[0]
    a, b, _ = given.unbind(1)
    squares = values.square()
    exact = a * squares[:, 0] + (1 - a) * b * squares[:, 1] + (1 - a) * (1 - b) * squares[:, 2]
    testing.assert_close(got, torch.autograd.grad(exact.sum(), given)[0], "the exact gradient")
    assert not got[:, 2].any() and out.value.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    rows=draw.lists(draw.lists(draw.floats(-30, 30), min_size=6, max_size=6), min_size=1, max_size=3),
    rate=draw.floats(0.01, 0.99),
    epsilon=draw.sampled_from([1e-3, 0.05]),
)
def test_the_divergence_is_never_negative(rows, rate, epsilon):
    logits = torch.tensor(rows, dtype=torch.float64)
    context = torch.stack([torch.ones_like(logits), logits], -1).requires_grad_()
    _, path = run(halt.Ponder(Logit(), epsilon=epsilon), context)
    divergence = objectives.geometric_kl(path, rate)
    assert (divergence >= -1e-12).all()
    assert torch.autograd.grad(divergence.sum(), context)[0].isfinite().all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_divergence_is_zero_at_the_prior(rate):
    context = script(torch.full((1, 6), rate, dtype=torch.float64), torch.ones(1, 6).double()).requires_grad_()
    _, path = run(halt.Ponder(Logit(), epsilon=1e-3), context)
    divergence = objectives.geometric_kl(path, rate)
    assert divergence.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(divergence.sum(), context)[0].abs().max() < 1e-12
    assert objectives.geometric_kl(path, rate / 2).item() > 1e-3


def test_the_divergence_is_forward():
    """KL(p || g) and not KL(g || p), which public copies take."""
    _, path = run(halt.Ponder(Logit(), epsilon=1e-6), script(chances([0.5, 0.5, 0.5]), VALUES[:, :3]))
    p, g = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.16, 0.64])
    assert objectives.geometric_kl(path, 0.2).item() == pytest.approx((p * (p / g).log()).sum().item(), rel=1e-6)


def test_pondernet_weighs_each_rows_losses_by_its_own_weights():
    given, losses = chances([0.9, 0.9], [0.1, 0.1]), torch.tensor([[1.0, 10.0], [2.0, 20.0]], dtype=torch.float64)
    _, path = run(halt.Ponder(Logit(), epsilon=1e-6), script(given, VALUES[:, :2].expand(2, 2)))
    expected = torch.tensor([0.9 * 1 + 0.1 * 2, 0.1 * 10 + 0.9 * 20], dtype=torch.float64)
    testing.assert_close(objectives.expected(path, losses), expected, "each row has its own weights")
    both = objectives.pondernet(path, losses, rate=0.3, beta=0.5)
    testing.assert_close(both, expected + 0.5 * objectives.geometric_kl(path, 0.3), "and its own divergence")
    with pytest.raises(ValueError, match="one number for each step and row, shape .2, 2., got .2,."):
        objectives.pondernet(path, losses.mean(1))
    with pytest.raises(ValueError, match="rate must be above 0.0 and at most 0.9"):
        objectives.geometric_kl(path, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [part for part in PARTS if part.slot == "halt"], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_a_row_sum_to_one(part, dtype, training):
    """At the exit and at the bound, in every precision; and the answer is their mean to that precision's rounding."""
    torch.manual_seed(0)
    context = torch.randn(3, 5, DIM) * torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    loop = Loop(mixing(), 7, rows=2, halt=part.make(), readout=readout.Weighted()).to(dtype).train(training)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    with observe.record(loop, states=True) as tape, torch.no_grad():
        out = loop(context.to(dtype), mask=mask)
    sums = tape.only.weights.sum(0)
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    assert (sums[mask] - 1).abs().max() <= 1e-6 and not sums[~mask].any() and out.value.dtype == dtype
    mean = sum(w[..., None] * h.to(w.dtype) for w, h in zip(tape.only.weights, tape.only.states, strict=True))
    torch.testing.assert_close(out.value[mask], mean.to(dtype)[mask])


def test_rules_of_rules_keep_soft_weights_and_close_them():
    given = chances([0.2, 0.2, 0.2, 0.2, 0.2, 0.2])
    context = script(given, torch.ones(1, 6).double())
    never, act = halt.Never(), halt.ACT(Logit())
    _, plain = run(halt.Any(act, never), context)
    testing.assert_close(
        plain.weights[:, 0], torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64), "ACT itself"
    )
    still = halt.Converged(rtol=0.5)
    out, cut = run(halt.Any(act, still), context)
    assert out.steps.tolist() == [2] and out.halted.all()
    testing.assert_close(
        cut.weights[:, 0], torch.tensor([0.2, 0.8], dtype=torch.float64), "what is left goes to the exit"
    )
    out, longer = run(halt.Patience(act, times=2), context)
    assert out.steps.tolist() == [6] and out.halted.all()
    testing.assert_close(
        longer.weights[:, 0], torch.tensor([0.2] * 4 + [0.0, 0.2], dtype=torch.float64), "the exit has the rest"
    )
    _, waits = run(halt.All(act, never), context)
    assert not waits.halted.any() and waits.weights[:, 0].tolist() == pytest.approx([0.2] * 4 + [0.0, 0.2])
    assert halt.Any(act, still).mixes and not halt.Any(still, act).mixes and halt.Before(act).mixes


def test_before_judges_the_input_of_the_step():
    context = script(chances([0.9, 0.4, 0.2]), VALUES[:, :3])
    rule = halt.Before(Logit(), signal=lambda state, index: state + index)
    _, path = run(halt.ACT(rule), context)
    shifted = torch.stack([torch.zeros(1).double(), context[:, 0, 1] + 1, context[:, 1, 1] + 2])
    testing.assert_close(path.scores, shifted[: len(path.scores)], "logits of h_{t-1} + signal(t)")


def test_warm_up_holds_halting_back_and_counts_runs():
    rule, state = halt.Linear(2, bias=-1.0, warmup=4, hold=6.0), torch.zeros(3, 2)

    def score() -> float:
        return rule(state, state, rule.start(state, Rows()), 0)[0].score[0].item()

    assert [score() for _ in range(6)] == pytest.approx([-7.0, -5.5, -4.0, -2.5, -1.0, -1.0])
    again = halt.Linear(2, bias=0.0, warmup=4, hold=6.0)
    again.load_state_dict(rule.state_dict())
    assert again.runs.item() == 6
    assert halt.Linear(2, bias=-1.0, warmup=4).eval().start(state, Rows())[1] is None
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1. 0 is none"):
        halt.Linear(2, warmup=-1)


def test_drawn_stops_have_their_chances():
    given = torch.tensor([0.2, 0.5, 0.9]).expand(4000, 3)
    context = script(given, torch.ones(4000, 3))
    for rule in (
        halt.Sampled(Logit()),
        halt.Sampled(Logit(), seed=None).eval(),
        halt.Ponder(Logit(), seed=None).eval(),
    ):
        torch.manual_seed(0)
        loop = told(rule).train(rule.training)
        out = loop(context, max_steps=3)
        shares = torch.bincount(out.steps, minlength=4)[1:] / 4000
        testing.assert_close(shares.round(decimals=1), torch.tensor([0.2, 0.4, 0.4]), "p_n = h_n prod (1 - h_j)")
    seeds = [
        told(halt.Sampled(Logit(), seed=seed).eval()).eval()(context[:1], max_steps=3).steps for seed in range(2000)
    ]
    shares = torch.bincount(torch.cat(seeds), minlength=4)[1:] / 2000
    testing.assert_close(shares.round(decimals=1), torch.tensor([0.2, 0.4, 0.4]), "over seeds as over rows")


def test_ponder_in_evaluation_is_drawn_or_expected():
    context = script(chances([0.4, 0.4, 0.4, 0.4]), VALUES)
    drawn, path = run(halt.Ponder(Logit()).eval(), context)
    assert sorted(path.weights[:, 0].tolist())[-1] == 1.0 and drawn.halted.shape == (1,)
    expected, path = run(halt.Ponder(Logit(), sampled=False, epsilon=1e-3).eval(), context)
    p = torch.tensor([0.4, 0.24, 0.144, 0.216], dtype=torch.float64)
    testing.assert_close(path.weights[:, 0], p, "evaluated in expectation")
    testing.assert_close(expected.value[:, 0], (p * VALUES).sum(1), "the expected state")


def test_straight_through_is_hard_forward_and_soft_backward():
    given = chances([0.3, 0.6, 0.2], [0.7, 0.6, 0.2])
    context = script(given, VALUES[:, :3].expand(2, 3)).requires_grad_()
    for identity in (False, True):
        rule = halt.StraightThrough(Logit(), drawn=False, identity=identity)
        out, path = run(rule, context)
        assert path.weights.T.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], "exactly hard"
        testing.assert_close(
            out.value[:, 0], torch.tensor([-2.0, 1.0], dtype=torch.float64), "the state of the decision"
        )
        assert out.steps.tolist() == [3, 3], "in training all steps are run"
        got = torch.autograd.grad(out.value[:, 0].sum(), context)[0][..., 1]
        slope = torch.ones_like(given) if identity else given * (1 - given)
        # Row 0, d = (0, 1, 0): value = d1 v1 + (1 - d1)(d2 v2 + (1 - d2) v3), the last decision being the bound's.
        v1, v2, v3 = VALUES[0, :3]
        expected = torch.stack(
            [torch.stack([v1 - v2, v2 - v3, v3 * 0]), torch.stack([v1 - v3 * 0 - v2, v3 * 0, v3 * 0])]
        )
        expected[1] = torch.stack([v1 - v2, v3 * 0, v3 * 0])
        testing.assert_close(got, expected * slope, "dd/dz is h (1 - h), or 1")
        assert run(rule.eval(), context)[0].steps.tolist() == [2, 1], "in evaluation the rule inside stops"


def test_gumbel_is_the_binary_case_of_torchs():
    """At the same noise it decides and differentiates as F.gumbel_softmax over (go on, stop) does."""
    z, temperature = torch.tensor([[0.3], [-1.0], [2.0]]), 0.7
    context = torch.stack([torch.ones(3, 1), z], -1).requires_grad_()
    rule = halt.Gumbel(Logit(), temperature)
    torch.manual_seed(0)
    uniform = torch.rand(3)
    noise = uniform.log() - torch.log1p(-uniform)
    torch.manual_seed(0)
    verdict, _ = rule(None, context[:, 0], rule.start(context[:, 0], Rows()), 0)
    pair = torch.stack([torch.zeros(3), z[:, 0] + noise], -1)
    soft = (pair / temperature).softmax(-1)[:, 1]
    testing.assert_close(verdict.weight.detach(), (soft > 0.5).float(), "it stops where the noisy logit leads")
    slope = torch.autograd.grad(verdict.weight.sum(), context)[0][:, 0, 1]
    testing.assert_close(slope, soft * (1 - soft) / temperature, "the softmax's slope")
    frequency = torch.stack([run_gumbel(rule, context) for _ in range(3000)]).mean(0)
    oracle = torch.stack(
        [nn.functional.gumbel_softmax(torch.stack([z[:, 0] * 0, z[:, 0]], -1), hard=True)[:, 1] for _ in range(3000)]
    ).mean(0)
    torch.testing.assert_close(frequency, oracle, rtol=0, atol=0.04)


def run_gumbel(rule: nn.Module, context: Tensor) -> Tensor:
    return rule(None, context[:, 0], rule.start(context[:, 0], Rows()), 0)[0].weight.detach()


def exact_gradient(context: Tensor, price: float) -> Tensor:
    """Of the expected cost, by all stops and their chances."""
    _, path = run(halt.StickBreaking(Logit(), epsilon=1e-9), context)
    cost = torch.stack(path.states)[..., 0].square() + price * path.numbers
    return torch.autograd.grad(objectives.expected(path, cost).sum(), context)[0]


def test_reinforce_is_unbiased_and_keeps_the_gradient_through_the_answer():
    torch.manual_seed(0)
    context = script(chances([0.3, 0.5, 0.4]), VALUES[:, :3]).requires_grad_()
    exact = exact_gradient(context, price=0.2)
    count, runs = 3000, []
    many = context.expand(count, -1, -1)
    for _ in range(4):
        out, path = run(halt.Sampled(Logit()), many)
        runs.append((path, out.value[:, 0].square() + 0.2 * out.steps))
    loss = objectives.reinforce([path for path, _ in runs], torch.stack([cost for _, cost in runs]))
    each = torch.autograd.grad(loss.sum(), many, retain_graph=True)[0] if many.requires_grad else None
    error = each.std(0) / math.sqrt(count)
    bias = each.mean(0) - exact[0]
    assert (bias.abs() <= 4 * error + 1e-12).all(), "within four standard errors of the exact gradient"
    assert exact[0, :, 0].abs().min() > 0.1, "the answer's own gradient is part of it"
    with pytest.raises(ValueError, match="at least two runs and a cost for each, got 1 and 1"):
        objectives.reinforce([runs[0][0]], runs[0][1][None])


def test_the_leave_one_out_baseline_lowers_the_variance():
    torch.manual_seed(0)
    many = script(chances([0.3, 0.5, 0.4]), VALUES[:, :3] + 10).expand(500, -1, -1).requires_grad_()
    paths, costs = [], []
    for _ in range(2):
        out, path = run(halt.Sampled(Logit()), many)
        paths.append(path)
        costs.append(out.value[:, 0])
    costs = torch.stack(costs)
    with_it = torch.autograd.grad(objectives.reinforce(paths, costs).sum(), many, retain_graph=True)[0]
    plain = (costs.detach() * torch.stack([objectives.log_probability(path) for path in paths])).mean(0)
    without = torch.autograd.grad(plain.sum(), many)[0]
    assert with_it[..., 1].var(0).sum() < 0.1 * without[..., 1].var(0).sum()


def test_losses_of_steps_count_the_steps_a_row_took():
    given = chances([0.6, 0.6, 0.6], [0.2, 0.2, 0.2])
    out, path = run(halt.ACT(Logit()), script(given, VALUES[:, :3].expand(2, 3)))
    assert out.steps.tolist() == [2, 3]
    losses = torch.tensor([[1.0, 1.0], [3.0, 3.0], [50.0, 8.0]], dtype=torch.float64)
    testing.assert_close(
        objectives.multi_exit(path, losses), torch.tensor([2.0, 4.0], dtype=torch.float64), "all alike"
    )
    later = objectives.multi_exit(path, losses, weight=lambda step: step)
    testing.assert_close(
        later, torch.tensor([7 / 3, 31 / 6], dtype=torch.float64), "weights are normalised for each row"
    )
    behind = objectives.multi_exit(path, losses, weight=lambda step: step > 1)
    testing.assert_close(behind, torch.tensor([3.0, 5.5], dtype=torch.float64), "only late exits")
    right = torch.tensor([[False, False], [True, False], [True, True]])
    z6, z2 = math.log(0.6), math.log(0.2)
    expected = torch.tensor([-(math.log(0.4) + z6) / 2, -(2 * math.log(0.8) + z2) / 3], dtype=torch.float64)
    testing.assert_close(objectives.halting(path, right), expected, "cross-entropy of the chances")
    entropy = [-(h * math.log(h) + (1 - h) * math.log(1 - h)) for h in (0.6, 0.2)]
    testing.assert_close(
        objectives.confidence(path), torch.tensor(entropy, dtype=torch.float64), "the entropy of the chances"
    )
    steps = objectives.expected_steps(path)
    spread = objectives.mean(objectives.step_variance(path), path)
    assert spread.item() == pytest.approx(steps.var(unbiased=False).item())


def test_ouros_first_stage_has_its_closed_form():
    """sum_t p_t L_t - beta H(p), p_T = what is left; the last chance of the rule counts for nothing."""
    given = chances([0.3, 0.6, 0.2], [0.1, 0.2, 0.9]).requires_grad_()
    losses = torch.tensor([[1.0, 4.0], [3.0, 2.0], [0.5, 7.0]], dtype=torch.float64)
    _, path = run(halt.Ponder(Logit(), epsilon=1e-9), script(given, VALUES[:, :3].expand(2, 3)))
    a, b, _ = given.unbind(1)
    p = torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)])
    entropy = -(p * p.log()).sum(0)
    testing.assert_close(objectives.exit_entropy(path), entropy, "the entropy of the exit")
    uniform = torch.full_like(p, 1 / 3)
    testing.assert_close((p * (p / uniform).log()).sum(0), math.log(3) - entropy, "log T less it is the divergence")
    own, expected = objectives.ouro(path, losses, beta=0.3), (p * losses).sum(0) - 0.3 * entropy
    testing.assert_close(own, expected, "the loss")
    pair = [torch.autograd.grad(loss.sum(), given, retain_graph=True)[0] for loss in (own, expected)]
    testing.assert_close(pair[0], pair[1], "and its gradient")
    assert not pair[0][:, 2].any() and objectives.ouro(path, losses)[0] > own[0]
    with pytest.raises(ValueError, match="or count positions as rows: path.among"):
        objectives.ouro(path, losses[..., None])


@settings(max_examples=40, deadline=None)
@given(rows=draw.lists(draw.lists(draw.floats(-200, 200), min_size=5, max_size=5), min_size=1, max_size=3))
def test_the_entropy_of_the_exit_is_that_of_a_distribution(rows):
    logits = torch.tensor(rows, dtype=torch.float64)
    context = torch.stack([torch.ones_like(logits), logits], -1).requires_grad_()
    _, path = run(halt.Ponder(Logit(), epsilon=1e-12), context)
    entropy = objectives.exit_entropy(path)
    assert (entropy >= -1e-12).all() and (entropy <= math.log(5) + 1e-12).all()
    assert torch.autograd.grad(entropy.sum(), context)[0].isfinite().all()


def test_ouro_stops_where_the_chance_of_having_stopped_reaches_its_quantile():
    given = chances([0.3, 0.5, 0.4, 0.2], [0.05, 0.1, 0.1, 0.9], [0.8, 0.1, 0.1, 0.1])
    reached = 1 - torch.cumprod(1 - given, 1)
    for q in (0.5, 0.7, 0.9):
        out, _ = run(halt.Ponder(Logit(), epsilon=1 - q, sampled=False).eval(), script(given, VALUES.expand(3, 4)))
        first = [next((t for t in range(4) if row[t] >= q), 3) + 1 for row in reached.tolist()]
        assert out.steps.tolist() == first, "the first step whose cumulated chance is at least q, else the bound"


def test_ouros_second_stage_asks_whether_a_step_still_helped():
    given = chances([0.3, 0.6, 0.2, 0.5], [0.1, 0.2, 0.9, 0.5])
    losses = torch.tensor([[1.0, 4.0], [0.99, 4.0], [0.5, 5.0], [0.499, 1.0]], dtype=torch.float64).requires_grad_()
    context = script(given, VALUES.expand(2, 4)).requires_grad_()
    _, path = run(halt.Watched(Logit()), context)
    got, expected = objectives.improvement(path, losses, threshold=0.02, sharpness=20.0), []
    for row in range(2):
        terms = []
        for t in range(1, 4):
            saved = max(0.0, (losses[t - 1, row] - losses[t, row]).item())
            onward = 1 / (1 + math.exp(-20.0 * (saved - 0.02)))
            h = given[row, t].item()
            terms.append(-onward * math.log(1 - h) - (1 - onward) * math.log(h))
        expected.append(sum(terms) / 3)
    testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), "cross-entropy against going on")
    gradient = torch.autograd.grad(got.sum(), [context, losses], allow_unused=True)
    assert gradient[1] is None and not gradient[0][:, 0].any() and (gradient[0][:, 1:, 1] != 0).all()


def labelled() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (3, 5, DIM), their labels, of which some are not counted, and which tokens are real."""
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    labels = torch.randint(0, 4, (3, 5)).masked_fill(~mask, -100)
    labels[0, :2] = -100
    return torch.randn(3, 5, DIM), labels, mask


def token_losses(head: nn.Module, path: observe.Trajectory, labels: Tensor) -> Tensor:
    """The loss of each token after each step. Shapes: -> (T, B, tokens)."""
    logits = head(torch.stack(path.states))
    every = labels.expand(logits.shape[:-1])
    return nn.functional.cross_entropy(logits.flatten(0, -2), every.flatten(), reduction="none").view(every.shape)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("rule", [halt.Never(), halt.Drawn(halt.depths.Uniform(1, 6), axes=1)], ids=str)
def test_a_language_model_is_taught_by_the_labels_it_has(rule, rows: int):
    """Token by token in plain Python, whether tokens or sequences halt; uncounted labels change no mean."""
    x, labels, mask = labelled()
    head, loop = nn.Linear(DIM, 4), Loop(mixing(), 6, rows=rows, halt=rule)
    with observe.record(loop, states=True) as tape:
        out = loop(x, mask=mask)
    path = tape.only.among(labels != -100)
    losses = token_losses(head, path, labels)
    for weight in (None, lambda step: step**2):
        terms = []
        for row, token in (labels != -100).nonzero().tolist():
            taken = int(out.steps[row] if rows == 1 else out.steps[row, token])
            weights = [1.0 if weight is None else float((t + 1) ** 2) for t in range(taken)]
            each = [weights[t] * losses[t, row, token] for t in range(taken)]
            terms.append(sum(each) / sum(weights))
        own = objectives.mean(objectives.multi_exit(path, losses, weight), path)
        testing.assert_close(own, torch.stack(terms).mean(), "the mean over labelled tokens")
    last = objectives.mean(objectives.expected(path, losses), path)
    plain = nn.functional.cross_entropy(head(out.value).flatten(0, 1), labels.flatten())
    testing.assert_close(last, plain, "with all weight on the exit, the cross-entropy of the answer")


@pytest.mark.parametrize("rows", [1, 2])
def test_exits_of_a_language_model_are_weighed_by_their_rows(rows: int):
    """Losses of every step under a learned rule, with a prior: token by token, gradients included."""
    x, labels, mask = labelled()
    head = nn.Linear(DIM, 4)
    loop = Loop(mixing(), 4, rows=rows, halt=halt.Ponder(halt.Linear(DIM, bias=-0.5), epsilon=1e-6))
    with observe.record(loop, states=True) as tape:
        loop(x, mask=mask)
    path = tape.only.among(labels != -100)
    losses = token_losses(head, path, labels)
    entropies, divergences, means = [], [], []
    for row, token in (labels != -100).nonzero().tolist():
        z = tape.only.scores[:, row] if rows == 1 else tape.only.scores[:, row, token]
        left, p = torch.ones(()), []
        for t in range(4):
            p.append(left if t == 3 else left * torch.sigmoid(z[t]))
            left = left * (1 - torch.sigmoid(z[t]))
        p = torch.stack(p)
        g = torch.tensor([0.3, 0.21, 0.147, 0.343])
        means.append((p * losses[:, row, token]).sum())
        entropies.append(-(p * p.log()).sum())
        divergences.append((p * (p / g).log()).sum())
    mean, entropy, divergence = (torch.stack(each).mean() for each in (means, entropies, divergences))
    weights = [*loop.parameters(), *head.parameters()]
    for own, expected in (
        (objectives.ouro(path, losses, 0.2), mean - 0.2 * entropy),
        (objectives.pondernet(path, losses, 0.3, 0.2), mean + 0.2 * divergence),
    ):
        own = objectives.mean(own, path)
        testing.assert_close(own, expected, "each token has the weights of its row")
        pair = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (own, expected)]
        testing.assert_close(pair[0], pair[1], "and their gradients")


def test_every_exit_is_taught_in_a_truncated_run_of_drawn_depth():
    """The head by all steps, the body by the last ones of each row."""
    x, labels, mask = labelled()
    head = nn.Linear(DIM, 4)
    loop = Loop(mixing(), 9, halt=halt.Drawn(halt.depths.Fixed(5), axes=1), grad=grad.Truncated(2))
    with observe.record(loop, states=True) as tape:
        loop(x, mask=mask)
    path = tape.only.among(labels != -100)
    losses = token_losses(head, path, labels)
    assert losses.shape == (5, 3, 5)
    testing.parts.check_alive(nn.ModuleList([loop, head]), objectives.mean(objectives.multi_exit(path, losses), path))
    early = objectives.mean(objectives.multi_exit(path, losses, lambda step: step <= 3), path)
    assert not any(g.any() for g in torch.autograd.grad(early, list(loop.parameters()), materialize_grads=True))


def test_padding_costs_nothing():
    loop = Loop(mixing(), 4, rows=2, halt=halt.ACT(halt.Linear(DIM)), readout=readout.Weighted())
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with observe.record(loop) as tape:
        loop(torch.randn(2, 3, DIM), mask=mask)
    path = tape.only
    assert not path.last[:, ~mask].any() and (path.last.sum(0) == mask).all()
    losses = torch.ones_like(path.scores)
    found = [
        objectives.ponder_cost(path),
        objectives.expected_steps(path),
        objectives.expected(path, losses),
        objectives.geometric_kl(path, 0.2),
        objectives.exit_entropy(path),
        objectives.ouro(path, losses),
        objectives.improvement(path, losses),
        objectives.halting(path, losses),
        objectives.multi_exit(path, losses),
        objectives.confidence(path),
        objectives.step_variance(path),
    ]
    for values in found:
        assert values.shape == mask.shape and not values[~mask].any()
    testing.assert_close(objectives.mean(mask.float() * 3, path), torch.tensor(3.0), "the mean over real rows")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Loop(mixing(), 3, rows=2, halt=halt.ACT(halt.Linear(DIM, bias=-1.0)), readout=readout.Weighted())

    def forward(self, state: Tensor, context: Tensor, index: int) -> Tensor:
        return self.inner(state + context).value


def test_nested_loops_are_taught_at_both_levels():
    torch.manual_seed(0)
    outer = Loop(Nested(), 4, halt=halt.ACT(halt.Linear(DIM, bias=0.0)), readout=readout.Weighted())
    context = torch.randn(3, 5, DIM)
    with observe.record(outer) as tape:
        outer(context)
    (path,), calls = tape[""], tape["body.inner"]
    assert len(calls) == len(path.alive) and not path.alive[-1].all(), "some sequence stops early"
    inner = [objectives.ponder_cost(call.among(path.alive[at])) for at, call in enumerate(calls)]
    for at, cost in enumerate(inner):
        assert not cost[~path.alive[at]].any() and (cost[path.alive[at]] > 1).all()
        alone = objectives.ponder_cost(calls[at])
        testing.assert_close(cost[path.alive[at]], alone[path.alive[at]], "rows that run are charged as before")
    for loss, level in (
        (objectives.ponder_cost(path).sum(), outer.halt),
        (sum(c.sum() for c in inner), outer.body.inner.halt),
    ):
        for gradient in torch.autograd.grad(loss, list(level.parameters()), retain_graph=True):
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", [halt.ACT, halt.StickBreaking, halt.StraightThrough, halt.Gumbel])
def test_soft_weights_and_the_last_state_are_refused(kind):
    with pytest.raises(ValueError, match="readout must see the halting weights .* take readout.Weighted\\(\\)"):
        Loop(mixing(), 4, halt=kind(halt.Linear(DIM)))


@pytest.mark.parametrize(
    "kind", [halt.ACT, halt.StickBreaking, halt.Ponder, halt.Sampled, halt.StraightThrough, halt.Gumbel]
)
def test_policies_need_a_learned_rule(kind):
    with pytest.raises(ValueError, match=f"the rule in halt.{kind.__name__} must be learned, .* got Converged"):
        kind(halt.Converged())


def test_policies_refuse_numbers_out_of_range():
    for kind in (halt.ACT, halt.StickBreaking, halt.Ponder):
        with pytest.raises(ValueError, match="epsilon must be above 0.0 and at most 0.5, got 0.9"):
            kind(halt.Residual(), epsilon=0.9)
    with pytest.raises(ValueError, match="temperature must be above 0.0 and at most inf, got 0.0"):
        halt.Gumbel(halt.Residual(), temperature=0.0)
