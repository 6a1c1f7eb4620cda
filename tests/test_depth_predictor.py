"""A guess of depth learns what can be learned, says how good it is, and is the same with the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draw
from torch import Tensor

from loopaware import Loop, halt, observe, serve, testing, train
from loopaware.serve import depth
from parts import DIM, mixing


def sequences(lengths: list[int]) -> list[Tensor]:
    return [torch.randn(size, DIM).double() for size in lengths]


def problems(count: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Requests that take as many steps as their first feature says, more if they are long."""
    generator = torch.Generator().manual_seed(seed)
    requests = [
        torch.randn(int(size), 3, generator=generator) for size in torch.randint(1, 9, (count,), generator=generator)
    ]
    steps = [1 + round(3 * abs(float(x[:, 0].mean())) + len(x) / 2) for x in requests]
    return requests, torch.tensor(steps)


def test_it_learns_what_can_be_learned():
    predictor = serve.DepthPredictor(7)
    quality = predictor.fit(*problems(400))
    assert quality.rank > 0.85 and quality.explained > 0.7 and quality.number == 80
    other = predictor.quality(*problems(200, seed=1))
    assert other.rank > 0.85 and other.number == 200
    requests, steps = problems(200, seed=2)
    shuffled = steps[torch.randperm(200)]
    assert abs(serve.DepthPredictor(7).fit(requests, shuffled).rank) < 0.5


def test_it_is_the_same_with_the_same_seed_and_draws_nothing_else(tmp_path: Path):
    requests, steps = problems(60)
    before = torch.get_rng_state()
    one, other, third = (serve.DepthPredictor(7, seed=seed) for seed in (3, 3, 4))
    torch.set_rng_state(before)
    qualities = [predictor.fit(requests, steps) for predictor in (one, other, third)]
    assert torch.equal(torch.get_rng_state(), before)
    assert qualities[0] == qualities[1] != qualities[2] and torch.equal(one(requests), other(requests))
    assert one.fit(requests, steps.tolist()) == qualities[0]  # begins anew
    train.save_model(one, tmp_path / "depth.safetensors")
    fresh = serve.DepthPredictor(7)
    train.load_model(fresh, tmp_path / "depth.safetensors")
    assert torch.equal(fresh(requests), one(requests)) and fresh([]).shape == (0,)


def test_features_may_be_of_any_size_and_place():
    requests, steps = problems(400)
    far = [1e4 + 100 * request.double() for request in requests]
    assert serve.DepthPredictor(7).fit(far, steps).rank > 0.85


def test_a_feature_that_never_varies_does_no_harm():
    requests = [torch.ones(3, 1) for _ in range(10)]
    predictor = serve.DepthPredictor(3)
    predictor.fit(requests, torch.full((10,), 5))
    testing.assert_close(predictor(requests), torch.full((10,), 5.0), "the mean is what is left")


def test_pooled_features_are_those_of_real_positions():
    requests = [torch.randn(size, 2) for size in (1, 3, 63)]
    got = serve.pooled(*serve.padded(requests))
    for row, x in zip(got, requests, strict=True):
        expected = torch.cat([x.mean(0), x.amax(0), torch.tensor([float(len(x))]).log()])
        testing.assert_close(row, expected, "padding is not pooled")


@settings(max_examples=60, deadline=None)
@given(values=draw.lists(draw.integers(0, 5), min_size=1, max_size=20))
def test_ranks_share_the_mean(values: list[int]):
    """Against a naive twin: the mean of the places that equal values would have in a sorted list."""
    ordered = sorted(values)
    places = {value: [i + 1 for i, other in enumerate(ordered) if other == value] for value in values}
    expected = [sum(places[value]) / len(places[value]) for value in values]
    assert depth.ranks(torch.tensor(values)).tolist() == expected


def test_depth_of_a_real_loop_is_guessed_from_recorded_runs():
    """Recorded by `encode`, or by `observe.record`: the same pairs."""
    loop = Loop(mixing(), 20, halt=halt.Converged(rtol=0.02)).eval().double()
    requests = [request * scale for scale in (0.3, 1.0, 5.0) for request in sequences([4, 4, 4, 7, 7])]
    answers = serve.encode(loop, requests, serve.ByLength(4))
    with observe.record(loop) as tape:
        loop({"x": requests[0][None]})
    assert tape.only.steps[0] == answers[0].steps
    predictor = serve.DepthPredictor(2 * DIM + 1)
    predictor.fit(requests, torch.stack([answer.steps for answer in answers]))
    assert predictor(requests).shape == (15,) and predictor(requests).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: serve.DepthPredictor(0), ValueError, "dim must be at least 1, got 0"),
        (lambda: serve.DepthPredictor(3, hidden=0), ValueError, "hidden must be at least 1, got 0"),
        (lambda: serve.DepthPredictor(3)(sequences([2])), ValueError, r"\(N, dim\) = \(1, 3\), got \(1, 13\)\. Give"),
        (lambda: serve.DepthPredictor(3)([torch.ones(2).long()]), TypeError, r"got torch.int64 of \(1, 2\)\. Give"),
        (
            lambda: serve.DepthPredictor(3).fit(sequences([1, 2, 3]), [1, 1, 1]),
            ValueError,
            r"one number of at least 1 for each of four requests or more, got \(3,\) for 3 requests\. Record",
        ),
        (lambda: serve.DepthPredictor(3).fit(sequences([1] * 5), [1] * 4), ValueError, r"got \(4,\) for 5 requests"),
        (lambda: serve.DepthPredictor(3).fit(sequences([1] * 5), [0] * 5), ValueError, "of at least 1 for each"),
        (
            lambda: serve.DepthPredictor(3).fit(sequences([1] * 5), [1] * 5, held_out=0.9),
            ValueError,
            "held_out must be above 0.0 and at most 0.5, got 0.9",
        ),
        (
            lambda: serve.DepthPredictor(13).fit(sequences([1] * 5), [1] * 5, updates=0),
            ValueError,
            "updates must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
