"""Requests in batches: every policy keeps its law, and every request is answered as if it had been asked alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from torch import Tensor, nn

from loopaware import (
    Loop,
    body,
    execute,
    halt,
    models,
    readout,
    serve,
    testing,
    tree,
    update,
)
from loopaware import nn as blocks
from loopaware.recipes import batching

DIM = 6
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
sizes = draw.lists(draw.integers(1, 9), min_size=1, max_size=20)


def sequences(lengths: Sequence[int], pairs: bool = False, seed: int = 0) -> list[Any]:
    """Requests in float64, some of them loud, so that they stop at different steps."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place, size in enumerate(lengths):
        x = torch.randn(size, DIM, generator=generator).double() * (0.1, 1.0, 3.0)[place % 3]
        edges = torch.rand(size, size, generator=generator) < 0.6
        found.append({"x": x, "mask": edges} if pairs else x)
    return found


def guessed(requests: Sequence[Any]) -> Tensor:
    return torch.tensor([float(tree.content(request).sum()) for request in requests])


def policies(size: int, tokens: int | None) -> list[Any]:
    return [serve.InOrder(size, tokens), serve.ByLength(size, tokens), serve.ByDepth(guessed, size, tokens)]


@quick
@given(lengths=sizes, trailing=draw.sampled_from([(), (3,), (2, 1)]))
def test_padding_goes_and_comes_back(lengths: list[int], trailing: tuple[int, ...]):
    requests = [torch.randn(size, *trailing) for size in lengths]
    batch, real = serve.padded(requests)
    assert batch.shape == (len(lengths), max(lengths), *trailing) and real.sum(1).tolist() == lengths
    assert not batch[~real].any()
    for one, other in zip(serve.unpadded({"h": (batch,)}, real), requests, strict=True):
        assert torch.equal(one["h"][0], other)


def test_padding_attends_to_itself_alone():
    requests = sequences([2, 3], pairs=True)
    batch, real = serve.padded(requests)
    assert torch.equal(batch["mask"][1], requests[1]["mask"]) and torch.equal(
        batch["mask"][0, :2, :2], requests[0]["mask"]
    )
    assert batch["mask"][0, 2].tolist() == [False, False, True] and batch["mask"][0, :2, 2].tolist() == [False, False]
    keys = [{"x": torch.ones(size), "mask": torch.ones(size).bool()} for size in (2, 3)]
    assert torch.equal(serve.padded(keys)[0]["mask"], real)


@quick
@given(lengths=draw.lists(draw.integers(1, 9), max_size=40), size=draw.integers(1, 7), room=draw.integers(-1, 20))
def test_every_policy_keeps_its_law(lengths: list[int], size: int, room: int):
    requests, tokens = sequences(lengths), None if room < 0 else max([*lengths, 1]) + room
    for policy in policies(size, tokens):
        batches = policy(requests)
        assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= size for batch in batches)
        if tokens is None:
            assert len(batches) == -(-len(lengths) // size)
        else:
            assert all(len(batch) * max(lengths[place] for place in batch) <= tokens for batch in batches)
        assert batches == policy(requests)
        fits = [[*one, other[0]] for one, other in itertools.pairwise(batches)]  # with the next one it would not
        if not isinstance(policy, serve.ByDepth):
            over = [len(b) > size or (tokens and len(b) * max(lengths[i] for i in b) > tokens) for b in fits]
            assert all(over)


def test_policies_put_together_what_belongs_together():
    requests = sequences([5, 1, 5, 1, 5, 1])
    assert serve.InOrder(2)(requests) == [[0, 1], [2, 3], [4, 5]]
    assert serve.InOrder(9, tokens=10)(requests) == [[0, 1], [2, 3], [4, 5]]
    assert serve.ByLength(2)(requests) == [[0, 2], [4, 1], [3, 5]]
    deep = serve.ByDepth(lambda requests: torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0]), 3)
    assert [sorted(batch) for batch in deep(requests)] == [[1, 3, 5], [0, 2, 4]]
    alike = serve.ByDepth(lambda requests: torch.tensor([1.0, 9.0, 2.0, 8.0]), 2)(sequences([3] * 4))
    assert alike == [[1, 3], [2, 0]]  # of one length it is an order by depth


def test_depth_and_length_together_leave_less_to_do_than_either():
    lengths = torch.randint(1, 60, (500,)).tolist()
    depths = torch.randint(1, 20, (500,)).float()

    def work(policy: Any) -> float:
        batches = policy([torch.ones(size) for size in lengths])
        return sum(len(b) * max(lengths[i] for i in b) * max(depths[i].item() for i in b) for b in batches)

    both = work(serve.ByDepth(lambda requests: depths, 16))
    alone = sorted(range(500), key=lambda i: depths[i].item())
    by_depth = work(lambda requests: [alone[at : at + 16] for at in range(0, 500, 16)])
    needed = sum(size * steps.item() for size, steps in zip(lengths, depths, strict=True))
    assert needed < both < 0.75 * min(work(serve.ByLength(16)), by_depth)


def block(**options: Any) -> nn.Module:
    return blocks.Block(DIM, 2, **{"placement": blocks.Post(), **options})


BODIES = {
    "block": block,
    "relative": lambda: block(causal=True, positions=blocks.Relative(2, 3)),
    "injected": lambda: body.Injected(block(), blocks.Add()),
}
RULES = [
    halt.Converged(rtol=0.3),
    halt.Patience(halt.Converged(rtol=0.5), times=2),
    halt.ACT(halt.Residual(level=0.0)),
    halt.KL(lambda state: state, 3e-2),
    halt.Never(),
]
EXECUTES = [
    execute.Eager(),
    execute.Compacted(break_even=0, shared=()),
    serve.Continuous(1),
    serve.Continuous(2),
    serve.Continuous(99, shared=()),
]


@quick
@given(
    lengths=sizes,
    size=draw.integers(1, 7),
    which=draw.integers(0, 2),
    made=draw.sampled_from(sorted(BODIES)),
    rule=draw.sampled_from(RULES),
    part=draw.sampled_from(EXECUTES),
    rows=draw.sampled_from([1, 2]),
    pairs=draw.booleans(),
    moving=draw.sampled_from([update.Replace(), update.Damped(0.5), update.Momentum(0.3)]),
)
def test_a_batch_answers_as_one_by_one(
    lengths: list[int], size: int, which: int, made: str, rule: Any, part: Any, rows: int, pairs: bool, moving: Any
):
    torch.manual_seed(len(lengths))
    mixed = readout.Weighted() if rule.mixes else readout.Last()
    loop = Loop(BODIES[made](), 7, rows=rows, update=moving, halt=rule, readout=mixed).double().eval()
    requests = sequences(lengths, pairs)
    got = serve.encode(loop.replace(execute=part), requests, policies(size, None)[which])
    for request, answer in zip(requests, got, strict=True):
        alone = loop(tree.map(lambda leaf: leaf[None], request if pairs else {"x": request}))
        expected = serve.Encoded(alone.value[0].detach(), alone.steps[0], alone.halted[0])
        testing.assert_close(answer, expected, "a request is answered as if it were alone")


class Classifier(nn.Module):
    """A model whose answer is one for each request: the mean state, through a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, DIM)
        self.loop = Loop(block(), 9, halt=halt.Converged(rtol=0.3))
        self.head = nn.Linear(DIM, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        out = self.loop({"x": self.embedding(ids), "mask": mask}, mask=mask)
        return out._replace(value=self.head(out.carry.rows.mean(out.value)))


def test_models_of_their_own_input():
    requests = [torch.randint(5, (size,)) for size in (3, 1, 7, 3, 2)]
    model = Classifier().double().eval()
    got = serve.encode(model, requests, serve.ByLength(2), pooled=True)
    for request, answer in zip(requests, got, strict=True):
        alone = model(request[None], torch.ones(1, len(request)).bool())
        testing.assert_close(answer.value, alone.value[0].detach(), "a pooled answer is that of the request alone")
        assert answer.steps == alone.steps[0] and answer.value.shape == (3,) and not answer.value.requires_grad
    with pytest.raises(ValueError, match=r"must lead with \(2, 7\), got \(2, 3\)\. Say pooled=True to encode"):
        serve.encode(model, requests, serve.ByLength(2))


def test_encoders_whose_tokens_halt():
    encoder = models.UniversalEncoder(models.universal.tied_block(DIM, 2), 6, halt=halt.Converged(rtol=0.4))
    requests = sequences([3, 1, 7, 5])
    got = serve.encode(encoder.double().eval(), requests, serve.InOrder(4))
    for request, answer in zip(requests, got, strict=True):
        alone = encoder(request[None])
        testing.assert_close(answer.value, alone.value[0].detach(), "a token is answered as if alone")
        assert torch.equal(answer.steps, alone.steps[0]) and answer.halted.shape == (len(request),)


def test_gradients_of_a_padded_batch_are_those_of_its_requests():
    loop = Loop(BODIES["injected"](), 7, halt=halt.Converged(rtol=0.3)).double()
    weights, requests = list(loop.parameters()), sequences([3, 1, 7])

    def loss(values: list[Tensor]) -> Tensor:
        return sum(value.sin().sum() for value in values)  # pyright: ignore[reportReturnType]

    batch, real = serve.padded(requests)
    together = loss(serve.unpadded(loop({"x": batch, "mask": real}, mask=real).value, real))
    alone = loss([loop({"x": request[None]}).value[0] for request in requests])
    pair = [torch.autograd.grad(total, weights) for total in (together, alone)]
    testing.assert_close(pair[0], pair[1], "padding teaches nothing")


def test_nobody_is_answered_without_requests():
    loop = Loop(block(), 3).eval()
    assert [serve.encode(loop, [], policy) for policy in policies(3, 9)] == [[], [], []]


def never(*_: object) -> Any:
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: serve.padded([]), ValueError, "requests must be at least one, got none"),
        (lambda: serve.padded([torch.ones(2), torch.ones(0)]), ValueError, r"one position, got shape \(0,\)\. Leave"),
        (lambda: serve.padded([torch.tensor(1.0)]), ValueError, r"at least one position, got shape \(\)"),
        (lambda: serve.padded([[1.0]]), TypeError, "a context must be a tensor or a mapping .* got list"),
        (
            lambda: serve.padded([torch.ones(2, 3), torch.ones(2, 4)]),
            ValueError,
            r"agree in features and type, got \(\(3,\), torch.float32\), \(\(4,\), torch.float32\)\. Only their",
        ),
        (lambda: serve.padded([torch.ones(2), torch.ones(2).long()]), ValueError, "agree in features and type"),
        (
            lambda: serve.padded([torch.ones(2), {"x": torch.ones(2)}]),
            ValueError,
            r"must all be tensors, or all have the entries 'x' and, if any, 'mask', got \['x'\], a tensor\. Other",
        ),
        (
            lambda: serve.padded([{"x": torch.ones(2), "memory": torch.ones(3)}]),
            ValueError,
            r"got \['memory', 'x'\]\. Other entries cannot be padded",
        ),
        (
            lambda: serve.padded([{"x": torch.ones(2), "mask": torch.ones(2)}]),
            ValueError,
            r"mask must be boolean, \(2\) or \(2, 2\) and of one kind for all requests, got \(2,\) of torch.float32",
        ),
        (
            lambda: serve.padded([{"x": torch.ones(2), "mask": torch.ones(3, 3).bool()}]),
            ValueError,
            r"mask must be boolean, \(2\) or \(2, 2\) .* got \(3, 3\) of torch.bool",
        ),
        (lambda: serve.InOrder(0), ValueError, "size must be at least 1, got 0"),
        (lambda: serve.ByLength(2, tokens=0), ValueError, "tokens must be at least 1, got 0"),
        (lambda: serve.ByDepth(guessed, 2.0), TypeError, "size must be an integer, got 2.0"),
        (
            lambda: serve.ByLength(2, tokens=4)(sequences([3, 5])),
            ValueError,
            "at most tokens = 4 positions, got 5 in request 1. Raise tokens, or leave it out",
        ),
        (
            lambda: serve.ByDepth(lambda requests: torch.ones(2, 1), 2)(sequences([3, 5])),
            ValueError,
            r"one for each of 2 requests, got shape \(2, 1\)\. Let predict return",
        ),
        (lambda: serve.encode(Loop(never, 3), [], serve.InOrder(1)), ValueError, "Loop must be in evaluation mode"),
        (
            lambda: serve.encode(Loop(never, 3).eval(), sequences([1, 2]), lambda requests: [[0], [0]]),
            ValueError,
            r"put each of 2 requests into exactly one batch, got \[\[0\], \[0\]\] from <function .* Mend the policy",
        ),
        (
            lambda: serve.encode(Loop(never, 3).eval(), sequences([1]), lambda requests: [[0], []]),
            ValueError,
            "put each of 1 requests into exactly one batch",
        ),
        (
            lambda: serve.encode(
                Loop(block().double(), 2, readout=readout.Stacked()).eval(),
                sequences([5]),
                serve.InOrder(1),
                pooled=True,
            ),
            ValueError,
            r"a pooled value must lead with the 1 requests of its batch, got \(2, 1, 5, 6\)\. Take a readout",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


SMALL = {
    "nodes": (5, 9),
    "farthest": (1, 3),
    "count": 11,
    "size": 4,
    "seeds": (0, 1),
    "recorded": 13,
    "hops": 1,
    "bound": 6,
    "steps": 6,
    "repeats": 1,
}


def test_bench_batching_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    batching.run(tmp_path, **SMALL)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    lines = [line for line in result["lines"] if line["stream"] == "mixed lengths" and line["seed"] == 1]
    assert [line["way"] for line in lines[:3]] == ["one by one", "in order, fixed depth", "in order, masked"]
    assert lines[0]["executed"] == 1.0 and all(line["executed"] >= 1.0 and line["ratio"] > 0 for line in lines)
    assert lines[1]["executed"] >= lines[2]["executed"] and lines[2]["ratio"] == 1.0
    assert set(result["predictor"]) == {
        "held out",
        *(f"{s}, seed {i}" for s in ("one length", "mixed lengths") for i in (0, 1)),
    }
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "by predicted depth, selective" in page


def test_bench_batching_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    batching.run(tmp_path, **SMALL)
    monkeypatch.setattr(batching.distances, "looped_loss", never)
    batching.run(tmp_path, **SMALL)


def test_bench_batching_reports_nothing_if_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batching, "apart", lambda own, expected: 0.5)
    with pytest.raises(ValueError, match=r"within 0\.001, got 5\.0e-01 and 0 other numbers of steps one by one\. Not"):
        batching.run(tmp_path, **SMALL)
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(ValueError, match="bound must be at least 4, got 3. The deepest graph needs one loop more"):
        batching.run(tmp_path, **{**SMALL, "bound": 3})
    for name, value in {"repeats": 0, "seeds": (), "nodes": (), "count": 1, "hops": -1}.items():
        with pytest.raises(ValueError, match="must be at least"):
            batching.run(tmp_path, **{**SMALL, name: value})


def test_a_way_that_takes_other_steps_is_caught():
    answers = [serve.Encoded(torch.ones(2, 3), torch.tensor(4), torch.tensor(True)) for _ in range(3)]
    batching.same("by chance", answers, answers)
    other = [answers[0]._replace(steps=torch.tensor(5)), *answers[1:]]
    with pytest.raises(ValueError, match=r"got 0\.0e\+00 and 1 other numbers of steps by chance"):
        batching.same("by chance", other, answers)


def test_the_predictor_sees_who_is_reached():
    """A path of four nodes, padded by two: 2 nodes within one edge, 3 within two, 4 within three and four."""
    edges = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1
    source = torch.tensor([1, 0, 0, 0])
    alone = {"x": torch.tensor([1, 0, 0, 0, 0, 0]), "mask": torch.eye(6).bool()}
    seen = batching.Reached(4)(*serve.padded([{"x": source, "mask": edges}, alone]))
    expected = torch.tensor([[4, 2.5, 2, 3, 4, 4], [6, 1, 1, 1, 1, 1]]).log()
    testing.assert_close(seen, expected, "counted over real nodes")
    stream = batching.drawn(11, (5, 9), (1, 3), 0)
    assert sorted(len(request["x"]) for request in stream) == [5] * 5 + [9] * 6
