"""Known closed forms of updates, rules, readouts and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from loopaware import Loop, Rows, body, grad, halt, init, readout, testing, update
from loopaware.checks import between

H, P = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[3.0, 0.0, 0.25]])


def stepped(part, state=H, proposal=P):
    return part(state, proposal, part.start(state))


def test_updates_have_their_equations():
    testing.assert_close(stepped(update.Replace())[0], P, "h' = p")
    testing.assert_close(stepped(update.Damped(0.25))[0], 0.75 * H + 0.25 * P, "h' = (1 - r) h + r p")
    testing.assert_close(stepped(update.Residual(3, gain=0.5))[0].detach(), H + 0.5 * (P - H), "h' = h + g (p - h)")
    state, velocity = stepped(update.Momentum(0.5, rate=0.5))
    testing.assert_close((state, velocity), (H + 0.5 * (P - H), P - H), "v' = p - h at first")
    later = update.Momentum(0.5, rate=0.5)(state, P, velocity)
    testing.assert_close(later[1], 0.5 * (P - H) + (P - state), "v' = m v + (p - h)")


def test_gated_is_a_mix_by_its_gate():
    part = update.Gated(3)
    keep = torch.sigmoid(part.gate(torch.cat([H, P], -1)))
    testing.assert_close(stepped(part)[0], keep * H + (1 - keep) * P, "h' = c h + (1 - c) p")


def test_gru_and_lstm_have_their_equations():
    gru = update.GRU(3)
    wi, wh, bi, bh = (gru.cell.get_parameter(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    given, held = (P @ wi.T + bi).chunk(3, -1), (H @ wh.T + bh).chunk(3, -1)
    reset, keep = torch.sigmoid(given[0] + held[0]), torch.sigmoid(given[1] + held[1])
    expected = (1 - keep) * torch.tanh(given[2] + reset * held[2]) + keep * H
    testing.assert_close(stepped(gru)[0], expected, "the GRU's equations")
    lstm, cell = update.LSTM(3), torch.tensor([[0.3, 0.1, -0.2]])
    wi, wh, bi, bh = (lstm.cell.get_parameter(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    i, f, g, o = (P @ wi.T + bi + H @ wh.T + bh).chunk(4, -1)
    inner = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    testing.assert_close(lstm(H, P, cell), (torch.sigmoid(o) * torch.tanh(inner), inner), "the LSTM's equations")


def test_chrono_biases_span_the_steps():
    torch.manual_seed(0)
    gru, lstm, gated = update.GRU(63, chrono=20), update.LSTM(63, chrono=20), update.Gated(63, chrono=20)
    keep = (gru.cell.bias_ih + gru.cell.bias_hh)[63:126]
    forget = (lstm.cell.bias_ih + lstm.cell.bias_hh)[63:126]
    for bias in (keep, forget, gated.gate.bias):
        assert 0 <= bias.min() < bias.max() <= math.log(19)
    testing.assert_close((lstm.cell.bias_ih + lstm.cell.bias_hh)[:63], -forget, "the input gate's bias is the opposite")


def test_converged_is_its_inequality_at_every_position():
    old = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    new = torch.tensor([[[3.0, 4.0], [0.0, 1.25]]])
    verdict, _ = halt.Converged(rtol=0.1, atol=0.1)(old, new, Rows(), 0)
    assert not verdict.stop.item() and verdict.score.item() == pytest.approx(0.2)
    assert halt.Converged(rtol=0.1, atol=0.125)(old, new, Rows(), 0)[0].stop.item()
    assert halt.Converged(rtol=0.2, atol=0.0)(old, new, Rows(), 0)[0].stop.item()
    assert halt.Converged(rtol=0.0, atol=0.25)(old, new, Rows(), 0)[0].stop.item()
    both = halt.Converged(rtol=0.1)(old, new, Rows(2), 0)[0]
    assert both.stop.tolist() == [[True, False]]


def test_rules_on_predictions_have_their_numbers():
    before, now = torch.tensor([[[0.7, 0.3], [0.5, 0.5]]]), torch.tensor([[[0.6, 0.4], [0.5, 0.5]]])
    rule = halt.KL(torch.log, threshold=1.0)
    verdict, _ = rule(before, now, rule.start(before, Rows()), 0)
    divergence = 0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4)
    assert verdict.score.item() == pytest.approx(divergence, rel=1e-4)
    assert halt.Entropy(torch.log, 0.69)(before, now, Rows(), 0)[0].score.item() == pytest.approx(math.log(2), rel=1e-5)
    assert halt.Confidence(torch.log)(before, now, Rows(), 0)[0].score.item() == pytest.approx(0.5)
    margins = halt.Confidence(torch.log, margin=True)(before, now, Rows(2), 0)[0].score
    testing.assert_close(margins, torch.tensor([[0.2, 0.0]]), "the lead over the second class")


def test_the_residual_head_is_two_numbers():
    rule = halt.Residual(slope=1.0, level=-3.0)
    old, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    slope = math.log1p(math.e)
    verdict, _ = rule(old, new, Rows(), 0)
    assert verdict.score.item() == pytest.approx(-slope * (math.log(0.5) + 3.0), rel=1e-5)
    assert sum(p.numel() for p in rule.parameters()) == 2
    for detach in (False, True):
        new.requires_grad_(True)
        score = halt.Residual(detach=detach)(old, new, Rows(), 0)[0].score
        (moved,) = torch.autograd.grad(score.sum(), new, allow_unused=True)
        assert (moved is None) == detach
    assert halt.Residual(threshold=0.9).cut == pytest.approx(math.log(9))


def test_linear_averages_real_positions():
    rule = halt.Linear(2, bias=-1.0)
    state = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]])
    mask = torch.tensor([[True, True, False]])
    expected = rule.head(torch.tensor([[2.0, 3.0]]))[:, 0]
    testing.assert_close(
        rule(None, state, rule.start(state, Rows(1, mask)), 0)[0].score, expected, "padding is left out of the mean"
    )
    picked = halt.Linear(2, read=lambda state: state["h"])
    assert picked(None, {"h": state}, picked.start({"h": state}, Rows(2)), 0)[0].score.shape == (1, 3)


def counting(*stops: list[bool]) -> tuple[list, object]:
    """A rule that speaks from a script, for the rules made of rules."""
    states = [torch.full((len(stops[0]), 1), float(step)) for step in range(len(stops) + 1)]
    script = torch.tensor(stops)

    class Scripted:
        learned, stops, mixes = False, True, False

        def start(self, state, rows):
            return None

        def __call__(self, old, new, memory, index):
            return halt.measure.hard(script[index], script[index].float() + index), None

    return states, Scripted()


def said(rule, states) -> list[list[bool]]:
    return [verdict.stop.tolist() for verdict in testing.parts.judged(rule, states, Rows())]


def test_patience_counts_in_a_row():
    states, rule = counting([True, False], [False, True], [True, True], [True, True])
    assert said(halt.Patience(rule, 2), states) == [[False, False], [False, False], [False, True], [True, True]]


def test_any_and_all_agree_with_or_and_and():
    states, one = counting([True, False, True], [False, False, True])
    _, two = counting([True, True, False], [False, True, True])
    assert said(halt.Any(one, two), states) == [[True, True, True], [False, True, True]]
    assert said(halt.All(one, two), states) == [[True, False, False], [False, False, True]]


def test_a_group_waits_for_its_last_real_row():
    rule = halt.Grouped(halt.Converged(rtol=0.1), size=2)
    old = torch.ones(1, 5, 1)
    new = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]).view(1, 5, 1)
    assert rule(old, new, rule.start(old, Rows(2)), 0)[0].stop.tolist() == [[False, False, True, True, True]]
    mask = torch.tensor([[True, False, True, True, True]])
    assert rule(old, new, rule.start(old, Rows(2, mask)), 0)[0].stop.tolist() == [[True] * 5]


def test_weighted_gives_the_rest_to_the_last_state():
    part, verdicts = readout.Weighted(), [0.3, 0.3, 0.3]
    folded = part.start(torch.zeros(1, 1), Rows())
    for step, weight in enumerate(verdicts):
        verdict = halt.measure.hard(torch.tensor([False]), torch.zeros(1))._replace(weight=torch.tensor([weight]))
        folded = part.fold(folded, torch.full((1, 1), float(step)), verdict, torch.tensor([True]))
    carry = Loop(lambda state, x, index: state, 1).start(torch.full((1, 1), 2.0))
    assert part.finish(folded, carry).item() == pytest.approx(0.3 * 0 + 0.3 * 1 + 0.3 * 2 + 0.1 * 2, rel=1e-6)


def test_gradients_of_a_linear_loop_are_those_of_its_powers():
    """h_t = w h_{t-1}: dh_T/dw is T w^(T-1) in full, the last k terms if truncated; h_T of a step from h_T."""
    weight, steps = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), 5
    start = torch.ones(1, 1, dtype=torch.float64)
    for rule, terms in ((grad.Full(), 5), (grad.Checkpointed(2), 5), (grad.Truncated(3), 3), (grad.OneStep(), 0.5)):
        out = Loop(lambda state, x, index: weight * state, steps, grad=rule)(start)
        assert out.value.item() == 0.5**5
        assert torch.autograd.grad(out.value.sum(), weight)[0].item() == pytest.approx(terms * 0.5**4, rel=1e-12)


def test_one_step_is_taken_for_its_graph_alone():
    loop = Loop(lambda state, x, index: state / 2 + x, 60, halt=halt.Converged(rtol=1e-3), grad=grad.OneStep())
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    out, plain = loop(x), loop.replace(grad=grad.Full())(x)
    testing.assert_close(out[:3], plain[:3], "values, steps and verdicts are those of a plain run")
    assert out.halted.all() and not out.carry.alive.any()
    testing.assert_close(torch.autograd.grad(out.value.sum(), x)[0], torch.ones(1, 2), "df/dx alone")


def test_gaussian_starts():
    noise, context = init.Gaussian(std=0.5, seed=3), torch.zeros(63, 63, 4)
    first, second = noise(context), noise(context)
    assert not torch.equal(first, second) and first.std().item() == pytest.approx(0.5, rel=0.02)
    held = noise.state_dict()
    third = noise(context)
    noise.load_state_dict(held)
    assert torch.equal(noise(context), third)
    still = noise.eval()(torch.zeros(1, 63, 63))
    assert still.std().item() == pytest.approx(0.5, rel=0.05) and abs(still.mean().item()) < 0.03
    assert not torch.equal(still, init.Gaussian(std=0.5, seed=4).eval()(torch.zeros(1, 63, 63)))


def test_a_state_may_be_a_tree():
    def step(state, context, index):
        return {"h": torch.tanh(state["h"] + context), "count": state["count"] + 1}

    start = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    loop = Loop(
        step,
        6,
        rows=2,
        init=lambda context: {"h": torch.zeros_like(context), "count": context.new_zeros(context.shape[:2])},
        halt=halt.Any(halt.Entropy(lambda state: state["h"], 1.2), halt.Linear(4, read=lambda state: state["h"])),
    )
    out = loop(start)
    testing.assert_close(out.value["count"].long(), out.steps, "each token counts its own steps")
    assert 1 <= out.steps.min() < out.steps.max()


def test_stack_of_functions_and_called_with_all_arguments():
    both = body.Stack(lambda state, context, index: state + index, body.Called(torch.neg))
    assert both(torch.ones(1), None, 2).item() == -3
    whole = body.Called(lambda state, context, index: state * context + index, whole=True)
    assert whole(torch.full((1,), 2.0), torch.full((1,), 3.0), 4).item() == 10


def test_between_is_open_below_and_closed_above():
    assert between("rate", 1.0, 0.0, 1.0, "") == 1.0
    with pytest.raises(ValueError, match=r"rate must be above 0.0 and at most 1.0, got 0.0\. Try 1"):
        between("rate", 0.0, 0.0, 1.0, "Try 1.")


@pytest.mark.parametrize(("kind", "levels"), [(2, 3), (4, 15), (8, 255), (16, None)])
def test_integers_share_a_scale_for_each_position(kind: int, levels: int | None):
    part, proposal = update.Quantized(update.Replace(), kind), torch.randn(63, 5, 999).requires_grad_()
    new, _ = part(torch.zeros_like(proposal), proposal, part.start(proposal))
    most = proposal.detach().abs().amax(-1, keepdim=True)
    step = most / (2 ** (kind - 1) - 1)
    assert ((new - proposal).detach().abs() <= step / 2 + 1e-6).all(), "never further than half a step"
    torch.testing.assert_close(new.detach().abs().amax(-1, keepdim=True), most)
    if levels is not None:
        ratios = (new.detach() / step).round(decimals=3)
        assert max(len(row.unique()) for row in ratios.flatten(0, 1)) <= levels
        torch.testing.assert_close(ratios, ratios.round())
    (new * 3).sum().backward()
    assert torch.equal(proposal.grad, torch.full_like(proposal, 3.0)), "straight through"
    zero = torch.zeros(2, 3)
    assert torch.equal(part(zero, zero, None)[0], zero), "nothing is divided by a scale of zero"


def test_half_precisions_round_each_number():
    proposal = torch.randn(3, 7)
    for kind in (torch.float16, torch.bfloat16):
        new, _ = update.Quantized(update.Replace(), kind)(proposal, proposal, None)
        assert torch.equal(new, proposal.to(kind).float()) and new.dtype == torch.float32
