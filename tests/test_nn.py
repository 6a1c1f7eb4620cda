"""The building blocks against independent re-typings, in values and gradients, and against what they promise."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from loopaware import nn as parts
from loopaware.models.transformer import Transformer
from loopaware.nn import (
    Add,
    Attention,
    Block,
    Concat,
    CrossAttention,
    Diagonal,
    FeedForward,
    Gated,
    LayerNorm,
    LearnedPositions,
    Post,
    Pre,
    Relative,
    Residual,
    RMSNorm,
    Rotary,
    Sandwich,
    Sinusoidal,
    SwiGLU,
)

DIM, HEADS = 12, 3


def close(got, wanted, dtype=torch.float64):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def stirred(module):
    """The module in float64 with every parameter moved away from where it starts (zeros and ones hide mistakes)."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(value, *inputs):
    """Gradients of a fixed random functional of the value."""
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype)
    return torch.autograd.grad((value * weights).sum(), inputs, allow_unused=True)


def same(got, wanted, *inputs):
    close(got, wanted)
    for mine, theirs in zip(gradients(got, *inputs), gradients(wanted, *inputs), strict=True):
        assert mine is not None and theirs is not None
        close(mine, theirs)


def retyped(attention, x, memory, allowed):
    """Attention once more, key by key. Shapes: allowed (B, H, Tq, Tk)."""
    width = DIM // HEADS
    query = torch.einsum("bid,hcd->bhic", x, attention.query.weight.view(HEADS, width, DIM))
    query = query + attention.query.bias.view(HEADS, 1, width)
    key = torch.einsum("bjd,hcd->bhjc", memory, attention.key.weight.view(HEADS, width, DIM))
    value = torch.einsum("bjd,hcd->bhjc", memory, attention.value.weight.view(HEADS, width, DIM))
    value = value + attention.value.bias.view(HEADS, 1, width)
    queries, keys = x.shape[1], memory.shape[1]
    shift = keys - queries
    if isinstance(attention.positions, Rotary):
        query, key = (spun(part, start) for part, start in ((query, shift), (key, 0)))
    logits = torch.einsum("bhic,bhjc->bhij", query, key) / math.sqrt(width)
    if isinstance(attention.positions, Relative):
        table, clip = attention.positions.table, attention.positions.distance
        rows = [[max(-clip, min(clip, j - i - shift)) + clip for j in range(keys)] for i in range(queries)]
        logits = logits + torch.stack([torch.stack([table[:, at] for at in row], -1) for row in rows], -2)
    if attention.causal:
        allowed = allowed & torch.tensor([[j <= i + shift for j in range(keys)] for i in range(queries)])
    powers = torch.where(allowed, (logits - logits.amax(-1, keepdim=True).detach()).exp(), 0.0)
    total = powers.sum(-1, keepdim=True)
    weights = powers / torch.where(total == 0, 1.0, total)
    mixed = torch.einsum("bhij,bhjc->bihc", weights, value).reshape(x.shape)
    answer = mixed @ attention.out.weight.T + attention.out.bias
    return torch.where(allowed.any(-1).any(1)[..., None], answer, 0.0)


def spun(x, start):
    """Pairs of features as complex numbers, multiplied by exp(i p theta)."""
    width = x.shape[-1]
    theta = torch.tensor([10000 ** (-2 * i / width) for i in range(width // 2)], dtype=x.dtype)
    angle = torch.outer(torch.arange(start, start + x.shape[-2], dtype=x.dtype), theta)
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs).reshape(x.shape)


def masks(kind, batch, queries, keys):
    """A random mask as it is passed, and the same as (B, H, Tq, Tk)."""
    shape = {
        "none": (1, 1, 1, 1),
        "keys": (batch, keys),
        "pairs": (batch, queries, keys),
        "one graph": (1, queries, keys),
        "heads": (batch, HEADS, queries, keys),
        "whole queries": (batch, 1, queries, 1),
    }[kind]
    mask = torch.rand(shape) < (2.0 if kind == "none" else 0.6)
    whole = {2: lambda m: m[:, None, None], 3: lambda m: m[:, None], 4: lambda m: m}[mask.ndim](mask)
    return None if kind == "none" else mask, whole.expand(batch, HEADS, queries, keys)


@pytest.mark.parametrize("kind", ["none", "keys", "pairs", "one graph", "heads", "whole queries"])
@pytest.mark.parametrize(
    "positions", [lambda: None, lambda: Rotary(4), lambda: Relative(HEADS, 2)], ids=["plain", "rotary", "relative"]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (3, 7), (7, 3)])
def test_attention_is_its_equation(sizes, causal, positions, kind):
    attention = stirred(Attention(DIM, HEADS, causal=causal, positions=positions()))
    queries, keys = sizes
    x, memory = states(3, queries, DIM), states(3, keys, DIM)
    mask, allowed = masks(kind, 3, queries, keys)
    parameters = [p for name, p in attention.named_parameters() if name != "positions.table"]
    same(attention(x, memory, mask), retyped(attention, x, memory, allowed), x, memory, *parameters)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_attention_to_itself(causal):
    attention = stirred(Attention(DIM, HEADS, causal=causal, positions=Rotary(4)))
    x = states(2, 63, DIM)
    same(attention(x), retyped(attention, x, x, torch.ones(2, HEADS, 63, 63, dtype=torch.bool)), x)


def test_relative_table_gets_the_gradient_of_its_equation():
    attention = stirred(Attention(DIM, HEADS, positions=Relative(HEADS, 2)))
    x = states(2, 7, DIM)
    mask, allowed = masks("keys", 2, 7, 7)
    same(attention(x, mask=mask), retyped(attention, x, x, allowed), attention.positions.table)


def test_relative_tells_distances_apart_only_up_to_its_own():
    relative = stirred(Relative(HEADS, 2))
    bias = relative.bias(torch.arange(7), torch.arange(7))
    assert torch.equal(bias[:, 0, 2], bias[:, 0, 6]) and not torch.equal(bias[:, 0, 1], bias[:, 0, 2])
    assert torch.equal(bias[:, 3, 4], bias[:, 5, 6]) and not torch.equal(bias[:, 3, 4], bias[:, 4, 3])


def test_positions_may_differ_from_row_to_row():
    at = torch.tensor([[0, 1, 2], [5, 9, 11]])
    x = torch.randn(2, HEADS, 3, 4, dtype=torch.float64)
    turned, relative = Rotary(4).turn(x, at), stirred(Relative(HEADS, 4))
    bias = relative.bias(at, at)
    assert bias.shape == (2, HEADS, 3, 3)
    for row in range(2):
        close(turned[row], Rotary(4).turn(x[row : row + 1], at[row])[0])
        close(bias[row], relative.bias(at[row], at[row]))


@pytest.mark.parametrize("shift", [1, 63])
def test_rotary_depends_on_differences_only(shift):
    rotary = Rotary(6, base=100.0)
    query, key = torch.randn(2, 1, 1, 5, 6, dtype=torch.float64)
    at = torch.arange(5)
    logits = rotary.turn(query, at) @ rotary.turn(key, at).mT
    close(rotary.turn(query, at + shift) @ rotary.turn(key, at + shift).mT, logits)
    moved = rotary.turn(query, at + shift) @ rotary.turn(key, at).mT
    assert (moved - logits).abs().max() > 1e-2
    close(rotary.turn(query, at).norm(dim=-1), query.norm(dim=-1))


@pytest.mark.parametrize("positions", [lambda: None, lambda: Relative(HEADS, 2)], ids=["plain", "relative"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_without_keys_adds_nothing_and_poisons_nothing(causal, positions):
    attention = stirred(Attention(DIM, HEADS, causal=causal, positions=positions()))
    x = states(2, 3, DIM)
    mask = torch.tensor([[False, False, False], [True, True, False]])
    value = attention(x, mask=mask)
    assert torch.equal(value[0], torch.zeros(3, DIM, dtype=torch.float64))
    assert value[1].abs().min() > 0
    grads = gradients(value, x, *attention.parameters())
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(grads[0][0], torch.zeros(3, DIM, dtype=torch.float64)) and grads[0][1].abs().sum() > 0
    nothing = attention(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(nothing, x, *attention.parameters()))


def test_no_kernel_ever_sees_a_query_without_keys(monkeypatch):
    def strict(query, key, value, mask, dropped, is_causal=False):
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        return logits.masked_fill(~mask, -math.inf).softmax(-1) @ value

    attention, x = stirred(Attention(DIM, HEADS)), states(2, 3, DIM)
    mask = torch.tensor([[False, False, False], [True, True, False]])
    wanted = attention(x, mask=mask)
    monkeypatch.setattr("loopaware.nn.attention.scaled_dot_product_attention", strict)
    same(attention(x, mask=mask), wanted, x)


@pytest.mark.parametrize("make", [Block, lambda dim, heads, **options: Transformer(2, dim, heads, **options)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"positions": Rotary(4)}, {"positions": Relative(HEADS, 2)}])
def test_padding_changes_nothing(make, options):
    block = stirred(make(DIM, HEADS, **copy.deepcopy(options)))
    lengths = torch.tensor([1, 3, 7])
    x, mask = states(3, 7, DIM), parts.padding(lengths, 7)
    together = block(x, {"mask": mask})
    real = gradients(torch.where(mask[..., None], together, 0.0), x)[0]
    for row, length in enumerate(lengths.tolist()):
        alone = x[row : row + 1, :length]
        close(together[row : row + 1, :length], block(alone))
        assert torch.equal(real[row, length:], torch.zeros(7 - length, DIM, dtype=torch.float64))


def test_padding_of_a_memory_changes_nothing():
    block = stirred(Block(DIM, HEADS, cross=True))
    x, memory, lengths = states(2, 3, DIM), states(2, 5, DIM), torch.tensor([2, 5])
    context = {"memory": memory, "memory_mask": parts.padding(lengths, 5)}
    close(block(x, context)[:1], block(x[:1], {"memory": memory[:1, :2]}))
    own = {"x": memory[:, :3], "mask": parts.padding(torch.tensor([2, 3]), 3)}
    close(block(x, own)[:1, :2], block(x[:1, :2], {"x": memory[:1, :2]}))


@pytest.mark.parametrize("options", [{}, {"positions": Rotary(4)}, {"positions": Relative(HEADS, 2)}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_future_is_not_seen(options, masked):
    block = stirred(Block(DIM, HEADS, causal=True, **copy.deepcopy(options)))
    x = states(1, 5, DIM)
    value = block(x, {"mask": torch.ones(1, 5, dtype=torch.bool)} if masked else None)
    for token in range(5):
        (grad,) = torch.autograd.grad(value[0, token].sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [place <= token for place in range(5)]


def test_information_flows_along_edges_only():
    edges = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0]])
    block = stirred(Block(DIM, HEADS))
    x = states(1, 3, DIM)
    value = block(x, {"mask": parts.adjacency(edges)})
    for node in range(3):
        (grad,) = torch.autograd.grad(value[0, node].sum(), x, retain_graph=True)
        assert (grad[0].abs().sum(-1) > 0).tolist() == [bool(edges[node, j]) or j == node for j in range(3)]


def test_without_positions_the_order_of_tokens_does_not_matter():
    block, x, order = stirred(Block(DIM, HEADS)), states(2, 7, DIM), torch.randperm(7)
    close(block(x[:, order]), block(x)[:, order])


def test_mask_helpers_as_lists():
    assert parts.padding(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
    assert parts.causal(2, 3).tolist() == [[[True, True, False], [True, True, True]]]
    assert parts.causal(3, 1).tolist() == [[[False], [False], [True]]]
    assert parts.adjacency(torch.zeros(4, 3, 3)).equal(torch.eye(3, dtype=torch.bool).expand(4, 3, 3))


def test_second_derivatives_under_the_math_kernel():
    attention, x = stirred(Attention(DIM, HEADS)), states(1, 3, DIM)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        (first,) = torch.autograd.grad(attention(x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    assert torch.isfinite(second).all() and second.abs().max() > 0


@pytest.mark.parametrize("positions", [lambda: Rotary(4), lambda: Relative(HEADS, 2)], ids=["rotary", "relative"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 3, [True, True, False]])], ids=["open", "masked"])
def test_half_precision_and_autocast_stay_near_full_precision(positions, mask):
    attention, x = Attention(DIM, HEADS, positions=positions()), torch.randn(2, 3, DIM)
    wanted = attention(x, mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention(x, mask=mask)
    half = copy.deepcopy(attention).bfloat16()(x.bfloat16(), mask=mask)
    for got in (cast, half):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.02)


def test_rotary_angles_are_worked_out_in_float32_at_least():
    x, at = torch.ones(1, 1, 1, 4), torch.tensor([1001])
    torch.testing.assert_close(Rotary(4).turn(x.bfloat16(), at).float(), Rotary(4).turn(x, at), rtol=0, atol=0.02)


def test_block_hands_its_dropout_to_every_part():
    block = Block(DIM, HEADS, cross=True, dropout=0.25)
    shares = {name: part.p for name, part in block.named_modules() if isinstance(part, nn.Dropout)}
    shares |= {name: part.dropout for name, part in block.named_modules() if isinstance(part, Attention)}
    assert len(shares) == 6 and set(shares.values()) == {0.25}
    stack = Transformer(1, DIM, HEADS, dropout=0.25)
    assert [part.p for part in stack.modules() if isinstance(part, nn.Dropout)] == [0.25] * 3


def test_dropout_acts_in_training_only():
    block, x = Block(DIM, HEADS, dropout=0.5), torch.randn(2, 3, DIM)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
    attention = Attention(DIM, HEADS, dropout=0.5)
    assert not torch.equal(attention(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_residual_drops_outputs_of_the_sublayer_only():
    residual, x = Residual(63, Pre(), nn.Identity, dropout=0.5), torch.ones(63)
    assert set(residual(x, lambda h: h).tolist()) == {1.0, 3.0}


@pytest.mark.parametrize("layer", [FeedForward, SwiGLU])
def test_feedforward_dropout_acts_in_training_only(layer):
    layer = layer(DIM, dropout=0.5)
    x = torch.randn(3, DIM)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_feedforward_is_its_equation():
    layer, x = stirred(FeedForward(DIM, 7)), states(3, DIM)
    bent = x @ layer.widen.weight.T + layer.widen.bias
    bent = bent * 0.5 * (1 + torch.erf(bent / math.sqrt(2)))
    same(layer(x), bent @ layer.narrow.weight.T + layer.narrow.bias, x, *layer.parameters())
    rectified = stirred(FeedForward(DIM, activation=nn.ReLU()))
    bent = (x @ rectified.widen.weight.T + rectified.widen.bias).clamp(min=0)
    assert bent.shape[-1] == 4 * DIM
    close(rectified(x), bent @ rectified.narrow.weight.T + rectified.narrow.bias)


def test_swiglu_is_its_equation():
    layer, x = stirred(SwiGLU(DIM, 7)), states(3, DIM)
    gate = x @ layer.gate.weight.T
    wanted = (gate / (1 + torch.exp(-gate)) * (x @ layer.widen.weight.T)) @ layer.narrow.weight.T
    same(layer(x), wanted, x, *layer.parameters())


@pytest.mark.parametrize(("dim", "hidden"), [(1, 8), (3, 8), (12, 32), (63, 168), (64, 176)])
def test_swiglu_is_eight_thirds_wide_rounded_up(dim, hidden):
    assert SwiGLU(dim).narrow.in_features == hidden == 8 * math.ceil(8 * dim / 3 / 8)


def normed(x, norm):
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    epsilon = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(
    ("placement", "equation"),
    [
        (Pre(), lambda x, f, n: x + f(normed(x, n[0]))),
        (Post(), lambda x, f, n: normed(x + f(x), n[0])),
        (Sandwich(), lambda x, f, n: x + normed(f(normed(x, n[0])), n[1])),
    ],
    ids=["pre", "post", "sandwich"],
)
def test_placements_are_their_equations(placement, equation, norm):
    residual, x = stirred(Residual(DIM, placement, norm)), states(2, 3, DIM)
    same(residual(x, torch.sin), equation(x, torch.sin, residual.norms), x, *residual.parameters())
    block = stirred(Block(DIM, HEADS, placement=placement, norm=norm, cross=True))
    memory = states(2, 5, DIM)
    h = equation(x, block.attention, block.around_attention.norms)
    h = equation(h, lambda h: block.cross(h, memory), block.around_cross.norms)
    same(block(x, memory), equation(h, block.feedforward, block.around_feedforward.norms), x, *block.parameters())


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_sinusoidal_is_its_equation(dim):
    signal = Sinusoidal(dim).double()
    for position in (0, 1, 63, 5000):
        pairs = [
            (math.sin(angle), math.cos(angle)) for angle in (position / 10000 ** (2 * i / dim) for i in range(dim // 2))
        ]
        wanted = torch.tensor(pairs, dtype=torch.float64).flatten()
        close(signal(position), wanted)
        close(signal(torch.tensor(position)), wanted)
    table = signal(torch.tensor([[0, 1, 63]]))
    assert table.shape == (1, 3, dim)
    close(table[0, 2], signal(63))
    assert Sinusoidal(dim)(3).dtype == torch.float32
    assert not signal.state_dict()


def test_sinusoidal_is_worked_out_in_float32_at_least():
    torch.testing.assert_close(Sinusoidal(8).bfloat16()(1001), Sinusoidal(8)(1001).bfloat16(), rtol=0, atol=0)


def test_learned_positions_go_on_with_the_last_one():
    signal = LearnedPositions(3, DIM)
    assert signal(2).shape == (DIM,)
    assert torch.equal(signal(torch.tensor([[0, 2, 3, 99]])), signal.table[None, [0, 2, 2, 2]])
    signal(99).sum().backward()
    assert signal.table.grad.sum(-1).tolist() == [0.0, 0.0, DIM]


FUSIONS = {
    "add": (Add, lambda m, s, x: s + x),
    "concat": (
        lambda: Concat(DIM),
        lambda m, s, x: s @ m.linear.weight[:, :DIM].T + x @ m.linear.weight[:, DIM:].T,
    ),
    "gated": (
        lambda: Gated(DIM),
        lambda m, s, x: x + (s - x) / (1 + (-torch.cat([s, x], -1) @ m.gate.weight.T - m.gate.bias).exp()),
    ),
    "attention": (
        lambda: CrossAttention(DIM, HEADS),
        lambda m, s, x: s + retyped(m.attention, normed(s, m.norm), x, torch.tensor(True).expand(2, HEADS, 5, 5)),
    ),
    "diagonal": (lambda: Diagonal(DIM), lambda m, s, x: s / (1 + m.rate.exp()) + x * m.gain),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fusions_are_their_equations(name):
    make, equation = FUSIONS[name]
    fusion = stirred(make())
    state, x = states(2, 5, DIM), states(2, 5, DIM)
    same(fusion(state, x), equation(fusion, state, x), state, x, *fusion.parameters())


def test_attention_fusion_respects_a_mask():
    fusion = stirred(CrossAttention(DIM, HEADS))
    state, x = states(2, 5, DIM), states(2, 5, DIM)
    mask = parts.padding(torch.tensor([3, 5]), 5)
    (grad,) = gradients(fusion(state, x, mask), x)
    assert grad[0, 3:].abs().max() == 0 and grad[0, :3].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_diagonal_decay_is_below_one_whatever_its_parameter(rate, dtype):
    fusion = Diagonal(3).to(dtype)
    with torch.no_grad():
        fusion.rate.fill_(rate)
    decay = fusion.decay
    assert decay.dtype == dtype and (decay < 1).all() and (decay >= 0).all()
    fusion(torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)).sum().backward()
    assert torch.isfinite(fusion.rate.grad).all()


def test_diagonal_alone_settles():
    fusion, x = Diagonal(2), torch.tensor([1.0, -2.0])
    state = torch.full((2,), 1e3)
    for _ in range(63):
        state = fusion(state, x)
    close(state.detach(), x, torch.float32)


BLOCKS = {
    "plain": lambda: Block(DIM, HEADS),
    "causal rotary": lambda: Block(DIM, HEADS, causal=True, positions=Rotary(4)),
    "relative": lambda: Block(DIM, HEADS, positions=Relative(HEADS, 2)),
    "post": lambda: Block(DIM, HEADS, placement=Post()),
    "sandwich": lambda: Block(DIM, HEADS, placement=Sandwich(), norm=RMSNorm),
    "swiglu": lambda: Block(DIM, HEADS, feedforward=SwiGLU(DIM)),
    "narrow": lambda: Block(DIM, HEADS, hidden=5),
    "cross": lambda: Block(DIM, HEADS, cross=True),
    "stack": lambda: Transformer(2, DIM, HEADS, positions=Relative(HEADS, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_is_taught(name, dtype):
    block = BLOCKS[name]().to(dtype)
    x = torch.randn(2, 5, DIM, dtype=dtype)
    context = {"x": torch.randn(2, 5, DIM, dtype=dtype), "mask": parts.padding(torch.tensor([3, 5]), 5)}
    value = block(x, context, 0)
    assert value.dtype == dtype and value.shape == x.shape
    for (key, parameter), grad in zip(block.named_parameters(), gradients(value, *block.parameters()), strict=True):
        # Rounding alone leaves about 1e-7 of the whole: a parameter that softmax cancels would not pass.
        assert grad is not None and grad.abs().max() > 1e-4 * parameter.abs().max().clamp(min=1e-2), key


def test_block_context_may_be_none_a_tensor_or_a_mapping():
    block, cross = stirred(Block(DIM, HEADS)), stirred(Block(DIM, HEADS, cross=True))
    x, memory = states(2, 3, DIM), states(2, 5, DIM)
    mask = parts.padding(torch.tensor([2, 3]), 3)
    assert torch.equal(block(x), block(x, memory, 7))
    assert torch.equal(block(x, {"mask": mask}), block(x, {"mask": mask[:, None].expand(2, 3, 3), "memory": memory}))
    assert not torch.equal(block(x), block(x, {"mask": mask}))
    assert torch.equal(cross(x, memory), cross(x, {"memory": memory}))
    assert torch.equal(cross(x, memory), cross(x, {"x": memory}))
    assert not torch.equal(cross(x, memory), cross(x, {"memory": memory + 1}))


def test_transformer_is_its_blocks_and_a_norm():
    model, x = stirred(Transformer(3, DIM, HEADS, hidden=7)), states(2, 5, DIM)
    mask = parts.padding(torch.tensor([2, 5]), 5)
    h = x
    for block in model.blocks:
        h = block(h, {"mask": mask})
    same(model(x, mask=mask), normed(h, model.norm), x, *model.parameters())
    assert torch.equal(model(x, mask=mask), model(x, {"mask": mask}, 0))
    assert torch.equal(model(x, mask=mask), model(x, {"memory": x}, mask=mask))


def test_transformer_layers_share_nothing():
    model = Transformer(3, DIM, HEADS, positions=Relative(HEADS, 2))
    one = Block(DIM, HEADS, positions=Relative(HEADS, 2))
    count = sum(parameter.numel() for parameter in one.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * count + 2 * DIM


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_trace_as_one_graph(name):
    block = BLOCKS[name]().double()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = states(2, 5, DIM)
    context = {"x": states(2, 5, DIM), "mask": parts.padding(torch.tensor([0, 5]), 5)}
    close(compiled(x, context, 0), block(x, context, 0))


@pytest.mark.parametrize("make", [lambda: Sinusoidal(DIM), lambda: LearnedPositions(2, DIM)])
def test_signals_trace_as_one_graph(make):
    signal = make()
    compiled = torch.compile(signal, fullgraph=True, backend="eager")
    for index in (0, 1, 5, torch.tensor([3, 1])):
        close(compiled(index), signal(index), torch.float32)


X = torch.zeros(2, 3, DIM)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Attention(10, 3), ValueError, "dim must be a positive multiple of heads, got 10 and 3"),
        (lambda: Attention(10, 0), ValueError, "dim must be a positive multiple of heads, got 10 and 0"),
        (lambda: Attention(12, 3, dropout=1.0), ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        (lambda: Attention(12, 3, positions=Rotary(6)), ValueError, "must be the attention's dim / heads = 4, got 6"),
        (lambda: Attention(12, 3, positions=Relative(2, 5)), ValueError, "heads must be the attention's 3, got 2"),
        (lambda: Rotary(3), ValueError, "dim_per_head must be even and positive, got 3"),
        (lambda: Relative(3, 0), ValueError, "heads and distance must be at least 1, got 3 and 0"),
        (lambda: Sinusoidal(3), ValueError, "dim must be even and positive, got 3"),
        (lambda: LearnedPositions(0, 3), ValueError, "count and dim must be at least 1, got 0 and 3"),
        (lambda: FeedForward(3, 0), ValueError, "hidden must be at least 1, got 0"),
        (lambda: SwiGLU(3, -1), ValueError, "hidden must be at least 1, got -1"),
        (lambda: Block(12, 3, hidden=4, feedforward=SwiGLU(12)), ValueError, "hidden must be None when feedforward is"),
        (lambda: Transformer(0, 12, 3), ValueError, "layers must be at least 1, got 0"),
        (
            lambda: Attention(12, 3)(X[0]),
            ValueError,
            r"x must have shape \(B, T, D\) with B = 3 and D = 12, got \(3, 12\)",
        ),
        (lambda: Attention(12, 3)(X[None]), ValueError, r"x must have shape .*, got \(1, 2, 3, 12\)"),
        (lambda: Attention(12, 3)(X[..., :4]), ValueError, r"x must have shape .*, got \(2, 3, 4\)"),
        (lambda: Attention(12, 3)(X, X[:1]), ValueError, r"memory must have shape .* B = 2 .*, got \(1, 3, 12\)"),
        (lambda: Attention(12, 3)(X, mask=torch.ones(2, 3)), TypeError, "mask must be boolean .*, got torch.float32"),
        (lambda: Attention(12, 3)(X, mask=torch.ones(3, 3) > 0), ValueError, r"mask must have shape .*, got \(3, 3\)"),
        (lambda: Attention(12, 3)(X, mask=torch.ones(2, 4) > 0), ValueError, r"mask must have shape .*, got \(2, 4\)"),
        (lambda: Attention(12, 3)(X, mask=torch.ones(2, 1, 3) > 0), ValueError, r"mask must have .*, got \(2, 1, 3\)"),
        (lambda: Attention(12, 3)(X, mask=torch.ones(2, 2, 3, 3) > 0), ValueError, r"mask must .*, got \(2, 2, 3, 3\)"),
        (lambda: Attention(12, 3)(X, mask=torch.ones(3) > 0), ValueError, r"mask must have shape .*, got \(3,\)"),
        (lambda: parts.adjacency(torch.ones(2, 3)), ValueError, r"edges must have shape \(N, N\) .*, got \(2, 3\)"),
        (lambda: Add()(X, X[:1]), ValueError, r"x must have the state's shape \(2, 3, 12\), got \(1, 3, 12\)"),
        (lambda: Block(12, 3, cross=True)(X), ValueError, "cross=True must hold a memory, got none"),
        (lambda: Block(12, 3, cross=True)(X, {"mask": None}), ValueError, "cross=True must hold a memory, got none"),
        (lambda: Block(12, 3)(X, (X, X)), TypeError, "context must be None, a tensor or a mapping, got tuple"),
        (
            lambda: Transformer(1, 12, 3)(X, {"mask": X[..., 0] == 0}, mask=X[..., 0] == 0),
            ValueError,
            "mask must be given once, got one in the call and one in the context",
        ),
    ],
)
def test_errors_name_the_value(build, error, words):
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("name", [name for name in FUSIONS if name != "attention"])
def test_fusions_place_by_place_refuse_unlike_shapes(name):
    fusion = FUSIONS[name][0]()
    with pytest.raises(ValueError, match="x must have the state's shape"):
        fusion(states(2, 3, DIM), states(2, 1, DIM))


def test_attention_fusion_looks_at_an_input_of_any_length():
    fusion = stirred(CrossAttention(DIM, HEADS))
    assert fusion(states(2, 3, DIM), states(2, 7, DIM)).shape == (2, 3, DIM)
    with pytest.raises(ValueError, match=r"memory must have shape \(B, T, D\) with B = 2 and D = .*, got \(2, 7, 1\)"):
        fusion(states(2, 3, DIM), states(2, 7, 1))
