"""Pointer chasing: labels are those of a plain walk, problems are as they were asked for, and the recipe runs."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware.recipes import chase
from loopaware.recipes.chase_report import KL, LEARNED
from loopaware.tasks import pointers

TINY = {"steps": 12, "seeds": (0, 1), "tests": (1, 3), "count": 7, "deep": 9, "layers": 2, "batch": 4, "hops": 3}


@pytest.mark.parametrize(("hops", "spare"), [(0, 4), (1, 0), (3, 4), (16, 7)])
def test_labels_are_those_of_a_plain_walk(hops, spare):
    batch = pointers.sample(31, hops, generator=torch.Generator().manual_seed(0), spare=spare)
    nodes = 4 * (hops + 1) + (spare if hops else 0)
    assert all(field.shape == (31, nodes) for field in (batch.pointer, batch.colour, batch.depth, batch.label))
    for one in range(31):
        pointer, colour = batch.pointer[one].tolist(), batch.colour[one].tolist()
        roots = [node for node in range(nodes) if pointer[node] == node]
        assert sorted(colour[root] for root in roots) == [0, 1, 2, 3], "four roots of four colours"
        assert all((c == pointers.NONE) == (node not in roots) for node, c in enumerate(colour))
        for node in range(nodes):
            at, walked = node, 0
            while pointer[at] != at:
                at, walked = pointer[at], walked + 1
            assert (batch.depth[one, node], batch.label[one, node]) == (walked, colour[at])
        assert batch.depth[one, batch.start[one]] == hops
        deepest = {int(batch.label[one, node]) for node in range(nodes) if batch.depth[one, node] == hops}
        assert deepest == {0, 1, 2, 3}, "every tree is as deep as the start's"
        assert batch.depth[one].max() == hops


def test_neither_places_nor_colours_tell_the_answer():
    batch = pointers.sample(4000, 3, generator=torch.Generator().manual_seed(0))
    answers = batch.label.gather(1, batch.start[:, None])[:, 0]
    assert torch.bincount(answers, minlength=4).float().std() < 60
    assert torch.bincount(batch.start, minlength=20).float().std() < 40
    share = (batch.label == answers[:, None]).float().mean()
    assert 0.24 < share < 0.26, "the start's tree is no larger than the others"


def test_problems_depend_on_the_generator_alone():
    first, again = (pointers.sample(5, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(pointers.held_out(3, 4).pointer, pointers.held_out(3, 4).pointer)
    assert not torch.equal(pointers.held_out(3, 4).pointer, pointers.held_out(3, 4, seed=1).pointer)


def test_only_the_start_counts():
    batch = pointers.held_out(5, 2)
    logits = torch.nn.functional.one_hot(batch.label, pointers.ROOTS).float()
    other = (batch.start[0] + 1) % logits.shape[1]
    logits[0, other] = -logits[0, other]
    assert pointers.right(logits, batch).tolist() == [True] * 5
    logits[1, batch.start[1]] = -logits[1, batch.start[1]]
    assert pointers.right(torch.stack([logits, logits]), batch).tolist() == [[True, False, True, True, True]] * 2


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 2), {}, "count must be at least 1, got 0"),
        ((1, -1), {}, "hops must be at least 0, got -1"),
        ((1, 2), {"spare": -1}, "spare must be at least 0, got -1"),
    ],
)
def test_problems_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        pointers.sample(*arguments, generator=torch.Generator(), **options)


def test_chase_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    chase.run(tmp_path, **TINY)
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in said and LEARNED in said and "loops at the halt" in said
    first = (tmp_path / "results.json").read_bytes()
    result = json.loads(first)["results"][0]
    assert set(result["sweeps"]) == {"1", "3"} and len(result["sweeps"]["3"]["by_loop"]) == 9
    assert result["sweeps"]["3"]["flops"][LEARNED] <= result["sweeps"]["3"]["flops"]["fixed, large depth"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") == 4
    monkeypatch.setattr(chase.train.fit.__globals__["Keeper"], "take", None)
    chase.run(tmp_path, **TINY)
    assert (tmp_path / "results.json").read_bytes() == first, "finished nets are read and not trained again"
    with pytest.raises(ValueError, match=r"must hold a run with the settings \{'extra': 5\}, got \{'extra': 11\}"):
        chase.run(tmp_path, **TINY, extra=5)


def test_every_weight_of_the_net_is_taught():
    torch.manual_seed(0)
    plan = chase.Plan(3, 100, 4, 32, 4, 8, 2, 2e-3, 12, 5)
    net = chase.rule_of_two_numbers(plan)()
    chase.taught(net, chase.drawn(plan)(60, torch.Generator().manual_seed(0)), 0)[0].backward()
    dead = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not dead


def test_chase_refuses_what_cannot_be(tmp_path):
    for options, message in [
        ({"seeds": ()}, "seeds must be at least 1, got 0"),
        ({"hops": 1}, "hops must be at least 2, got 1. Train on two hops at least"),
        ({"extra": 2}, "extra must be at least 3, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            chase.run(tmp_path, **{**TINY, **options})


@pytest.mark.slow
def test_chase_shows_what_it_promises(tmp_path):
    """Two of the three seeds of the recipe, at its own settings."""
    chase.run(tmp_path, seeds=(0, 1), tests=(6, 12))
    for result in json.loads((tmp_path / "results.json").read_text())["results"]:
        for rule in (LEARNED, KL):
            assert result["sweeps"]["6"]["accuracy"][rule] >= 0.95
        assert result["sweeps"]["12"]["accuracy"][LEARNED] >= 0.80
