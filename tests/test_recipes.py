"""Recipes run end to end: small here, as they are meant in the slow tests."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware.recipes import distances
from loopaware.recipes.distances_report import DEEP, KL, LEARNED, STACK

TINY = {"steps": 12, "seeds": (0, 1), "sizes": (5, 9), "nodes": 6, "count": 7, "deep": 11, "layers": 2, "batch": 4}


def test_distances_end_to_end_and_again(tmp_path, capsys):
    distances.run(tmp_path, **TINY)
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in said and "learned halt" in said
    first = (tmp_path / "results.json").read_bytes()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") >= 4 and "http" not in page.replace("http-equiv", "")
    assert "The net of seed 1 stops it after" in page
    result = json.loads(first)["results"][0]
    assert set(result["sweeps"]) == {"5", "9"} and len(result["sweeps"]["9"]["by_loop"]) == 11
    assert len(result["sweeps"]["5"]["halted"]) == 7


def test_a_finished_run_is_read_and_not_trained_again(tmp_path, monkeypatch):
    distances.run(tmp_path, **TINY)
    first = (tmp_path / "results.json").read_bytes()

    def drawn(*_):
        raise AssertionError("a finished run draws no graph to train on")

    monkeypatch.setattr(distances.graphs, "sample", drawn_except_tests(distances.graphs.sample, drawn))
    distances.run(tmp_path, **TINY)
    assert (tmp_path / "results.json").read_bytes() == first


def test_nets_of_other_options_are_never_taken_for_these(tmp_path):
    distances.run(tmp_path, **TINY)
    with pytest.raises(ValueError, match=r"must hold a run with the settings \{'extra': 5\}, got \{'extra': 10\}"):
        distances.run(tmp_path, **{**TINY, "extra": 5})


def drawn_except_tests(sample, refuse):
    """Test sets name sizes of their own; training graphs have the plan's nodes."""
    return lambda count, nodes, *rest, **options: (
        refuse() if nodes == TINY["nodes"] else sample(count, nodes, *rest, **options)
    )


def test_the_halting_numbers_and_every_other_weight_are_taught(tmp_path):
    plan = distances.Plan(nodes=6, steps=2, batch=4, dim=32, heads=4, layers=2, rate=2e-3, deep=9)
    net = distances.Looped(32, 4, 9)
    batch = distances.drawn(plan)(0, torch.Generator().manual_seed(0))
    loss, metrics = distances.looped_loss(net, batch, 0)
    loss.backward()
    dead = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not dead and set(metrics) == {"accuracy", "stop", "steps"}


def test_the_loop_of_padded_graphs_is_that_of_each_graph_alone():
    """Graphs of mixed sizes in one batch: the same answers and the same stops as one by one."""
    torch.manual_seed(0)
    net = distances.Looped(32, 4, 30).eval()
    parts = [distances.graphs.held_out(3, size) for size in (5, 9)]
    both = distances.graphs.pack(parts)
    loop = net.loop.replace(halt=distances.halt.Residual(level=-6.0))
    with torch.no_grad():
        whole = loop(net.context(both), mask=both.mask)
        alone = [loop(net.context(part)) for part in parts]
    assert torch.equal(whole.steps, torch.cat([out.steps for out in alone])) and len(set(whole.steps.tolist())) > 1
    torch.testing.assert_close(whole.value[:3, :5], alone[0].value, rtol=1e-4, atol=1e-5)


def test_distances_refuse_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0. Name at least one seed"):
        distances.run(tmp_path, **{**TINY, "seeds": ()})
    with pytest.raises(ValueError, match="extra must be at least 3, got 2. Without further loops nothing teaches"):
        distances.run(tmp_path, **{**TINY, "extra": 2})
    with pytest.raises(ValueError, match="dim must be a positive multiple of heads, got 32 and 5"):
        distances.run(tmp_path, **{**TINY, "heads": 5})


@pytest.mark.slow
def test_distances_show_what_they_promise(tmp_path):
    """The claims of the recipe, with its own settings: three seeds, 64 nodes."""
    distances.run(tmp_path)
    for result in json.loads((tmp_path / "results.json").read_text())["results"]:
        sweep = result["sweeps"]["64"]
        accuracy = sweep["accuracy"]
        assert accuracy[LEARNED] >= 0.95 and accuracy[KL] >= 0.95
        assert sweep["correlation"] >= 0.95
        assert accuracy[DEEP] <= accuracy[LEARNED] - 0.3 and accuracy[STACK] <= accuracy[LEARNED] - 0.3
