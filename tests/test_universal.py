"""The Universal Transformer: equal to its equations and to tensor2tensor's, typed again here with nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopaware import Loop, grad, halt, observe, readout, testing, train, update
from loopaware.models.universal import (
    Coordinates,
    HalvedWaves,
    UniversalDecoder,
    UniversalEncoder,
    UniversalTransformer,
    tensor2tensor_act,
    tensor2tensor_signal,
    tied_block,
)
from loopaware.nn import LayerNorm, Pre, Sinusoidal
from loopaware.testing.loops import check_resume

DIM, HEADS, STEPS = 6, 2, 5
LENGTHS = (5, 3, 1)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def paper() -> Coordinates:
    return Coordinates(Sinusoidal(DIM), Sinusoidal(DIM))


def norm() -> LayerNorm:
    return LayerNorm(DIM, eps=1e-6)


def lively(model: Any, rule_bias: float | None = None) -> Any:
    """Double precision, and weights that matter: gains other than one, biases other than zero."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if rule_bias is not None and isinstance(module, nn.Linear) and module.out_features == 1:
                module.bias.fill_(rule_bias)
    return model


def encoder(pre: bool = False, **options) -> Any:
    options = {"signal": paper(), "norm": norm() if pre else None, **options}
    block = tied_block(DIM, HEADS, hidden=7, placement=Pre() if pre else None)
    return UniversalEncoder(block, STEPS, **options)


def decoder(pre: bool = False, **options) -> Any:
    options = {"signal": paper(), "norm": norm() if pre else None, **options}
    block = tied_block(DIM, HEADS, hidden=7, placement=Pre() if pre else None, decoder=True)
    return UniversalDecoder(block, STEPS, **options)


def act(bias: float = -0.5) -> halt.ACT:
    return halt.ACT(halt.Linear(DIM, bias=bias))


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """States whose padding is large, and the mask of the real ones."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), max(lengths), DIM, dtype=torch.float64)
    return torch.where(mask[..., None], x, 50.0 + x), mask


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-10)


# The equations again: one sequence (T, D), its weights by name, no class of the package.


def waves(number: int) -> Tensor:
    """The paper's: sines at even features, cosines at odd ones."""
    found = []
    for j in range(DIM // 2):
        angle = number / 10000 ** (2 * j / DIM)
        found += [math.sin(angle), math.cos(angle)]
    return torch.tensor(found, dtype=torch.float64)


def halved(number: int) -> Tensor:
    """tensor2tensor's: DIM / 2 - 1 ratios of time-scales, all sines before all cosines."""
    step = math.log(10000.0) / (DIM // 2 - 1)
    angles = [number * math.exp(-step * k) for k in range(DIM // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def paper_signal(length: int, step: int, start: int = 0) -> Tensor:
    return torch.stack([waves(start + i) + waves(step) for i in range(1, length + 1)])


def normed(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = ((centred**2).mean(-1, keepdim=True) + 1e-6) ** 0.5
    return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attended(x: Tensor, memory: Tensor, weights: dict[str, Tensor], name: str, later: bool = True) -> Tensor:
    def split(tensor: Tensor, part: str, bias: bool) -> Tensor:
        out = tensor @ weights[f"{name}.{part}.weight"].T + (weights[f"{name}.{part}.bias"] if bias else 0.0)
        return out.reshape(len(tensor), HEADS, DIM // HEADS)

    query, key, value = split(x, "query", True), split(memory, "key", False), split(memory, "value", True)
    logits = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(DIM // HEADS)
    if not later:
        for i in range(len(x)):
            logits[:, i, i + 1 :] = -math.inf
    odds = (logits - logits.amax(-1, keepdim=True)).exp()
    mixed = torch.einsum("hij,jhd->ihd", odds / odds.sum(-1, keepdim=True), value).reshape(len(x), DIM)
    return mixed @ weights[f"{name}.out.weight"].T + weights[f"{name}.out.bias"]


def transition(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    wide = x @ weights["feedforward.widen.weight"].T + weights["feedforward.widen.bias"]
    return (wide * (wide > 0)) @ weights["feedforward.narrow.weight"].T + weights["feedforward.narrow.bias"]


def layer(x: Tensor, weights: dict[str, Tensor], pre: bool, memory: Tensor | None = None) -> Tensor:
    """One application of the block to H + P, a decoder's if there is a memory."""
    cross = [("cross", lambda h: attended(h, memory, weights, "cross"))] if memory is not None else []
    parts = [
        ("attention", lambda h: attended(h, h, weights, "attention", later=memory is None)),
        *cross,
        ("feedforward", lambda h: transition(h, weights)),
    ]
    for name, part in parts:
        place = f"around_{name}.norms.0"
        x = x + part(normed(x, weights, place)) if pre else normed(x + part(x), weights, place)
    return x


def weights_of(model: nn.Module, prefix: str = "loop.body.block.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in model.named_parameters()}


def fixed(x: Tensor, model: nn.Module, pre: bool, memory: Tensor | None = None) -> Tensor:
    weights = weights_of(model)
    for step in range(1, STEPS + 1):
        x = layer(x + paper_signal(len(x), step), weights, pre, memory)
    return normed(x, weights, "norm") if pre else x


@pytest.mark.parametrize("pre", [False, True])
def test_fixed_steps_are_the_equations_of_the_encoder(pre: bool):
    model = lively(encoder(pre))
    x, mask = batch()
    out = model(x, mask)
    for item, length in enumerate(LENGTHS):
        expected = fixed(x[item, :length], model, pre)
        exact(out.value[item, :length], expected)
        pair = [
            torch.autograd.grad(y.square().sum(), weights_of(model)["attention.query.weight"], retain_graph=True)
            for y in (out.value[item, :length], expected)
        ]
        exact(pair[0][0], pair[1][0])
    assert torch.equal(out.steps, STEPS * mask)


@pytest.mark.parametrize("pre", [False, True])
def test_fixed_steps_are_the_equations_of_the_decoder(pre: bool):
    model = lively(decoder(pre))
    (x, mask), (memory, memory_mask) = batch(), batch((2, 4, 3))
    out = model(x, memory, mask, memory_mask)
    for item, (length, seen) in enumerate(zip(LENGTHS, (2, 4, 3), strict=True)):
        exact(out.value[item, :length], fixed(x[item, :length], model, pre, memory[item, :seen]))


# Halting.


def by_token(x: Tensor, model: nn.Module, memory: Tensor | None = None) -> tuple[Tensor, list[int]]:
    """ACT on a post-norm model, token by token: a list of states, frozen one after the other."""
    weights = weights_of(model)
    head = weights["loop.halt.rule.head.weight"][0], weights["loop.halt.rule.head.bias"][0]
    states, steps = list(x), [0] * len(x)
    value, halted = [torch.zeros(DIM, dtype=x.dtype) for _ in x], [False] * len(x)
    spent: list[Any] = [0.0] * len(x)
    for step in range(1, STEPS + 1):
        new = layer(torch.stack(states) + paper_signal(len(x), step), weights, False, memory)
        for i in range(len(x)):
            if halted[i]:
                continue
            states[i], steps[i] = new[i], step
            p = 1 / (1 + torch.exp(-(head[0] @ new[i] + head[1])))
            halted[i] = bool(spent[i] + p >= 0.99)
            p = 1 - spent[i] if halted[i] or step == STEPS else p
            value[i] = value[i] + p * new[i]
            spent[i] = spent[i] + p
    return torch.stack(value), steps


@pytest.mark.parametrize(
    ("build", "bias", "bound"), [(encoder, -1.0, 0), (encoder, -1.7, 2), (decoder, 1.0, 0), (decoder, 0.0, 7)]
)
def test_adaptive_steps_are_the_naive_loop_over_tokens(build: Callable, bias: float, bound: int):
    model = lively(build(halt=act()), rule_bias=bias)
    (x, mask), (memory, memory_mask) = batch(), batch((2, 4, 3))
    out = model(x, mask) if build is encoder else model(x, memory, mask, memory_mask)
    for item, (length, seen) in enumerate(zip(LENGTHS, (2, 4, 3), strict=True)):
        value, steps = by_token(x[item, :length], model, None if build is encoder else memory[item, :seen])
        exact(out.value[item, :length], value)
        assert out.steps[item, :length].tolist() == steps
        taught = [weights_of(model)[name] for name in ("loop.halt.rule.head.weight", "attention.key.weight")]
        pair = [
            torch.autograd.grad(y.square().sum(), taught, retain_graph=True) for y in (out.value[item, :length], value)
        ]
        for one, other in zip(*pair, strict=True):
            exact(one, other)
    assert len(out.steps[mask].unique()) > 1, "tokens halt at different steps, and some are seen frozen"
    assert (mask & ~out.halted).sum() == bound, "so many meet the bound"
    assert not out.steps[~mask].any() and not out.halted[~mask].any()


RULES = [
    lambda: None,
    act,
    lambda: halt.StickBreaking(halt.Linear(DIM, bias=0.0), epsilon=0.1),
    lambda: halt.Residual(level=-1.0),
    lambda: halt.ACT(halt.Before(halt.Linear(DIM, bias=0.0), paper())),
]


def as_tensor2tensor(model: Any) -> Any:
    model.loop = tensor2tensor_act(model.loop, DIM, bias=0.0)
    return model


@pytest.mark.parametrize("rule", [*RULES, as_tensor2tensor])
def test_a_padded_batch_equals_each_sequence_alone(rule: Callable):
    (x, mask), (memory, memory_mask) = batch(), batch((2, 4, 3))
    for build in (encoder, decoder):
        model = lively(rule(build()) if rule is as_tensor2tensor else build(halt=rule())).eval()
        whole = model(x, mask) if build is encoder else model(x, memory, mask, memory_mask)
        for item, length in enumerate(LENGTHS):
            own, seen = x[item : item + 1, :length], memory[item : item + 1, : (2, 4, 3)[item]]
            alone = model(own) if build is encoder else model(own, seen)
            exact(whole.value[item : item + 1, :length], alone.value)
            tokens = (slice(item, item + 1), slice(length)) if alone.steps.ndim == 2 else slice(item, item + 1)
            assert torch.equal(whole.steps[tokens], alone.steps) and torch.equal(whole.halted[tokens], alone.halted)


@pytest.mark.parametrize("rule", [*RULES, as_tensor2tensor])
def test_later_tokens_do_not_change_earlier_ones(rule: Callable):
    model = lively(rule(decoder()) if rule is as_tensor2tensor else decoder(halt=rule()))
    x, memory = torch.randn(2, 7, DIM, dtype=torch.float64), torch.randn(2, 3, DIM, dtype=torch.float64)
    whole = model(x, memory)
    for length in (1, 4):
        cut = model(x[:, :length], memory)
        exact(whole.value[:, :length], cut.value)
        other = model(torch.cat([x[:, :length], 9 * torch.randn_like(x[:, length:])], 1), memory)
        exact(whole.value[:, :length], other.value[:, :length])
        if whole.steps.ndim == 2:
            assert torch.equal(whole.steps[:, :length], cut.steps)


def test_the_loops_keep_the_laws_of_loops():
    x, mask = torch.randn(3, 5, DIM), batch()[1]
    for model in (encoder(halt=act()), encoder(update=update.Gated(DIM)), encoder(pre=True, halt=act())):
        testing.check_loop(model.loop, {"x": x, "mask": mask}, mask=mask)
    loop = as_tensor2tensor(encoder()).loop
    check_resume(loop.replace(readout=readout.Last()), {"x": x, "mask": mask}, mask)
    torch._dynamo.reset()
    testing.check_traceable(encoder(halt=act()).loop, {"x": x, "mask": mask})
    testing.check_traceable(loop, {"x": x, "mask": mask})


def test_sequences_may_halt_as_wholes():
    model = encoder(halt=act())
    model.loop = model.loop.replace(rows=1)
    assert model(torch.randn(3, 5, DIM)).steps.shape == (3,)


# Signals.


def test_signals_count_as_the_paper_and_as_tensor2tensor():
    state = torch.randn(2, 4, DIM, dtype=torch.float64)
    exact(paper().double()(state, 2), state + paper_signal(4, 3))
    both = Coordinates(HalvedWaves(DIM), HalvedWaves(DIM), first=0).double()
    exact(both(state, 2), state + torch.stack([halved(i) + halved(2) for i in range(4)]))
    learned: Any = tensor2tensor_signal(DIM, steps=3).double()
    for index, row in ((0, 0), (2, 2), (7, 2)):
        expected = state + torch.stack([halved(i) for i in range(4)]) + learned.steps.table[row]
        exact(learned(state, index), expected)
    assert learned.steps.table.std() > 0.5
    assert torch.equal(Coordinates()(state, 1), state)


def test_waves_of_two_features_and_long_positions():
    exact(HalvedWaves(2).double()(torch.tensor([3])), torch.tensor([[math.sin(3), math.cos(3)]], dtype=torch.float64))
    exact(HalvedWaves(DIM).double()(torch.tensor([[63]])), halved(63)[None, None])


def test_shifts_are_drawn_for_each_sequence_in_training_alone():
    model = lively(encoder(signal=Coordinates(Sinusoidal(DIM), Sinusoidal(DIM), shift=30)))
    plain = encoder().double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, DIM, dtype=torch.float64).expand(64, -1, -1)
    exact(model.eval()(x).value, plain(x).value)
    value = model.train()(x).value
    starts = torch.arange(31)
    every = model(x[:31], start=starts).value
    found = (value[:, None] - every[None]).abs().flatten(2).amax(-1).argmin(-1)
    exact(value, every[found])
    assert len(found.unique()) > 10 and (every[0] - every[-1]).abs().max() > 1e-3
    weights = weights_of(model)
    expected = x[0]
    for step in range(1, STEPS + 1):
        expected = layer(expected + paper_signal(4, step, start=17), weights, False)
    exact(every[17], expected)


def test_source_and_target_are_shifted_alike():
    signal = tensor2tensor_signal(DIM, STEPS, shift=30)
    model = UniversalTransformer(encoder(signal=signal), decoder(signal=signal), DIM, vocabulary=9).double()
    seen = []
    signal.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    model(torch.ones(3, 4, dtype=torch.long), torch.ones(3, 2, dtype=torch.long))
    assert len(seen) == 2 * STEPS and all(torch.equal(start, seen[0]) for start in seen)
    seen.clear()
    model.decoder(torch.randn(3, 2, DIM).double(), torch.randn(3, 4, DIM).double())
    assert seen[0].shape == (3,)


# tensor2tensor.


def released_step(model: nn.Module, state: Tensor, step: int) -> Tensor:
    """State + position + step, in tensor2tensor's counting."""
    table = dict(model.named_parameters())["loop.body.signal.steps.table"]
    return state + torch.stack([halved(i) for i in range(len(state))]) + table[step]


def tensor2tensor(**options) -> Any:
    return encoder(pre=True, signal=tensor2tensor_signal(DIM, STEPS), **options)


def test_fixed_steps_of_tensor2tensor():
    model = lively(tensor2tensor())
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    state, weights = x[0], weights_of(model)
    for step in range(STEPS):
        state = layer(released_step(model, state, step), weights, True)
    exact(model(x).value[0], normed(state, weights, "norm"))


def test_halting_before_the_step_with_the_recursive_mean():
    signal = tensor2tensor_signal(DIM, STEPS)
    model = encoder(pre=True, signal=signal, halt=halt.ACT(halt.Before(halt.Linear(DIM, bias=1.0), signal)))
    model.loop = model.loop.replace(readout=readout.Tensor2Tensor())
    lively(model, rule_bias=-1.0)
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    weights, states = weights_of(model), list(x[0])
    head = weights["loop.halt.rule.rule.head.weight"][0], weights["loop.halt.rule.rule.head.bias"][0]
    spent, value, steps = [0.0] * 4, [torch.zeros(DIM, dtype=x.dtype)] * 4, [0] * 4
    for step in range(STEPS):
        told = released_step(model, torch.stack(states), step)
        new = layer(told, weights, True)
        for i in range(4):
            if spent[i] == 1.0:
                continue
            p = torch.sigmoid(head[0] @ told[i] + head[1]).item()
            share = p if spent[i] + p < 0.99 else 1.0 - spent[i]
            spent[i] = spent[i] + p if spent[i] + p < 0.99 else 1.0
            value[i] = share * new[i] + (1 - share) * value[i]
            states[i], steps[i] = new[i], step + 1
    exact(model(x).value[0], normed(torch.stack(value), weights, "norm"))
    assert model(x).steps[0].tolist() == steps and len(set(steps)) > 1


def while_loop(x: Tensor, transform: Callable, probability: Callable, bound: int) -> dict[str, Tensor]:
    """tensor2tensor's function of act_type "basic" for a batch, with the brackets of the paper's listing."""
    threshold = 1.0 - 0.01
    shape = x.shape[:2]
    halting, remainders, updates = (torch.zeros(shape, dtype=x.dtype) for _ in range(3))
    state, previous, step = x, torch.zeros_like(x), 0
    while ((halting < threshold) & (updates < bound)).any():
        state, p = probability(state, step)
        running = (halting < 1.0).to(x)
        new_halted = (halting + p * running > threshold).to(x) * running
        running = (halting + p * running <= threshold).to(x) * running
        halting = halting + p * running
        remainders = remainders + new_halted * (1 - halting)
        halting = halting + new_halted * remainders
        updates = updates + running + new_halted
        weights = (p * running + new_halted * remainders)[..., None]
        state = transform(state)
        previous = state * weights + previous * (1 - weights)
        step += 1
    return {"value": previous, "updates": updates, "remainder": remainders, "probability": halting}


@pytest.mark.parametrize("bias", [-9.0, -0.5, 1.0])
def test_act_of_tensor2tensor_is_its_while_loop(bias: float):
    model = tensor2tensor()
    act_loop: Any = tensor2tensor_act(model.loop, DIM)
    assert act_loop.body.head.bias.item() == 1.0
    model.loop = act_loop
    lively(model, rule_bias=bias)
    named: dict[str, Any] = dict(model.named_parameters())
    weights = weights_of(model, "loop.body.step.block.")
    head = named["loop.body.head.weight"][0], named["loop.body.head.bias"][0]

    def probability(state: Tensor, step: int) -> tuple[Tensor, Tensor]:
        positions = torch.stack([halved(i) for i in range(state.shape[1])])
        state = state + positions + named["loop.body.step.signal.steps.table"][step]
        return state, torch.sigmoid(state @ head[0] + head[1])

    x = torch.randn(3, 4, DIM, dtype=torch.float64)
    expected = while_loop(x, lambda h: torch.stack([layer(one, weights, True) for one in h]), probability, STEPS)
    out = model(x)
    exact(out.value, normed(expected["value"], named, "norm"))
    for name in ("value", "updates", "remainder", "probability"):
        exact(out.carry.state[name], expected[name])
    assert torch.equal(out.steps, expected["updates"].amax(1).long())
    assert torch.equal(out.halted, (expected["probability"] >= 0.99).all(1))
    ponder = [found["updates"].mean() + found["remainder"].mean() for found in (out.carry.state, expected)]
    pair = [
        torch.autograd.grad(y.square().sum() + 3 * cost, list(model.parameters()))
        for y, cost in ((out.value, ponder[0]), (normed(expected["value"], named, "norm"), ponder[1]))
    ]
    for one, other in zip(*pair, strict=True):
        exact(one, other)
    if bias == -9.0:
        assert not out.halted.any(), "nothing is given back at the bound"
    if bias == -0.5:
        assert len(out.carry.state["updates"].unique()) > 1, "tokens halt at different steps"


def test_act_of_tensor2tensor_differs_from_frozen_tokens():
    """The twin that freezes has the same shares at the first halt, and other values after it."""
    signal = tensor2tensor_signal(DIM, STEPS)
    frozen = encoder(pre=True, signal=signal, halt=halt.ACT(halt.Before(halt.Linear(DIM), signal)))
    frozen.loop = frozen.loop.replace(readout=readout.Tensor2Tensor())
    lively(frozen, rule_bias=-0.5)
    moving: Any = UniversalEncoder(frozen.loop.body.block, STEPS, signal=signal, norm=frozen.norm)
    act_loop: Any = tensor2tensor_act(moving.loop, DIM).double()
    moving.loop = act_loop
    act_loop.body.head.load_state_dict(frozen.loop.halt.rule.rule.head.state_dict())
    x = torch.randn(8, 4, DIM, dtype=torch.float64)
    one, other = frozen(x), moving(x)
    first = one.steps == one.steps.amin(1, keepdim=True)
    exact(one.value[first], other.value[first])
    assert (one.value - other.value)[~first].abs().max() > 1e-3


def test_update_gates_are_the_recurrences():
    """highway: the gate reads state and proposal, and carries the state without its signal."""
    model = lively(encoder(update=update.Gated(DIM)))
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    weights, named, h = weights_of(model), weights_of(model, ""), x[0]
    for step in range(1, STEPS + 1):
        p = layer(h + paper_signal(4, step), weights, False)
        gate = torch.cat([h, p], -1) @ named["loop.update.gate.weight"].T + named["loop.update.gate.bias"]
        carry = 1 / (1 + (-gate).exp())
        h = carry * h + (1 - carry) * p
    exact(model(x).value[0], h)


@pytest.mark.parametrize("cell", [update.GRU, update.LSTM])
def test_recurrent_cells_take_the_proposal_as_input(cell: Callable):
    model = lively(encoder(update=cell(DIM)))
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    weights, h, c = weights_of(model), x[0], torch.zeros_like(x[0])
    for step in range(1, STEPS + 1):
        p = layer(h + paper_signal(4, step), weights, False)
        if cell is update.GRU:
            h = model.loop.update.cell(p, h)
        else:
            h, c = model.loop.update.cell(p, (h, c))
    exact(model(x).value[0], h)


# The whole model.


def whole(**options) -> Any:
    return UniversalTransformer(encoder(**options), decoder(**options), DIM, vocabulary=9)


def some_tokens() -> tuple[Tensor, ...]:
    masks = [torch.arange(max(n)) < torch.tensor(n)[:, None] for n in (LENGTHS, (2, 4, 3))]
    return torch.randint(9, (3, 5)), torch.randint(9, (3, 4)), *masks


def test_the_whole_model_is_embedding_encoder_decoder_head():
    model = lively(whole(halt=act()))
    source, target, source_mask, target_mask = some_tokens()
    out = model(source, target, source_mask, target_mask)
    named: dict[str, Any] = dict(model.named_parameters())
    for item, (length, seen) in enumerate(zip((2, 4, 3), LENGTHS, strict=True)):
        memory, _ = by_token(named["tokens.weight"][source[item, :seen]], model.encoder)
        value, steps = by_token(named["tokens.weight"][target[item, :length]], model.decoder, memory)
        exact(out.value[item, :length], value @ named["head.weight"].T + named["head.bias"])
        assert out.steps[item, :length].tolist() == steps


@pytest.mark.parametrize("rule", [*RULES, as_tensor2tensor])
def test_every_parameter_has_a_gradient(rule: Callable):
    for pre in (False, True):
        model = whole(pre=pre)
        for half in (model.encoder, model.decoder):
            half.loop = half.loop.replace(
                body=type(half)(half.loop.body.block, STEPS, signal=tensor2tensor_signal(DIM, STEPS)).loop.body
            )
            if rule is as_tensor2tensor:
                as_tensor2tensor(half)
            elif (made := rule()) is not None:
                chosen = readout.Weighted() if made.mixes else None
                half.loop = half.loop.replace(halt=made, readout=chosen)
        source, target, source_mask, target_mask = some_tokens()
        with observe.record(model) as tape:
            out = model(source, target, source_mask, target_mask)
        cost = sum(calls[0].scores.sum() for calls in tape.values()) if made_learned(model) else 0.0
        (out.value[target_mask].square().sum() + cost).backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert unused == []


def made_learned(model: UniversalTransformer) -> bool:
    """Rules with a hard stop learn from their scores, as in training with `train.objectives`."""
    return isinstance(model.encoder.loop.halt, halt.Residual)


@pytest.mark.parametrize("rule", [*RULES, as_tensor2tensor])
def test_saved_and_loaded_it_is_the_same(rule: Callable, tmp_path):
    def build() -> UniversalTransformer:
        signal = tensor2tensor_signal(DIM, STEPS)
        if rule is as_tensor2tensor:
            return UniversalTransformer(
                as_tensor2tensor(encoder(signal=signal)), as_tensor2tensor(decoder(signal=signal)), DIM, 9
            )
        made = rule()
        if made is not None and isinstance(getattr(made, "rule", None), halt.Before):
            made.rule.signal = signal
        return UniversalTransformer(encoder(signal=signal, halt=made), decoder(pre=True), DIM, vocabulary=9)

    model, other = lively(build()), build().double()
    source, target, source_mask, target_mask = some_tokens()
    path = train.save_model(model, tmp_path / "model.safetensors")
    train.load_model(other, path)
    before, after = (m(source, target, source_mask, target_mask) for m in (model, other))
    assert torch.equal(before.value, after.value) and torch.equal(before.steps, after.steps)


@pytest.mark.parametrize("rule", [None, act])
def test_generation_is_the_likeliest_token_again_and_again(rule: Callable | None):
    model = lively(whole(halt=None if rule is None else rule())).eval()
    source, _, mask, _ = some_tokens()
    found = model.generate(source, 6, begin=0, mask=mask)
    assert found.shape == (3, 6)
    given = torch.cat([torch.zeros(3, 1, dtype=torch.long), found], 1)[:, :-1]
    assert torch.equal(model(source, given, mask).value.argmax(-1), found), "it is what teacher forcing calls likeliest"
    for item, length in enumerate(LENGTHS):
        assert torch.equal(model.generate(source[item : item + 1, :length], 6, begin=0), found[item : item + 1])
    for end in (int(found[0, 1]), 0):
        stopped = model.generate(source, 6, begin=0, end=end, mask=mask)
        for row, free in zip(stopped.tolist(), found.tolist(), strict=True):
            place = free.index(end) if end in free else 6
            assert row == free[:place] + [end] * (6 - place)


def test_ponder_cost_reaches_both_halves():
    model = whole(halt=None)
    for half in (model.encoder, model.decoder):
        half.loop = half.loop.replace(halt=act(), readout=readout.Weighted())
    with observe.record(model) as tape:
        model(*some_tokens())
    paths = [tape["encoder.loop"][0], tape["decoder.loop"][0]]
    costs = [train.objectives.mean(train.objectives.ponder_cost(path), path) for path in paths]
    torch.stack(costs).sum().backward()
    for half in (model.encoder, model.decoder):
        assert half.loop.halt.rule.head.weight.grad.abs().sum() > 0


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="a decoder's block must be causal and look at a memory, got causal=False"):
        UniversalDecoder(tied_block(DIM, HEADS), STEPS)
    with pytest.raises(ValueError, match="first must be at least 0, got -1"):
        Coordinates(first=-1)
    with pytest.raises(ValueError, match="shift must be at least 0, got -3"):
        Coordinates(shift=-3)
    with pytest.raises(ValueError, match="dim must be even and positive, got 5"):
        HalvedWaves(5)
    with pytest.raises(ValueError, match="count and dim must be at least 1, got 0"):
        tensor2tensor_signal(DIM, 0)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        UniversalEncoder(tied_block(DIM, HEADS), 0)
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        UniversalTransformer(encoder(), decoder(), DIM, 0)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        UniversalTransformer(encoder(), decoder(), 0, 9)
    with pytest.raises(ValueError, match="epsilon must be above 0.0 and at most 0.5, got 0.9"):
        tensor2tensor_act(encoder().loop, DIM, epsilon=0.9)
    with pytest.raises(TypeError, match="loop must be that of an encoder or decoder, got Identity"):
        tensor2tensor_act(Loop(nn.Identity(), 3), DIM)
    with pytest.raises(ValueError, match="grad must differentiate every step when halting is learned"):
        tensor2tensor_act(encoder().loop, DIM).replace(grad=grad.Truncated(2))
    with pytest.raises(ValueError, match="readout must return the last state when no other carries a gradient"):
        Loop(encoder().loop.body, 3, readout=tensor2tensor_act(encoder().loop, DIM).readout, grad=grad.OneStep())
