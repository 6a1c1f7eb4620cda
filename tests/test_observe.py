"""Recordings say what a loop did, cost nothing when off; costs agree with PyTorch's counter and with closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loopaware import Loop, body, execute, grad, halt, nn, observe, readout, testing

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


class Nested(torch.nn.Module):
    """A model with a loop in a loop: `outer` calls `inner` at each step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = Loop(body.Called(torch.nn.Linear(4, 4)), 3, rows=2, halt=halt.Converged(rtol=0.5))
        self.outer = Loop(body.Called(self.once), 2)

    def once(self, state: torch.Tensor) -> torch.Tensor:
        return self.inner(state).value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x).value


def test_a_trajectory_tells_each_step():
    loop = Loop(lambda state, context, index: state / 2, 9, halt=halt.Converged(rtol=0.0, atol=1.0))
    x = torch.tensor([[8.0], [2.0], [64.0]])
    with observe.record(loop, states=True) as tape:
        out = loop(x)
    path = tape.only
    assert path.steps.tolist() == [3, 1, 6] == out.steps.tolist() and path.halted.all()
    assert path.counts.tolist() == [3, 2, 2, 1, 1, 1]
    testing.assert_close(path.weights.sum(0), torch.ones(3), "weights sum to one")
    assert path.weights.argmax(0).tolist() == [2, 0, 5]
    testing.assert_close(path.residuals[0], torch.ones(3), "|h/2 - h| / |h/2|")
    assert path.states is not None and [state[0].item() for state in path.states] == [4.0, 2.0, 1.0, 1.0, 1.0, 1.0]


def test_at_the_cap_the_rest_is_the_last_steps():
    with observe.record(loop := Loop(lambda state, context, index: state + 1, 3)) as tape:
        loop(X)
    assert tape.only.weights.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3] and not tape.only.halted.any()


def test_nested_loops_are_recorded_by_name():
    model = Nested()
    with observe.record(model) as tape:
        model(X)
    assert {name: len(calls) for name, calls in tape.items()} == {"inner": 2, "outer": 1}
    assert tape["inner"][0].steps.shape == (3, 5) and tape["outer"][0].steps.tolist() == [2, 2, 2]


def test_scores_carry_their_gradient():
    loop = Loop(lambda state, context, index: state / 2, 4, halt=halt.Watched(rule := halt.Residual()))
    with observe.record(loop) as tape:
        loop(X)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(tape.only.scores, torch.ones(4, 3))
    loss.backward()
    assert rule.slope.grad is not None and rule.slope.grad.abs() > 0
    assert rule.level.grad is not None and rule.level.grad.abs() > 0


@pytest.mark.parametrize("rule", [grad.Checkpointed(2), grad.Truncated(2), grad.OneStep()])
def test_recording_changes_nothing(rule):
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    loop = Loop(body.Called(torch.nn.Sequential(linear, torch.nn.Tanh())), 6, halt=halt.Converged(rtol=0.05), grad=rule)
    plain = loop(X)
    with observe.record(loop, states=True):
        recorded = loop(X)
    testing.assert_close(recorded[:3], plain[:3], "values are as they were")
    pair = [torch.autograd.grad(out.value.sum(), linear.weight) for out in (recorded, plain)]
    testing.assert_close(pair[0], pair[1], "gradients are as they were")


def test_positions_can_be_counted_as_rows():
    with observe.record(loop := Loop(lambda state, context, index: state / 2, 4, halt=halt.Residual())) as tape:
        loop(torch.randn(3, 5, 2))
    path, mask = tape.only, torch.rand(3, 5) < 0.7
    each = path.among(mask)
    assert each.steps.shape == mask.shape and each.scores.shape == each.alive.shape == (len(path.alive), 3, 5)
    for row, position in mask.nonzero().tolist():
        assert torch.equal(each.weights[:, row, position], path.weights[:, row])
        assert each.steps[row, position] == path.steps[row]
    assert not each.alive[:, ~mask].any() and not each.weights[:, ~mask].any() and not each.last[:, ~mask].any()
    assert (each.last.sum(0) == mask).all() and each.numbers.shape == (len(path.alive), 1, 1)
    with pytest.raises(ValueError, match=r"mask of a trajectory must begin with the rows \(3,\), got \(5, 3\). Swap"):
        path.among(mask.mT)


def test_nothing_is_left_behind():
    loop = Loop(lambda state, context, index: state / 2, 4, readout=(own := readout.Weighted()))
    with pytest.raises(RuntimeError, match="inside"), observe.record(loop):
        raise RuntimeError("inside")
    assert loop.readout is own and loop(X).carry.readout[1].shape == (3,)


def test_state_traffic_is_read_and_write():
    cost = observe.cost(Loop(lambda state, context, index: state, 8), torch.zeros(512, 1, 768))
    assert cost.state_bytes == 3_145_728 and cost.state_bytes * cost.max_steps == 25_165_824


@pytest.mark.parametrize("rows", [1, 2])
def test_costs_agree_with_the_counter(rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 3)
    context = {"x": torch.randn(3, 7, 8), "mask": torch.ones(3, 7, dtype=torch.bool)}
    loop = Loop(nn.Block(8, 2), 5, rows=rows, halt=halt.KL(head, 1e-9), execute=execute.Unrolled())
    cost = observe.cost(loop, context)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loop(context)
    start = 2 * 21 * 8 * 3  # the head reads the state before the first step
    assert cost.dense + start == counter.get_total_flops()
    tokens, dim = 21, 8
    projections, feedforward = 2 * tokens * 4 * dim * dim, 2 * tokens * 2 * 4 * dim * dim
    assert cost.body == projections + feedforward + 2 * 2 * tokens * 7 * dim
    assert cost.halt == start and cost.update == 0 and cost.rows == (3 if rows == 1 else 21)


def test_executed_is_the_share_of_steps_taken():
    loop = Loop(nn.Block(8, 2), 8)
    cost = observe.cost(loop, torch.zeros(4, 3, 8))
    steps = torch.tensor([1, 2, 3, 2])
    assert cost.share(steps) == 0.25 and cost.executed(steps) == pytest.approx(cost.dense / 4)


def test_loops_inside_are_charged_to_their_bound():
    model = Nested()
    assert observe.cost(model.inner, X).body == 2 * 15 * 16
    wrapped = Loop(body.Called(Once(model.inner)), 2)
    assert observe.cost(wrapped, X).body == 3 * 2 * 15 * 16
    assert isinstance(model.inner.execute, execute.Eager)


class Once(torch.nn.Module):
    def __init__(self, loop: Loop):
        super().__init__()
        self.loop = loop

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.loop(state).value


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_keys_and_traffic_have_their_closed_forms(rows):
    dim, heads, tokens = 12, 3, 5
    loop = Loop(nn.Block(dim, heads), 7, rows=rows)
    counts = observe.cost(loop, torch.zeros(3, tokens, dim))
    assert counts.attention == 2 * 2 * 3 * tokens * tokens * dim
    assert counts.attention_share == counts.attention / counts.body
    assert counts.key_value_bytes == 2 * 2 * 3 * tokens * dim * 4 and counts.state_bytes == 2 * 3 * tokens * dim * 4
    steps = torch.tensor([7, 2, 1]) if rows == 1 else torch.tensor([7, 2, 1])[:, None].expand(3, tokens)
    assert counts.by_row(steps).sum().item() == pytest.approx(counts.executed(steps))
    assert counts.by_step(steps).tolist() == pytest.approx([counts.step * n / 3 for n in (3, 2, 1, 1, 1, 1, 1)])
    assert counts.traffic(steps) == pytest.approx((counts.state_bytes + counts.key_value_bytes) * 10 / 3)
    energy = observe.Energy(per_operation=2e-12, per_byte=1e-10)
    assert energy.joules(counts, steps) == pytest.approx(2e-12 * counts.executed(steps) + 1e-10 * counts.traffic(steps))


def test_a_body_without_attention_has_none():
    counts = observe.cost(Loop(body.Called(torch.nn.Linear(4, 4)), 3), torch.zeros(2, 4))
    assert counts.attention == counts.key_value_bytes == 0 and counts.attention_share == 0.0
