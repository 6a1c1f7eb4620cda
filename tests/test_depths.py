"""Depths that are set before a loop begins, and rules that differ between training and evaluation."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn

from loopaware import Loop, Rows, body, execute, grad, halt, init, observe, readout, testing
from loopaware import nn as blocks
from loopaware.grad import unrolled
from loopaware.halt import depths, drawn
from loopaware.protocols import Run
from parts import DIM, mixing

EVERY = [depths.Fixed(3), depths.Uniform(2, 7), depths.Poisson(4.0), depths.LogNormalPoisson(8)]
every_depth = pytest.mark.parametrize("depth", EVERY, ids=str)


def moments(depth: depths.Depth) -> tuple[float, float]:
    chances = depth.chances()
    steps = torch.arange(1, len(chances) + 1, dtype=torch.float64)
    mean = (chances * steps).sum()
    return mean.item(), (chances * (steps - mean).square()).sum().item()


def half(state, context, index):
    return state / 2


def ended(rule: nn.Module, shape: tuple[int, ...] = (300,), bound: int = 999, rows: int = 1) -> Tensor:
    """The steps of a loop that does nothing else."""
    return Loop(half, bound, rows=rows, halt=rule).train(rule.training)(torch.ones(*shape, 1)).steps


@pytest.mark.parametrize(
    ("depth", "mean", "variance"),
    [
        (depths.Fixed(3), 3, 0),
        (depths.Uniform(2, 7), 4.5, 35 / 12),
        (depths.Uniform(4, 4), 4, 0),
        (depths.Poisson(1.0), 1, 0),
        (depths.Poisson(5.5), 5.5, 4.5),
        (depths.LogNormalPoisson(0.5), 1.5, 0.5 + (math.exp(0.25) - 1) * 0.25),
        (depths.LogNormalPoisson(32), 33, 32 + (math.exp(0.25) - 1) * 32**2),
        (depths.LogNormalPoisson(7, sigma=1.0), 8, 7 + (math.e - 1) * 49),
        (depths.LogNormalPoisson(1024), 1025, 1024 + (math.exp(0.25) - 1) * 1024**2),
    ],
    ids=str,
)
def test_chances_have_the_moments_of_their_law(depth, mean, variance):
    chances = depth.chances()
    assert chances.dtype == torch.float64 and (chances >= 0).all()
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    assert moments(depth) == pytest.approx((mean, variance), rel=1e-5)


def test_huginns_law_is_that_of_a_rate_and_a_number():
    """The authors draw a log-normal rate, then a Poisson number, then add one."""
    count, mean, sigma = 200_000, 32, 0.5
    rates = torch.empty(count).log_normal_(math.log(mean) - sigma**2 / 2, sigma)
    numbers = (torch.poisson(rates) + 1).long()
    chances = depths.LogNormalPoisson(mean).chances()
    seen = torch.bincount(numbers, minlength=len(chances) + 1)[1:].double() / count
    largest = (seen.cumsum(0)[: len(chances)] - chances.cumsum(0)).abs().max().item()
    assert largest < math.sqrt(math.log(2e6) / (2 * count)), "the distance of a true sample, but for one in a million"


@every_depth
@pytest.mark.parametrize("training", [True, False])
def test_draws_follow_the_chances(depth, training):
    rule = halt.Drawn(depth, axes=2).train(training)
    seen_steps = ended(rule, (1, 100_000), rows=2).flatten()
    chances = depth.chances()
    seen = torch.bincount(seen_steps, minlength=len(chances) + 1)[1:].double() / seen_steps.numel()
    assert (seen.cumsum(0)[: len(chances)] - chances.cumsum(0)).abs().max() < math.sqrt(math.log(2e6) / 2e5)
    assert not seen[: len(chances)][chances == 0].any(), "what has no chance is never drawn"


def test_the_least_and_the_largest_number_stand_for_depths_that_are_possible():
    ranks = drawn.ranked(depths.Uniform(2, 3))
    numbers = torch.tensor([0, drawn.FINE // 2 - 1, drawn.FINE // 2, drawn.FINE - 1])
    assert drawn.chosen(ranks, numbers).tolist() == [2, 2, 3, 3]


def test_axes_say_who_shares_a_draw():
    shape = (40, 50)
    whole, sequences, tokens = (ended(halt.Drawn(depths.Uniform(1, 9), axes), shape, rows=2) for axes in (0, 1, 2))
    assert len(whole.unique()) == 1
    assert torch.equal(sequences, sequences[:, :1].expand(shape)) and len(sequences[:, 0].unique()) == 9
    assert all(len(row.unique()) > 5 for row in tokens) and not torch.equal(tokens[0], tokens[1])
    batches = torch.stack([ended(halt.Drawn(depths.Uniform(1, 9)), (2,)) for _ in range(60)])
    assert len(batches[:, 0].unique()) == 9 and torch.equal(batches[:, 0], batches[:, 1])


def test_draws_come_from_the_global_generator_in_training():
    rule = halt.Drawn(depths.Uniform(1, 99), axes=1)
    torch.manual_seed(5)
    first, second = ended(rule), ended(rule)
    torch.manual_seed(5)
    assert torch.equal(ended(rule), first) and torch.equal(ended(rule), second) and not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(ended(rule), first)


def test_draws_in_evaluation_are_a_function_of_seed_and_place():
    rule = halt.Drawn(depths.Uniform(1, 99), axes=2).eval()
    drawn = ended(rule, (3, 63), rows=2)
    assert torch.equal(drawn, drawn[:1].expand(3, -1)), "sequences share them"
    assert torch.equal(ended(rule, (1, 63), rows=2), drawn[:1]) and torch.equal(
        ended(rule, (2, 7), rows=2), drawn[:2, :7]
    )
    others = torch.stack([ended(halt.Drawn(depths.Uniform(1, 9), seed=seed).eval(), (1,)) for seed in range(90)])
    assert len(others.unique()) == 9
    fresh = halt.Drawn(depths.Uniform(1, 99), axes=1, seed=None).eval()
    assert len(ended(fresh).unique()) > 50 and not torch.equal(ended(fresh), ended(fresh))


def test_the_bound_cuts_and_padding_is_never_stepped():
    rule = halt.Drawn(depths.Uniform(1, 9), axes=2)
    mask = torch.rand(40, 50) < 0.7
    out = Loop(half, 5, rows=2, halt=rule)(torch.ones(40, 50, 1), mask=mask)
    assert out.steps.max() == 5 and not out.steps[~mask].any() and not out.halted[~mask].any()
    assert set(out.steps[mask & ~out.halted].tolist()) == {5} and (mask & ~out.halted).any()
    assert set(out.steps[out.halted].tolist()) == {1, 2, 3, 4, 5}


def test_a_run_that_is_cut_keeps_its_draws():
    loop = Loop(mixing(), 9, rows=2, halt=halt.Drawn(depths.Uniform(1, 9), axes=2))
    context = torch.randn(3, 5, DIM)
    carry = loop(context, max_steps=2).carry
    resumed = loop(context, carry=carry)
    assert torch.equal(resumed.steps, carry.halt.long())
    written = loop.replace(halt=halt.Written(resumed.steps))(context)
    testing.assert_close(resumed[:3], written[:3], "the run of the depths that were drawn at its start")


def test_a_depth_grows_with_the_runs_of_training():
    rule = halt.Drawn(depths.Uniform(11, 31), axes=1, first=depths.Uniform(1, 3), warmup=10)
    means = [ended(rule, (4000,)).float().mean().item() for _ in range(13)]
    assert means == pytest.approx([2 + 19 * min(run / 10, 1) for run in range(13)], abs=0.5)
    assert rule.runs.item() == 13 and ended(rule.eval()).min() >= 11 and rule.runs.item() == 13
    again = halt.Drawn(depths.Uniform(11, 31), axes=1, first=depths.Uniform(1, 3), warmup=10)
    again.load_state_dict(rule.state_dict())
    assert again.runs.item() == 13 and set(rule.state_dict()) == {"runs"}
    plain = halt.Drawn(depths.Fixed(9), warmup=4)
    assert [ended(plain, (1,)).item() for _ in range(6)] == [1, 3, 5, 7, 9, 9]
    assert not halt.Drawn(depths.Fixed(9)).state_dict()


def test_a_depth_that_grows_keeps_the_order_of_its_draws():
    """The same number stands for the same rank in both distributions, so that only the middle of them is in between."""
    rule = halt.Drawn(depths.Poisson(30.0), axes=1, first=depths.Poisson(3.0), warmup=2)
    steps = []
    for run in range(3):
        torch.manual_seed(1)
        rule.runs.fill_(run)
        steps.append(ended(rule, (500,)))
    assert torch.equal(steps[1], steps[0] + ((steps[2] - steps[0]) / 2).round().long())
    swapped = (steps[2][:, None] < steps[2]) & (steps[0][:, None] > steps[0])
    assert not swapped.any() and len(steps[0].unique()) > 5


def test_constants_are_no_weights():
    """No cast, no device and no way to build a model may change what is drawn."""
    rule = halt.Drawn(depths.LogNormalPoisson(8), axes=1)
    torch.manual_seed(0)
    expected = ended(rule)
    for made in (copy.deepcopy(rule).half(), copy.deepcopy(rule).to(torch.bfloat16), copy.deepcopy(rule).double()):
        torch.manual_seed(0)
        assert torch.equal(ended(made), expected)
    with torch.device("meta"):
        empty = halt.Drawn(depths.LogNormalPoisson(8), axes=1)
    torch.manual_seed(0)
    assert torch.equal(ended(empty), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_nothing_of_the_device_is_read(axes, training):
    """Tensors without values: whoever would look at one fails."""
    rule = halt.Drawn(depths.Poisson(4.0), axes, warmup=3).to("meta").train(training)
    state = torch.empty(3, 5, DIM, device="meta")
    memory = rule.start(state, Rows(2))
    verdict, _ = rule(state, state, memory, 0)
    assert verdict.stop.device.type == "meta" and verdict.stop.shape == (3, 5)


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_training_run_is_traced_whole(warmup: int):
    torch._dynamo.reset()
    loop = Loop(
        mixing(), 6, rows=2, halt=halt.Drawn(depths.Uniform(1, 5), axes=2, warmup=warmup), execute=execute.Unrolled()
    )
    traced = torch.compile(copy.deepcopy(loop), fullgraph=True, backend="eager")
    context = torch.randn(3, 5, DIM)
    for _ in range(2):
        torch.manual_seed(4)
        got = traced(context)
        torch.manual_seed(4)
        testing.assert_close(got[:3], loop(context)[:3], "the traced run draws the same")


class Counted(nn.Module):
    """The body, and how often it was asked."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, state, context, index):
        self.calls += 1
        return self.inner(state, context, index)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("last", [1, 2, 4])
@pytest.mark.parametrize("switched", [False, True])
def test_the_last_steps_of_rows_whose_depth_was_drawn(last: int, rows: int, switched: bool):
    """Each row's own last steps, as the naive twin has them, in one run, as the rule knows where they are."""
    steps = torch.randint(1, 10, (3, 5)[:rows])
    context = torch.randn(3, 5, DIM)
    rule = halt.Written(steps)
    loop = Loop(Counted(mixing()), 7, rows=rows, halt=rule, execute=execute.Unrolled())
    got = loop.replace(halt=halt.Switched(rule, halt.Never()) if switched else rule, grad=grad.Truncated(last=last))(
        context
    )
    assert loop.body.calls == min(int(steps.max()), 7), "no step was run twice"
    weights = list(loop.parameters())
    found = torch.autograd.grad(got.value.square().sum(), weights)
    alone = [
        testing.naive(loop.replace(halt=halt.Written(steps[item : item + 1])), context[item : item + 1], attached=last)
        for item in range(3)
    ]
    testing.assert_close(got.value, torch.cat([out.value for out in alone]), "values are those of a plain run")
    expected = torch.autograd.grad(sum(out.value.square().sum() for out in alone), weights)
    testing.assert_close(found, expected, "the gradient is that of each row's last steps")


def test_memory_is_saved_where_rows_end_together():
    """The docs' figures: a step is kept if one row needs it."""
    block = body.Injected(blocks.Block(dim=16, heads=2, placement=blocks.Post()), blocks.Add())
    context, share = torch.randn(8, 7, 16), []
    for axes in (0, 1):
        loop = Loop(block, 64, init=init.Zeros(), halt=halt.Drawn(depths.LogNormalPoisson(16), axes))
        peaks = []
        for rule in (grad.Truncated(8), grad.Full()):
            torch.manual_seed(0)
            run = functools.partial(backward, loop.replace(grad=rule), context)
            peaks.append(sum(observe.peak(run).bytes for _ in range(6)))
        share.append(peaks[0] / peaks[1])
    assert share[0] < 0.6 and share[1] > 0.9


def backward(loop: Loop, context: Tensor) -> None:
    loop(context).value.square().mean().backward()


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_truncation_in_training_draws_once(axes: int):
    """Also of a run that goes on from a carry, with a mask, and with dropout in the body."""
    torch.manual_seed(2)
    inner = body.Stack(mixing(), body.Called(nn.Dropout(0.2)))
    loop = Loop(Counted(inner), 9, rows=2, halt=halt.Drawn(depths.Uniform(2, 12), axes))
    cut = loop.replace(grad=grad.Truncated(last=2))
    context = torch.randn(3, 5, DIM)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    outputs, calls = [], []
    for each in (loop, cut):
        torch.manual_seed(7)
        loop.body.calls = 0
        piece = each(context, mask=mask, max_steps=3)
        outputs.append(each(context, carry=piece.carry))
        calls.append(loop.body.calls)
    testing.assert_close(outputs[1][:3], outputs[0][:3], "the same draws, values and dropout")
    assert calls[0] == calls[1]
    testing.parts.check_alive(cut, outputs[1].value)


@pytest.mark.parametrize("depth", [1, 2, 5, 7, 12])
def test_a_depth_for_the_batch_is_the_huginn_run(depth: int):
    """n - k steps without a gradient, then k with one, within the bound; fewer than k are all differentiated."""
    loop = Loop(mixing(), 7, init=init.Learned(DIM), halt=halt.Drawn(depths.Fixed(depth)), grad=grad.Truncated(last=2))
    context, taken = torch.randn(3, 5, DIM), min(depth, 7)
    out = loop(context)
    assert out.steps.tolist() == [taken] * 3 and out.carry.index == taken
    with torch.no_grad():
        state = loop.init(context)
        for index in range(taken - 2):
            state = loop.body(state, context, index)
    for index in range(max(taken - 2, 0), taken):
        state = loop.body(loop.init(context) if index == 0 else state, context, index)
    testing.assert_close(out.value, state, "the same state")
    weights = list(loop.parameters())
    pair = [torch.autograd.grad(v.square().sum(), weights, materialize_grads=True) for v in (out.value, state)]
    testing.assert_close(pair[0], pair[1], "the gradient of the last two steps")


def test_rows_that_take_no_step_are_foreseen_to_take_none():
    loop = Loop(mixing(), 7, rows=2, halt=halt.Drawn(depths.Uniform(2, 6), axes=2))
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    carry = loop(torch.randn(3, 5, DIM), mask=mask, max_steps=3).carry
    run = Run(lambda carry, steps: carry, lambda state, index: state, loop.halt.foreseen)
    ends = unrolled.known(run, carry, 2)
    assert torch.equal(ends > 0, carry.alive) and ends.max() == 2 and (~carry.alive & mask).any()
    assert unrolled.known(run._replace(foreseen=lambda memory: None), carry, 2) is None


def test_each_mode_is_foreseen_by_its_own_rule():
    loop = Loop(mixing(), 9, halt=taught(), grad=grad.Truncated(1)).eval()
    context = torch.randn(3, 5, DIM) * torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    expected = loop.replace(halt=halt.Converged(rtol=0.05))(context)
    got = loop(context)
    testing.assert_close(got[:3], expected[:3], "the rule of evaluation")
    pair = [torch.autograd.grad(out.value.sum(), list(loop.parameters())) for out in (got, expected)]
    testing.assert_close(pair[0], pair[1], "and its last steps")


def test_a_rule_that_does_not_know_is_run_to_be_seen():
    loop = Loop(Counted(mixing()), 7, halt=halt.Any(halt.Written(torch.tensor([2, 5, 7])), halt.Never()))
    out = loop.replace(grad=grad.Truncated(last=1))(torch.randn(3, 5, DIM))
    assert out.steps.tolist() == [2, 5, 7] and loop.body.calls == 14
    watched = loop.replace(halt=halt.Switched(halt.Watched(halt.Converged(rtol=9.0)), halt.Never()))
    assert watched.replace(grad=grad.Truncated(last=1))(torch.randn(3, 5, DIM)).steps.tolist() == [7] * 3


@pytest.mark.parametrize("rule", [halt.Never(), halt.Converged(rtol=0.05)], ids=str)
def test_depths_written_down_repeat_a_run(rule):
    loop = Loop(mixing(), 7, rows=2, halt=rule)
    context = torch.randn(3, 5, DIM)
    out = loop(context)
    again = loop.replace(halt=halt.Written(out.steps), execute=execute.Compacted(break_even=0))(context)
    testing.assert_close(again.value, out.value, "the same values")
    assert torch.equal(again.steps, out.steps) and again.halted.all()


def test_depths_written_down_for_all_rows_or_the_last_axes():
    context = torch.zeros(2, 3, 1)
    loop = Loop(half, 9, rows=2, halt=halt.Written(torch.tensor([1, 5, 12])))
    assert loop(context).steps.tolist() == [[1, 5, 9]] * 2
    assert loop.replace(halt=halt.Written(torch.tensor(-4)))(context).steps.tolist() == [[1] * 3] * 2
    for shape in ((2,), (2, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"steps must have the shape of the rows \(2, 3\), or of their last axes"):
            loop.replace(halt=halt.Written(torch.ones(shape).long()))(context)
    for wrong in (3, torch.tensor(3.0), torch.tensor(True)):
        with pytest.raises(TypeError, match="steps must be a tensor of whole numbers, got"):
            halt.Written(wrong)


class Wrong:
    def __init__(self, chances):
        self.given = chances

    def __repr__(self):
        return "Wrong()"

    def chances(self):
        return self.given


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: depths.Fixed(0), ValueError, "steps must be at least 1, got 0. A row takes one step at least"),
        (lambda: depths.Fixed(2.0), TypeError, "steps must be an integer, got 2.0"),
        (lambda: depths.Uniform(0, 3), ValueError, "low must be at least 1, got 0"),
        (lambda: depths.Uniform(4, 3), ValueError, "high must be at least 4, got 3. Swap low and high"),
        (lambda: depths.Poisson(0.5), ValueError, "mean must be from 1 to 1024, got 0.5. A row takes one step"),
        (lambda: depths.Poisson(math.nan), ValueError, "mean must be from 1 to 1024, got nan"),
        (lambda: depths.LogNormalPoisson(0), ValueError, "mean must be above 0.0 and at most 1024, got 0"),
        (lambda: depths.LogNormalPoisson(8, 3.0), ValueError, "sigma must be above 0.0 and at most 2.0, got 3.0"),
        (
            lambda: halt.Drawn(depths.Fixed(3), -1),
            ValueError,
            "axes must be at least 0, got -1. 0 lets the whole batch",
        ),
        (lambda: halt.Drawn(depths.Fixed(3), warmup=-1), ValueError, "warmup must be at least 0, got -1. 0 is none"),
        (
            lambda: halt.Drawn(depths.Fixed(3), first=depths.Fixed(1)),
            ValueError,
            r"first must be None without a warmup, got Fixed\(steps=1\). Say for how many runs",
        ),
        (lambda: halt.Drawn(Wrong(torch.ones(3))), ValueError, r"of Wrong\(\) must be at least 0 and sum to one, got"),
        (lambda: halt.Drawn(Wrong(torch.tensor([2.0, -1.0]))), ValueError, "at least 0 and sum to one, got the sum 1"),
        (lambda: halt.Drawn(Wrong(torch.ones(0))), ValueError, "sum to one, got the sum 0. Divide them by it"),
        (lambda: halt.Drawn(Wrong([1.0])), TypeError, r"of Wrong\(\) must be a tensor of one axis, got \[1.0\]. One"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_more_axes_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"axes must be at most the rows of the loop, 1, got 2. Rows of a loop are"):
        ended(halt.Drawn(depths.Fixed(3), axes=2))


def test_a_distribution_of_ones_own():
    assert set(ended(halt.Drawn(Wrong(torch.tensor([0.0, 0.5, 0.0, 0.5])), axes=1)).tolist()) == {2, 4}
    assert repr(halt.Drawn(depths.Fixed(3))) == "Drawn(depth=Fixed(steps=3), axes=0, seed=0)"
    grown = halt.Drawn(depths.Fixed(3), 1, first=depths.Fixed(2), warmup=5)
    assert repr(grown) == "Drawn(depth=Fixed(steps=3), axes=1, first=Fixed(steps=2), warmup=5, seed=0)"


# Rules that differ between training and evaluation.


def taught(rtol: float = 0.05) -> halt.Switched:
    return halt.Switched(halt.Drawn(depths.Uniform(2, 6), axes=1), halt.Converged(rtol=rtol))


def test_each_mode_has_its_rule():
    loop = Loop(half, 9, halt=taught(9.0))
    x = torch.ones(200, 1)
    assert set(loop.train()(x).steps.tolist()) == {2, 3, 4, 5, 6} and set(loop.eval()(x).steps.tolist()) == {1}
    assert not any(part.training for part in loop.halt.modules())
    loop.train()
    assert all(part.training for part in loop.halt.modules()) and len(list(loop.halt.modules())) == 3


def test_a_run_keeps_the_rule_that_it_began_with():
    loop = Loop(mixing(), 9, halt=taught())
    context = torch.randn(3, 5, DIM)
    for mode in (True, False):
        torch.manual_seed(1)
        whole = loop.train(mode)(context)
        torch.manual_seed(1)
        piece = loop(context, max_steps=1)
        resumed = loop.train(not mode)(context, carry=piece.carry)
        testing.assert_close(resumed[:3], whole[:3], "as if the mode had not been changed")
    assert not torch.equal(loop.train()(context).steps, loop.eval()(context).steps)


def test_a_checkpoint_is_run_again_by_the_rule_of_its_run():
    """The backward pass may come after `model.eval()`."""
    loop = Loop(mixing(), 9, halt=taught())
    context = torch.randn(3, 5, DIM)
    found = []
    for rule, late in ((grad.Full(), True), (grad.Checkpointed(2), False)):
        torch.manual_seed(1)
        out = loop.train().replace(grad=rule)(context)
        loop.train(late)
        found.append(torch.autograd.grad(out.value.square().sum(), list(loop.parameters())))
    testing.assert_close(found[0], found[1], "the gradient of the training run")


def test_traits_hold_in_both_modes():
    rule, drawn = halt.Linear(DIM), halt.Drawn(depths.Fixed(3))
    act = halt.ACT(rule)
    cases = [
        (halt.Switched(drawn, halt.Never()), (False, True, False)),
        (halt.Switched(halt.Never(), halt.Converged()), (False, True, False)),
        (halt.Switched(halt.Never(), halt.Never()), (False, False, False)),
        (halt.Switched(halt.Watched(rule), rule), (True, True, False)),
        (halt.Switched(act, halt.Converged()), (True, True, True)),
        (halt.Switched(halt.Watched(rule), act), (True, True, True)),
        (halt.Switched(halt.Any(halt.Watched(rule), drawn), rule), (True, True, False)),
    ]
    for made, traits in cases:
        for mode in (True, False):
            made.train(mode)
            assert (made.learned, made.stops, made.mixes) == traits, made


def test_pairs_that_cannot_work_are_refused_for_either_mode():
    rule = halt.Linear(DIM)
    with pytest.raises(ValueError, match=r"a rule that is learned must be asked in training too, got Linear.*Watched"):
        halt.Switched(halt.Drawn(depths.Fixed(3)), rule)
    frozen = copy.deepcopy(rule).requires_grad_(False)
    loop = Loop(mixing(), 5, halt=halt.Switched(halt.Drawn(depths.Fixed(3)), frozen), grad=grad.Truncated(2))
    assert loop(torch.randn(3, 5, DIM)).steps.tolist() == [3] * 3
    with pytest.raises(ValueError, match="grad must differentiate every step when halting is learned, got Truncated"):
        Loop(mixing(), 5, halt=halt.Switched(halt.Watched(rule), rule), grad=grad.Truncated(2))
    for pair in ((halt.ACT(rule), halt.Converged()), (halt.Watched(rule), halt.ACT(rule))):
        with pytest.raises(ValueError, match="readout must see the halting weights"):
            Loop(mixing(), 5, halt=halt.Switched(*pair))


def test_shared_weights_are_stored_once():
    rule = halt.Linear(DIM)
    made = halt.Switched(halt.Watched(rule), rule)
    assert list(made.state_dict()) == ["parts.0.rule.head.weight", "parts.0.rule.head.bias"]
    assert list(halt.Switched(rule, rule).state_dict()) == ["parts.0.head.weight", "parts.0.head.bias"]
    twin = copy.deepcopy(made)
    assert twin.rules[0] is twin.rules[1].rule and twin.rules[0] is not rule
    twin.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in made.state_dict().items()})
    assert not twin.rules[0].head.weight.any()
    assert "Switched(training=Drawn(" in repr(taught()) and "evaluation=Converged(rtol=0.05" in repr(taught())


def test_drawn_depths_and_an_exit_gate_together():
    """Depth is drawn in training and the gate is asked at every step of it; in evaluation the gate stops."""
    gate = halt.Linear(DIM, bias=0.0)
    rule = halt.Switched(halt.Any(halt.Watched(gate), halt.Drawn(depths.Uniform(2, 6), axes=1)), gate)
    loop = Loop(mixing(), 9, rows=2, init=init.Zeros(), halt=rule, readout=readout.Last())
    context = torch.randn(3, 5, DIM)
    with observe.record(loop) as tape:
        assert loop(context).steps.min() >= 2
    testing.parts.check_alive(gate, tape.only.scores)
    expected = loop.replace(halt=gate)(context)
    testing.assert_close(loop.eval()(context)[:3], expected[:3], "the gate alone")
    testing.check_loop(loop, context)
