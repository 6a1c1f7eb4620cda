"""TRM and HRM against the equations of their papers, typed again here, and the laws that their loops keep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

from loopaware import Rows, halt, observe, testing
from loopaware.models import HRM, TRM, hrm, trm
from loopaware.train import objectives

DIM, HEADS, CLASSES = 8, 2, 5


def tiny_trm(rule=None, inner: int = 3, outer: int = 2, steps: int = 6) -> TRM:
    torch.manual_seed(0)
    net = trm.tiny_net(DIM, HEADS, hidden=24, rotary=False)
    return TRM(nn.Embedding(7, DIM), net, DIM, CLASSES, steps, inner=inner, outer=outer, halt=rule)


def tiny_hrm(rule=None, cycles: tuple[int, int] = (2, 3), steps: int = 6) -> HRM:
    torch.manual_seed(0)
    nets = [trm.tiny_net(DIM, HEADS, layers, hidden=24, rotary=False) for layers in (1, 2)]
    return HRM(nn.Embedding(7, DIM), *nets, DIM, CLASSES, steps, cycles=cycles, halt=rule)


MODELS = pytest.mark.parametrize("make", [tiny_trm, tiny_hrm], ids=["TRM", "HRM"])


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(7, (5, 9), generator=torch.Generator().manual_seed(0))


def part(state):
    """What the answer is read from."""
    return state.answer if isinstance(state, trm.Thought) else state.high


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def retyped(net, x: torch.Tensor) -> torch.Tensor:
    """norm(h + attention(h)), then norm(h + W2 (silu(W1 h) * W3 h)), layer after layer."""
    for layer in net.bodies:
        attention, swiglu = layer.attention, layer.feedforward
        q, k, v = (
            map_(x).view(*x.shape[:2], HEADS, -1).movedim(2, 1)
            for map_ in (attention.query, attention.key, attention.value)
        )
        weights = torch.softmax(q @ k.mT / math.sqrt(DIM / HEADS), -1)
        x = normed(x + attention.out((weights @ v).movedim(1, 2).flatten(2)))
        x = normed(x + swiglu.narrow(silu(swiglu.gate(x)) * swiglu.widen(x)))
    return x


def papers_trm(model: TRM, tokens: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """The answer state after each supervision step, written as the paper's pseudocode is."""
    body, x = model.loop.body, model.embedding(tokens)
    y, z = (model.loop.init.get_buffer(name) + torch.zeros_like(x) for name in ("answer", "latent"))

    def latent_recursion(y, z):
        for _ in range(body.inner):
            z = retyped(body.net, x + y + z)
        return retyped(body.net, y + z), z

    answers = []
    for _ in range(steps):
        with torch.no_grad():
            for _ in range(body.outer - 1):
                y, z = latent_recursion(y, z)
        y, z = latent_recursion(y, z)
        answers.append(y)
        y, z = y.detach(), z.detach()
    return answers


def papers_hrm(model: HRM, tokens: torch.Tensor, steps: int) -> list[torch.Tensor]:
    body, x = model.loop.body, model.embedding(tokens)
    z_high, z_low = (model.loop.init.get_buffer(name) + torch.zeros_like(x) for name in ("high", "low"))
    answers = []
    for _ in range(steps):
        with torch.no_grad():
            for cycle in range(body.high_cycles):
                for turn in range(body.low_cycles):
                    if not (cycle == body.high_cycles - 1 and turn == body.low_cycles - 1):
                        z_low = retyped(body.low_net, z_low + z_high + x)
                if cycle != body.high_cycles - 1:
                    z_high = retyped(body.high_net, z_high + z_low)
        z_low = retyped(body.low_net, z_low + z_high + x)
        z_high = retyped(body.high_net, z_high + z_low)
        answers.append(z_high)
        z_high, z_low = z_high.detach(), z_low.detach()
    return answers


@pytest.mark.parametrize(
    ("model", "paper"),
    [
        (tiny_trm(), papers_trm),
        (tiny_trm(inner=1, outer=1), papers_trm),
        (tiny_trm(inner=2, outer=4), papers_trm),
        (tiny_hrm(), papers_hrm),
        (tiny_hrm(cycles=(1, 1)), papers_hrm),
        (tiny_hrm(cycles=(3, 1)), papers_hrm),
    ],
)
def test_steps_and_their_gradients_are_the_papers(model, paper, tokens):
    model = model.train()
    with observe.record(model, states=True) as tape:
        out = model(tokens, max_steps=3)
    got, expected = tuple(part(state) for state in tape.only.states), tuple(paper(model, tokens, 3))
    testing.assert_close(got, expected, "the paper's states")
    testing.assert_close(out.value, model.head(expected[-1]), "and its answer")
    weights = [weight for name, weight in model.named_parameters() if "halt" not in name]
    labels = (tokens % CLASSES).flatten()
    pair = [
        torch.autograd.grad(sum(cross_entropy(model.head(y).flatten(0, 1), labels) for y in states), weights)
        for states in (got, expected)
    ]
    testing.assert_close(pair[0], pair[1], "the paper's gradients")


@MODELS
def test_every_weight_is_taught(make, tokens):
    model = make().train()
    with observe.record(model, states=True) as tape:
        model(tokens)
    path = tape.only
    right = torch.rand(path.scores.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = model.head(torch.stack([part(state) for state in path.states]))
    loss = cross_entropy(logits.flatten(0, -2), (tokens % CLASSES).expand(6, -1, -1).flatten())
    (loss + objectives.mean(objectives.halting(path, right), path)).backward()
    dead = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("model", [tiny_trm(outer=1), tiny_hrm(cycles=(1, 1)), tiny_trm(), tiny_hrm()])
def test_no_gradient_crosses_a_supervision_step(model, tokens):
    model = model.train()
    with observe.record(model, states=True) as tape:
        model(tokens, max_steps=3)
    first, second, third = tape.only.states
    for before, after in ((first, second), (second, third), (first, third)):
        found = torch.autograd.grad(part(after).sum(), [*before], retain_graph=True, allow_unused=True)
        assert found == (None, None)
    weights = list(model.loop.body.parameters())
    whole = torch.autograd.grad(sum(part(state).tanh().sum() for state in (first, second, third)), weights)
    carry, alone = None, [torch.zeros_like(weight) for weight in weights]
    for step in (1, 2, 3):
        carry = model(tokens, carry=carry, max_steps=step).carry
        found = torch.autograd.grad(part(carry.state).tanh().sum(), weights)
        alone = [total + more for total, more in zip(alone, found, strict=True)]
    testing.assert_close(whole, tuple(alone), "the sum of the gradients of single steps")


def at_different_steps(model, tokens: torch.Tensor):
    """The same model with a head whose bias lets rows stop at different steps."""
    model.eval()
    rule = model.loop.halt
    with torch.no_grad():
        rule.head.weight.copy_(torch.randn(rule.head.weight.shape, generator=torch.Generator().manual_seed(3)) * 3)
        with observe.record(model.train()) as tape:
            model(tokens)
        highest = tape.only.scores.cummax(0).values
        rule.head.bias -= highest[2].median()
    model.eval()
    steps = model(tokens).steps
    assert len(steps.unique()) > 1, steps
    return model


@MODELS
def test_loops_keep_the_laws(make, tokens):
    model = at_different_steps(make(), tokens)
    testing.check_loop(model.loop, model.embedding(tokens).detach())


@MODELS
def test_halting_in_evaluation_equals_a_truncated_run(make, tokens):
    """Each row's answer is what a run of exactly its steps gives, alone or in the batch, and it stays there."""
    model = at_different_steps(make(), tokens)
    with torch.no_grad():
        out = model(tokens)
        assert out.halted.any() and out.steps.min() < 6
        model.train()
        for row, steps in enumerate(out.steps.tolist()):
            whole = model(tokens, max_steps=steps)
            assert torch.equal(whole.value[row], out.value[row]), "bit for bit in the same batch"
            assert whole.steps.tolist() == [steps] * 5 and not whole.halted.any(), "in training the rule watches"
            alone = model.eval()(tokens[row : row + 1])
            testing.assert_close(alone.value, out.value[row : row + 1], "batch N equals batch 1")
            assert alone.steps.item() == steps
            model.train()
        model.eval()
        carry = model(tokens, max_steps=2).carry
        resumed = model(tokens, carry=carry)
        assert torch.equal(resumed.value, out.value) and torch.equal(resumed.steps, out.steps)
        deeper = model(tokens, carry=out.carry, max_steps=9)
        assert torch.equal(deeper.value[out.halted], out.value[out.halted]), "stopped rows stay"


@MODELS
def test_padding_changes_nothing(make, tokens):
    model = at_different_steps(make(), tokens)
    lengths = [9, 4, 6, 1, 9]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        whole = model(tokens.masked_fill(~mask, 3), mask)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, :length])
            testing.assert_close(alone.value, whole.value[row : row + 1, :length], "padding changes nothing")
            assert alone.steps.item() == whole.steps[row].item()


@MODELS
def test_a_state_dict_holds_the_whole_model(make, tokens):
    model = at_different_steps(make(), tokens)
    torch.manual_seed(1)
    other = make()
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(tokens).value, model(tokens).value)
    assert sum("init" in name for name in model.state_dict()) == 2, "where states start is saved"


def test_rotary_positions_tell_the_order(tokens):
    with torch.no_grad():
        told, blind = trm.tiny_net(DIM, HEADS), trm.tiny_net(DIM, HEADS, rotary=False)
        x = torch.randn(1, 4, DIM)
        assert not torch.allclose(told(x.flip(1), None, 0).flip(1), told(x, None, 0), atol=1e-3)
        testing.assert_close(blind(x.flip(1), None, 0).flip(1), blind(x, None, 0), "no order without them")


def test_values_of_halting_are_the_papers():
    """G_halt = 1[right]; G_continue = max of the next step's values, q_halt alone where the next is the last."""
    torch.manual_seed(0)
    values, right = torch.randn(4, 3, 2), torch.rand(4, 3) < 0.5
    losses = hrm.q_learning(values, right)

    def bce(logit, target):
        return -(target * torch.sigmoid(logit).log() + (1 - target) * (1 - torch.sigmoid(logit)).log())

    for step in range(4):
        expected = bce(values[step, :, 0], right[step].float())
        if step < 3:
            ahead = values[step + 1, :, 0] if step == 2 else values[step + 1].max(-1).values
            expected = expected + bce(values[step, :, 1], torch.sigmoid(ahead))
        testing.assert_close(losses[step], expected, "the paper's targets")
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(hrm.q_learning(values, right)[0].sum(), values)
    assert gradient[0].abs().min() > 0 and not gradient[1:].any(), "targets have no gradient"


def test_values_decide_and_are_taught(tokens):
    model = tiny_hrm(hrm.QHalt(DIM)).eval()
    assert not model(tokens).halted.any(), "before training nothing speaks for stopping"
    with torch.no_grad():
        model.loop.halt.head.bias[0] += 1.0
        assert model(tokens).steps.tolist() == [1] * 5
    model.train()
    with observe.record(model, states=True) as tape:
        model(tokens)
    values = torch.stack([model.loop.halt.values(state, Rows()) for state in tape.only.states])
    testing.assert_close(values[..., 0] - values[..., 1], tape.only.scores, "the score is their difference")
    hrm.q_learning(values, torch.ones(6, 5, dtype=torch.bool)).mean().backward()
    assert model.loop.halt.head.weight.grad.abs().sum(1).min() > 0


def test_any_rule_of_the_library_fits(tokens):
    model = tiny_trm(halt.Patience(halt.Residual(level=9.0), times=2)).eval()
    assert model(tokens).steps.tolist() == [2] * 5
    model.loop = model.loop.replace(halt=halt.KL(lambda state: model.head(state.answer), 99.0))
    assert model(tokens).steps.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_trm(inner=0), "inner must be at least 1, got 0. The paper takes 6"),
        (lambda: tiny_trm(outer=0), "outer must be at least 1, got 0. The paper takes 3"),
        (lambda: tiny_trm(steps=0), "max_steps must be at least 1, got 0"),
        (lambda: tiny_hrm(cycles=(0, 2)), "high_cycles must be at least 1, got 0"),
        (lambda: tiny_hrm(cycles=(2, 0)), "low_cycles must be at least 1, got 0"),
        (lambda: hrm.QHalt(0), "dim must be at least 1, got 0. Give the features of the slow state"),
        (
            lambda: hrm.q_learning(torch.zeros(3, 2), torch.zeros(3, 2).bool()),
            r"values must have the shape of right and two values for each, \(3, 2, 2\), got \(3, 2\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
