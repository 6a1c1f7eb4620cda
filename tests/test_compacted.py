"""Leaving out rows that have stopped changes nothing but the work: values, gradients, carries, recordings, errors."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from torch import Tensor, nn

from loopaware import (
    Loop,
    Rows,
    Verdict,
    body,
    execute,
    grad,
    halt,
    init,
    observe,
    readout,
    testing,
    tokens,
    tree,
    update,
)
from loopaware import nn as blocks
from loopaware.counting import counter
from loopaware.protocols import Advance, Ran
from loopaware.recipes import execution

ONLY = execute.Compacted(break_even=0)
DIM = 4


class Scripted:
    """Stop each row at a step that was written down before. Its memory leads with the rows, so it is gathered too."""

    learned, stops, mixes = False, True, False

    def __init__(self, ends: Tensor):
        self.ends = ends

    def start(self, state: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.ends, rows.zeros(state)

    def __call__(self, old: Any, new: Any, memory: tuple[Tensor, Tensor], index: int) -> tuple[Verdict, Any]:
        stop = memory[0] <= index + 1
        return Verdict(stop, stop.to(memory[1].dtype), memory[1]), memory


class Contracting(nn.Module):
    """tanh(W (h + mean h) + x): no `partial`, tokens see each other."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        nn.init.orthogonal_(self.linear.weight, gain=0.5)

    def forward(self, state: Tensor, context: Any, index: int) -> Tensor:
        return torch.tanh(self.linear(state + state.mean(1, keepdim=True)) + tree.content(context))


class Nested(nn.Module):
    """A body that contains a loop, itself compacted."""

    def __init__(self):
        super().__init__()
        self.loop = Loop(Contracting(), 4, rows=2, halt=halt.Converged(rtol=0.2), execute=ONLY)

    def forward(self, state: Tensor, context: Any, index: int) -> Tensor:
        return 0.5 * self.loop({"x": state}).value + 0.5 * tree.content(context)


def signal(index: int) -> Tensor:
    return torch.linspace(-1, 1, DIM) * 0.3 * index


def block(**options: Any) -> nn.Module:
    return blocks.Block(DIM, 2, **{"placement": blocks.Post(), **options})


BODIES = {
    "contracting": Contracting,
    "nested": Nested,
    "block": block,
    "pre": lambda: block(placement=blocks.Pre(), norm=nn.RMSNorm, feedforward=blocks.SwiGLU(DIM)),
    "causal": lambda: block(causal=True, positions=blocks.Rotary(DIM // 2)),
    "relative": lambda: block(causal=True, positions=blocks.Relative(2, 2), placement=blocks.Sandwich()),
    "cross": lambda: block(cross=True),
    "added": lambda: body.Injected(block(), blocks.Add()),
    "gated": lambda: body.Injected(block(positions=blocks.Rotary(DIM // 2)), blocks.Gated(DIM)),
    "looking": lambda: body.Injected(block(), blocks.CrossAttention(DIM, 2)),
    "unknown fusion": lambda: body.Injected(block(), lambda state, x: state + x.mean(1, keepdim=True)),
    "timed": lambda: body.Timed(block(causal=True), signal),
    "timed inside": lambda: body.Injected(body.Timed(block(), signal), blocks.Add()),
    "stack": lambda: body.Stack(block(), block()),
    "one of a stack": lambda: body.Stack(body.Injected(block(), blocks.Concat(DIM))),
    "mixing feed-forward": lambda: block(feedforward=Mixing()),
}


class Mixing(nn.Module):
    """A feed-forward that lets tokens see each other: the block must not be run for some of them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.cumsum(1) / 3)


RULES = [
    halt.Never(),
    halt.Converged(rtol=0.3),
    halt.Patience(halt.Converged(rtol=0.5), times=2),
    halt.KL(lambda state: state, 3e-2),
    halt.Sampled(halt.Residual(level=-0.5)),
    halt.ACT(halt.Residual(level=0.0)),
    halt.StickBreaking(halt.Residual(level=0.0), epsilon=0.1),
]
UPDATES = {
    "replace": update.Replace,
    "damped": lambda: update.Damped(0.5),
    "momentum": lambda: update.Momentum(0.3),
    "lstm": lambda: update.LSTM(DIM),
    "gated": lambda: update.Gated(DIM),
}
READOUTS = [readout.Last(), readout.Weighted(), readout.Tensor2Tensor(), readout.Stacked(), readout.Every()]
GRADS = [grad.Full(), grad.Checkpointed(2), grad.Checkpointed(budget=10**9), grad.Truncated(2)]


class Case(NamedTuple):
    """A loop and what it is called with; everything in float64, where no halting rule is at the mercy of rounding."""

    loop: Loop
    context: dict[str, Tensor]
    mask: Tensor | None


@draw.composite
def cases(draws: Any) -> Case:
    batch, length = draws(draw.sampled_from([1, 2, 3, 5])), draws(draw.sampled_from([1, 3, 7]))
    torch.manual_seed(draws(draw.integers(0, 999)))
    rows, bound = draws(draw.sampled_from([1, 2])), draws(draw.integers(1, 7))
    mask = torch.rand(batch, length) < 0.7 if draws(draw.booleans()) else None
    if mask is not None and draws(draw.booleans()):
        mask[0] = False
    ends = torch.randint(1, bound + 2, (batch, length)[:rows])
    rule = draws(draw.sampled_from([Scripted(ends), Scripted(ends), *RULES]))
    mixed = READOUTS[1:] if rule.mixes else READOUTS
    steered = draws(draw.sampled_from([None, mask, torch.rand(batch, length, length) < 0.6]))
    context = {"x": torch.randn(batch, length, DIM) * (torch.rand(batch, 1, 1) * 3), "table": torch.zeros(11)}
    if steered is not None:
        context["mask"] = steered
    if draws(draw.booleans()):
        context["memory"] = torch.randn(batch, 2, DIM)
        if draws(draw.booleans()):
            context["memory_mask"] = torch.rand(batch, *([length] if draws(draw.booleans()) else []), 2) < 0.7
    chosen = BODIES[draws(draw.sampled_from(sorted(BODIES)))]()
    loop = Loop(
        chosen,
        bound,
        rows=rows,
        init=draws(draw.sampled_from([init.FromContext(), init.Zeros()])),
        update=UPDATES[draws(draw.sampled_from(sorted(UPDATES)))](),
        halt=rule,
        readout=draws(draw.sampled_from(mixed)),
    )
    if "memory_mask" not in context and "memory" not in context and steered is not None and steered.ndim > 2:
        context["memory"] = context["x"]  # a mask of pairs is none of the keys of a memory
    return Case(loop.double().eval(), tree.map(wide, context), mask)


def wide(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def differentiated(loop: Loop, case: Case) -> tuple[Any, tuple[Tensor, ...]]:
    """The output of a run, and the gradients of the weights and of the input."""
    torch.manual_seed(3)
    x = case.context["x"].clone().requires_grad_()
    out = loop({**case.context, "x": x}, mask=case.mask)
    sources = [x, *(weight for weight in loop.parameters() if weight.requires_grad)]
    numbers = [leaf.flatten() for leaf in tree.leaves(out.value) if leaf.requires_grad]
    if not numbers:
        return out, tuple(torch.zeros_like(source) for source in sources)
    return out, torch.autograd.grad(torch.cat(numbers).sin().sum(), sources, materialize_grads=True)


def compared(case: Case, part: execute.Compacted, rule: Any) -> None:
    """Eager and compacted: values, steps, verdicts, the whole carry, gradients; without gradients; resumed."""
    plain = case.loop.replace(grad=rule, execute=execute.Eager())
    own = plain.replace(execute=part)
    expected, exact = differentiated(plain, case)
    got, gradients = differentiated(own, case)
    testing.assert_close(got, expected, "the result is that of a plain run")
    testing.assert_close(got.status, expected.status, "why each row stopped is the same")
    testing.assert_close(gradients, exact, "the gradients are those of a plain run")
    with torch.no_grad():
        testing.assert_close(
            own(case.context, mask=case.mask), plain(case.context, mask=case.mask), "without gradients"
        )
        piece = own(case.context, mask=case.mask, max_steps=1 + case.loop.max_steps // 2)
        testing.assert_close(own(case.context, carry=piece.carry)[:3], expected[:3], "resumed, it is the same run")


def checked(case: Case, part: execute.Compacted, rule: Any) -> None:
    if case.loop.halt.learned and not rule.complete:
        rule = grad.Full()
    compared(case, part, rule)
    if isinstance(case.loop.halt, Scripted):  # what is written down for a batch is not for a sequence alone
        return
    context = {name: leaf for name, leaf in case.context.items() if name != "table"}
    twin = testing.naive(case.loop.replace(execute=execute.Unrolled()), context, case.mask)
    got = case.loop.replace(execute=part)(context, mask=case.mask)
    stacked = isinstance(case.loop.readout, readout.Every | readout.Stacked)  # the twin runs to the bound
    testing.assert_close(got[stacked:3], twin[stacked:3], "it equals the naive twin")


parts = draw.sampled_from([ONLY, ONLY, execute.Compacted(break_even=2e3), execute.Compacted()])
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(quick, max_examples=1000)


@quick
@given(case=cases(), part=parts, rule=draw.sampled_from(GRADS))
def test_nothing_changes_but_the_work(case: Case, part: execute.Compacted, rule: Any):
    checked(case, part, rule)


@pytest.mark.slow
@many
@given(case=cases(), part=parts, rule=draw.sampled_from(GRADS))
def test_nothing_changes_in_a_thousand_cases(case: Case, part: execute.Compacted, rule: Any):
    checked(case, part, rule)


def example(rows: int, batch: int = 5, length: int = 7) -> tuple[Tensor, Scripted]:
    x = torch.randn(batch, length, DIM).double()
    return x, Scripted(torch.randint(1, 6, (batch, length)[:rows]))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "rule", [grad.OneStep(), grad.Phantom(3), grad.Implicit(), grad.Truncated(3, least=1)], ids=str
)
@pytest.mark.parametrize(
    "moving", [update.Momentum(0.1), update.Dropout(update.Damped(0.5), 0.3)], ids=["momentum", "dropout"]
)
def test_gradients_at_rest(rows: int, rule: Any, moving: Any):
    """What a step does not move must stay the very same tensor, else the solver takes a dropout mask for a state."""
    x, _ = example(rows)
    loop = Loop(Contracting(), 60, rows=rows, update=moving, halt=halt.Converged(rtol=1e-6)).double()
    case = Case(loop.train(), {"x": x}, torch.rand(5, 7) < 0.8)
    pair = []
    for part in (execute.Eager(), ONLY):
        torch.manual_seed(1)
        pair.append(differentiated(loop.replace(grad=rule, execute=part), case))
    testing.assert_close(pair[1], pair[0], "the same place, the same gradient")


def reported(loop: Loop, context: Any, **options: Any) -> tuple[Any, Ran]:
    found: list[Ran] = []
    out = loop.replace(execute=execute.Compacted(report=found.append, **options))(context)
    return out, found[-1]


def test_it_says_what_it_ran():
    x, rule = example(2)
    ends = rule.ends
    alive = [int((ends > step).sum()) for step in range(int(ends.max()))]
    sequences = [7 * int((ends > step).any(1).sum()) for step in range(int(ends.max()))]
    loop = Loop(block(), 9, rows=2, halt=rule).double()
    _, ran = reported(loop, x, break_even=0)
    assert (ran.rows, ran.body, ran.rest, ran.reason) == (35, tuple(alive), tuple(sequences), "")
    assert ran.share == sum(alive) / 35 / len(alive)
    _, ran = reported(loop.replace(body=Contracting().double()), x, break_even=0)
    assert ran.body == ran.rest == tuple(sequences)
    assert ran.reason.endswith("run with their sequence: body Contracting declares no `partial`, or has hooks")
    _, ran = reported(loop, x)
    assert set(ran.body) == {35} and ran.reason == "a step of the whole batch is worth less than the break-even"
    halves = Loop(body.Coupled(Half(), Half()), 9, rows=2, init=init.Halves(), halt=rule).double()
    assert "declares no `partial`" in reported(halves, x, break_even=0)[1].reason
    _, ran = reported(loop.replace(readout=readout.Every()), x, break_even=0)
    assert ran.body == tuple(alive) and set(ran.rest) == {35}


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM // 2, DIM // 2)

    def forward(self, state: Tensor, context: Any, index: int) -> Tensor:
        return torch.tanh(self.linear(state))


def test_operations_fall_with_the_steps():
    """Counted by PyTorch: nothing is run for rows that have stopped, but keys and values once more."""
    x, rule = torch.randn(6, 33, 16), Scripted(torch.randint(1, 9, (6, 33)))
    loop = Loop(blocks.Block(16, 2), 8, rows=2, halt=rule)
    cost = observe.cost(loop, x)
    counts, found = [], []
    for part in (execute.Eager(), execute.Compacted(break_even=0, report=found.append)):
        with torch.no_grad(), counter() as seen:
            out = loop.replace(execute=part)(x)
        counts.append(seen.get_total_flops())
    assert counts[0] == 2 * 33 * 6 * (12 * 16**2 + 2 * 33 * 16) * 8 == cost.dense
    ends = out.steps
    stay = [(ends > step).any(1, keepdim=True) for step in range(1, 8)]  # sequences that stop take their keys with them
    keys = [33 * 6, *(int(((ends > step) & stay[step]).sum()) for step in range(7))]
    queries = sum(
        int(there.sum()) * int((ends > step).sum(1).max()) for step, there in enumerate([ends[:, :1] > -1, *stay])
    )
    assert counts[1] == 2 * 16**2 * (10 * int(ends.sum()) + 2 * sum(keys)) + 2 * 2 * 33 * 16 * queries
    assert cost.spent(found[0]) == pytest.approx(counts[1])
    assert cost.spent(found[0], found[0]) == 2 * cost.spent(found[0]) and cost.spent(found[0]) < cost.dense


def test_break_even_weighs_a_step_against_its_gathering():
    x, rule = example(1)
    loop = Loop(block(), 5, halt=rule).double()
    weights = sum(weight.numel() for weight in loop.body.parameters())
    one = 2 * 7 * weights  # operations of a sequence
    stops = [int((rule.ends > step).sum()) for step in range(int(rule.ends.max()))]
    for count in (1, 2, 3):
        _, ran = reported(loop, x, break_even=count * one - 16 * x.numel())
        assert ran.body == tuple(alive if 5 - alive >= count else 5 for alive in stops)
    assert set(reported(loop, x)[1].body) == {5}


@pytest.mark.parametrize("rows", [1, 2])
def test_recordings_are_those_of_a_plain_run(rows: int):
    x, rule = example(rows)
    loop = Loop(block(), 6, rows=rows, halt=rule).double()
    tapes = []
    for part in (execute.Eager(), ONLY):
        with observe.record(own := loop.replace(execute=part), states=True) as tape:
            own(x)
        tapes.append(tape.only)
    testing.assert_close(tapes[1], tapes[0], "the trajectory is the same")


def test_inner_loops_are_recorded_with_all_rows():
    x, rule = example(1)
    loop = Loop(Nested(), 6, halt=rule, execute=ONLY).double()
    tapes = []
    for part in (execute.Eager(), ONLY):
        with observe.record(own := loop.replace(execute=part)) as tape:
            own(x)
        tapes.append(tape)
    assert own.execute is ONLY and len(tapes[1]["body.loop"]) == int(rule.ends.max())
    for name in ("", "body.loop"):
        testing.assert_close(tuple(tapes[1][name]), tuple(tapes[0][name]), f"the trajectories of {name!r} are the same")


def test_dropout_is_replayed():
    """Checkpoints run steps again, Truncated the whole loop: the batches, and so the draws, must be the same."""
    x, rule = example(2)
    loop = Loop(block(dropout=0.3), 6, rows=2, halt=rule, execute=ONLY).double()
    found = []
    for part in (grad.Full(), grad.Checkpointed(1), grad.Truncated(6)):
        torch.manual_seed(5)
        value = loop.replace(grad=part)(x).value
        found.append((value, *torch.autograd.grad(value.square().sum(), list(loop.parameters()))))
    testing.assert_close(found[1], found[0], "checkpointed, it draws the same numbers")
    testing.assert_close(found[2], found[0], "truncated at all steps, it draws the same numbers")


def test_nan_is_found_in_the_rows_of_the_whole_batch():
    def body_(state: Tensor, context: Any, index: int) -> Tensor:
        return torch.where((context["x"] > 5) & (index == 2), float("nan"), state)

    x = torch.zeros(5, 3, DIM)
    x[3, 1] = 9.0
    for rows, place in ((1, r"\[3\]"), (2, r"\[\(3, 1\)\]")):
        rule = Scripted(
            torch.tensor([1, 4, 2, 4, 1])[:, None].expand(5, 3) if rows == 2 else torch.tensor([1, 4, 2, 4, 1])
        )
        loop = Loop(body_, 6, rows=rows, halt=rule, execute=ONLY)
        with pytest.raises(FloatingPointError, match=rf"finite, got nan or inf after 3 steps in rows {place}"):
            loop({"x": x})
        out = loop.replace(execute=execute.Compacted(break_even=0, check=False))({"x": x})
        assert out.status.flatten().tolist().count(3) == 1


def test_what_belongs_to_whom_is_not_guessed():
    x, rule = example(1)

    def multiplied(state: Tensor, context: Any, index: int) -> Tensor:
        table = context["table"]
        return state + (table.sum() if table.shape == (5, 5) else table.sum(1)[:, None, None])

    loop = Loop(multiplied, 6, halt=rule, execute=ONLY)
    context = {"x": x, "table": torch.randn(5, 5).double()}
    with pytest.raises(ValueError, match=r"'table' must not be square and of the batch's size, got \(5, 5\)\. If all"):
        loop(context)
    shared = loop.replace(execute=execute.Compacted(break_even=0, shared=("table",)))
    testing.assert_close(shared(context), loop.replace(execute=execute.Eager())(context), "all share the table")
    with pytest.raises(
        TypeError, match=r"made of tensors, tuples and mappings .* got list in 'names'\. Pass a mapping"
    ):
        loop.replace(body=Contracting().double())({"x": x, "names": ["one"]})
    index = torch.tensor([2, 0])
    pair = {
        "own": torch.arange(5),
        "one": torch.zeros(1, 5),
        "number": 3,
        "pair": (torch.eye(5), torch.ones(3)),
        "no": None,
    }
    own = tree.among(index, pair, 5, shared=())
    assert own["own"].tolist() == [2, 0] and own["one"].shape == (1, 5) and own["number"] == 3 and own["no"] is None
    assert own["pair"][0].argmax(1).tolist() == [2, 0] and own["pair"][1].shape == (3,)
    named = tree.among(index, Ran(torch.arange(5), (), ()), 5)
    assert isinstance(named, Ran) and named.rows.tolist() == [2, 0]


def test_errors():
    with pytest.raises(ValueError, match=r"break_even must be at least 0, got -1\. 0 gathers at every step"):
        execute.Compacted(break_even=-1)
    with pytest.raises(
        ValueError, match=r"execute must run all rows for Reversible\(\), got Compacted.*execute\.Eager"
    ):
        Loop(body.Coupled(Half(), Half()), 3, init=init.Halves(), grad=grad.Reversible(), execute=ONLY)


def test_an_empty_batch_and_one_of_padding():
    loop = Loop(block(), 3, rows=2, execute=ONLY)
    assert loop(torch.zeros(0, 3, DIM)).value.shape == (0, 3, DIM)
    out = loop(torch.ones(2, 3, DIM), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert out.value.eq(1).all() and not out.steps.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_and_autocast(dtype: torch.dtype):
    x, rule = example(2)
    loop = Loop(body.Injected(block(), blocks.Add()), 5, rows=2, halt=rule).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        pair = [loop.replace(execute=part)(x.to(dtype)) for part in (ONLY, execute.Eager())]
    assert pair[0].value.dtype == dtype and torch.equal(pair[0].steps, pair[1].steps)
    assert (pair[0].value - pair[1].value).abs().max() < 0.1


def test_a_step_of_some_sequences():
    x, rule = example(1)
    loop = Loop(Contracting(), 5, halt=rule).double()
    carry, index = loop.start(x), torch.tensor([4, 1])
    advance = Advance(loop.advance, x, loop.body, loop.readout)
    some = advance.among(index, 5)(tree.gather(index, carry))
    testing.assert_close(some, tree.gather(index, advance(carry)), "the step of some is some of the step")


def test_tokens_are_taken_and_put_back():
    run = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    moved = torch.tensor([[True, True, True], [False, False, True], [True, False, False]])
    full, some = torch.arange(18.0).view(3, 3, 2), tokens.Tokens(run, moved)
    new = full[run][None]
    assert torch.equal(some.flat(some.rows(new)), new)
    assert torch.equal(some.changed(full)[0], torch.cat([full[run], full[moved & ~run]]))
    assert torch.equal(some.put(full * 0, new), full * run[..., None])
    assert torch.equal(some.renewed(full * 0, some.changed(full)), full * moved[..., None])
    assert some.positions.tolist() == [[0, 2], [2, 0], [0, 0]] and some.positions_moved.tolist() == [[0, 2, 2, 1, 0]]
    assert not some.afresh.held and some.afresh.afresh is some.afresh
    assert torch.equal(some.afresh.renewed(None, some.afresh.changed(full)), full)


def test_who_can_be_run_in_part():
    able = {name: getattr(make(), "partial", False) for name, make in BODIES.items()}
    assert not any(able.pop(name) for name in ("contracting", "nested", "mixing feed-forward")) and all(able.values())
    assert not block(norm=lambda dim: Mixing()).partial and not block(placement=Pooled()).partial
    assert block(feedforward=nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())).partial


class Pooled:
    """A placement in which tokens see each other."""

    norms = 1

    def __call__(self, x: Tensor, sublayer: Any, norms: Any) -> Tensor:
        return x.mean(1, keepdim=True) + sublayer(norms[0](x))


def test_hooks_are_called():
    """A block with hooks is run whole, also inside other bodies."""
    x, rule = example(2)
    for make in (BODIES["block"], BODIES["added"], BODIES["timed inside"]):
        loop, seen = Loop(made := make(), 6, rows=2, halt=rule).double(), []
        inner = next(module for module in made.modules() if isinstance(module, blocks.Block))
        inner.register_forward_hook(lambda *call: seen.append(call[2].shape))  # noqa: B023 - called within the round
        _, ran = reported(loop, x, break_even=0)
        assert len(seen) == len(ran.body) == int(rule.ends.max()) and "has hooks" in ran.reason


def test_nothing_outlives_a_run():
    """No circle of references keeps states, keys or values until the garbage collector comes."""
    x, rule = example(2)
    held: list[weakref.ref[Tensor]] = []

    class Watched(blocks.Block):
        def some(self, x: Tensor, *others: Any) -> tuple[Tensor, Any]:
            out, kept = super().some(x, *others)
            held.extend(map(weakref.ref, (x, out, *kept)))
            return out, kept

    loop = Loop(Watched(DIM, 2), 6, rows=2, halt=rule, execute=ONLY).double()
    gc.collect()
    gc.disable()
    try:
        loop(x)
        assert held and not any(one() is not None for one in held)
    finally:
        gc.enable()


SMALL = {"dims": (16, 8), "batches": (3, 1), "heads": 2, "tokens": 9, "steps": 4, "mean": 2.0, "repeats": 1}


def test_bench_execution_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    execution.run(tmp_path, **SMALL)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(line["dim"], line["passes"]) for line in result["lines"]][::2] == [(16, "forward"), (8, "forward")]
    assert all(0 < line["operations"] <= 1 and line["error"] < 1e-5 for line in result["lines"])


def test_bench_execution_reports_nothing_if_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "unequal", lambda own, expected: 0.5)
    with pytest.raises(
        ValueError, match=r"within 0\.001 of the masked run, got 5\.0e-01 at dim 16\. Nothing is reported"
    ):
        execution.run(tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"batches must be as many as dims, got \(3, 1\) and \(16,\)\. Give a batch"):
        execution.run(tmp_path, **{**SMALL, "dims": (16,)})
    with pytest.raises(ValueError, match=r"mean must be above 1 and at most steps, got 1\.0 and 4\. Tokens stop"):
        execution.run(tmp_path, **{**SMALL, "mean": 1.0})


def test_steps_are_written_down_with_the_mean_asked_for():
    ends = execution.drawn(64, 128, 99, 3.0)
    assert ends.min() == 1 and abs(ends.double().mean() - 3) < 0.1
    one = [torch.ones(3), torch.ones(2), torch.zeros(1)]
    assert execution.unequal(one, one) == 0 and execution.unequal([one[0] * 2, *one[1:]], one) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in BODIES if name not in ("contracting", "nested")])
def test_bodies_can_be_run_in_part(name: str):
    context = {
        "x": torch.randn(3, 5, DIM).double(),
        "mask": torch.rand(3, 5, 5) < 0.7,
        "memory": torch.randn(3, 2, DIM).double(),
    }
    if name == "looking":  # a mask of pairs is none of the keys of x
        context["mask"] = torch.rand(3, 5) < 0.7
    testing.check_body(BODIES[name]().double(), torch.randn(3, 5, DIM).double(), context)


class Forgetful(blocks.Block):
    """Keeps keys of tokens that have moved."""

    def some(self, x: Tensor, context: Any, index: Any, few: tokens.Tokens, held: Any = None) -> tuple[Tensor, Any]:
        return super().some(x, context, index, tokens.Tokens(few.mask, few.mask if held else None), held)


def test_a_body_that_is_wrong_in_part_is_caught():
    with pytest.raises(AssertionError, match="what is proposed for some is what is proposed among all"):
        testing.check_body(Forgetful(DIM, 2), torch.randn(3, 5, DIM), torch.randn(3, 5, DIM))
