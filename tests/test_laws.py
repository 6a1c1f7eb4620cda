"""The laws over shapes, rules, updates and halting patterns that nobody chose: hypothesis chooses them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as draw

from loopaware import Loop, body, execute, grad, halt, init, readout, testing, tree, update

RULES = [
    halt.Never(),
    halt.Converged(rtol=0.1),
    halt.Patience(halt.Converged(rtol=0.3), times=2),
    halt.KL(lambda state: state, 1e-2),
    halt.Any(halt.Converged(rtol=0.05), halt.Confidence(lambda state: state, 0.6)),
]
TAUGHT = [
    halt.ACT(halt.Residual(level=0.0)),
    halt.StickBreaking(halt.Residual(level=0.0), epsilon=0.1),
    halt.Any(halt.ACT(halt.Residual(level=-1.0)), halt.Converged(rtol=0.2)),
    halt.Patience(halt.StickBreaking(halt.Residual(level=0.0), epsilon=0.2), times=2),
]
UPDATES = [update.Replace(), update.Damped(0.5), update.Momentum(0.3)]


class Contracting(torch.nn.Module):
    """tanh(W h + x), with tokens that see their sequence if `mix`."""

    def __init__(self, dim: int, mix: bool):
        super().__init__()
        self.linear, self.mix = torch.nn.Linear(dim, dim), mix
        torch.nn.init.orthogonal_(self.linear.weight, gain=0.5)

    def forward(self, state: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        seen = state + state.mean(1, keepdim=True) if self.mix else state
        return torch.tanh(self.linear(seen) + x)


@settings(max_examples=40, deadline=None)
@given(data=draw.data())
def test_any_loop_keeps_the_laws(data):
    batch, length, dim = (data.draw(draw.sampled_from(sizes)) for sizes in ([1, 3], [1, 3, 7], [2, 5]))
    torch.manual_seed(data.draw(draw.integers(0, 99)))
    rows = data.draw(draw.sampled_from([1, 2]))
    rule = data.draw(draw.sampled_from(RULES + TAUGHT))
    loop = Loop(
        Contracting(dim, data.draw(draw.booleans())),
        data.draw(draw.integers(1, 6)),
        rows=rows,
        init=data.draw(draw.sampled_from([init.FromContext(), init.Zeros()])),
        update=data.draw(draw.sampled_from(UPDATES)),
        halt=rule,
        readout=data.draw(
            draw.sampled_from([readout.Weighted()] if rule.mixes else [readout.Last(), readout.Weighted()])
        ),
    )
    context = torch.randn(batch, length, dim)
    mask = torch.rand(batch, length) < 0.7 if data.draw(draw.booleans()) else None
    testing.check_loop(loop, context, mask)


def test_a_batch_of_padding_alone_keeps_the_laws():
    loop = Loop(Contracting(2, False), 2, rows=2)
    testing.check_loop(loop, torch.randn(1, 1, 2), torch.zeros(1, 1, dtype=torch.bool))


@settings(max_examples=40, deadline=None)
@given(data=draw.data())
def test_gradient_rules_on_any_halting_pattern(data):
    torch.manual_seed(data.draw(draw.integers(0, 99)))
    last, rows = data.draw(draw.integers(1, 5)), data.draw(draw.sampled_from([1, 2]))
    rule = data.draw(draw.sampled_from(RULES))
    loop = Loop(Contracting(3, True), 6, rows=rows, halt=rule, execute=execute.Unrolled())
    context = torch.randn(3, 5, 3) * torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    every = data.draw(draw.integers(1, 7))
    for gradient, attached in ((grad.Truncated(last), last), (grad.Checkpointed(every), None)):
        outputs = loop.replace(grad=gradient)(context), testing.naive(loop, context, attached=attached)
        pair = [torch.autograd.grad(output.value.square().sum(), list(loop.parameters())) for output in outputs]
        testing.assert_close(pair[0], pair[1], f"{gradient} has the gradient of its naive twin")


@settings(max_examples=50, deadline=None)
@given(shape=draw.lists(draw.integers(1, 3), min_size=1, max_size=3), data=draw.data())
def test_trees_are_chosen_and_gathered_row_by_row(shape, data):
    one = {"a": torch.randn(*shape), "b": (torch.randn(shape[0], 2), None)}
    two = tree.map(torch.zeros_like, one)
    flags = torch.tensor(data.draw(draw.lists(draw.booleans(), min_size=shape[0], max_size=shape[0])))
    mixed = tree.where(flags, one, two)
    index = flags.nonzero().flatten()
    testing.assert_close(tree.gather(index, mixed), tree.gather(index, one), "chosen rows are those of the first")
    assert not any(leaf[~flags].any() for leaf in tree.leaves(mixed)) and mixed["b"][1] is None
    testing.assert_close(body.Called(lambda state: state)(mixed, None, 0), mixed, "a tree passes whole")
