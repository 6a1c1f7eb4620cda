"""The recipes that compare halting rules, small, and what they must show whatever their size."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware.recipes import chase, estimators, halting_rules


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_estimators_end_to_end(tmp_path, capsys):
    estimators.run(tmp_path, steps=4, draws=4000, seeds=(0, 1))
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    for found in json.loads((tmp_path / "results.json").read_text()).values():
        by_name = {estimate["name"]: estimate for estimate in found}
        assert set(by_name) == set(estimators.ESTIMATORS)
        for name in ("REINFORCE, 2 runs", "REINFORCE, 8 runs"):
            assert by_name[name]["bias"] < 4 * by_name[name]["noise"], "without bias"
        assert by_name["REINFORCE, 8 runs"]["spread"] < by_name["REINFORCE, 2 runs"]["spread"]
        temperatures = [by_name[f"Gumbel, temperature {t}"] for t in ("0.3", "1", "3")]
        assert [t["spread"] for t in temperatures] == sorted((t["spread"] for t in temperatures), reverse=True)
        assert by_name["Gumbel, temperature 3"]["bias"] > 10 * by_name["Gumbel, temperature 3"]["noise"]
        assert by_name["straight-through, not drawn"]["spread"] < 1e-6, "nothing is drawn"
        assert by_name["straight-through"]["steps"] == 4 and by_name["REINFORCE, 2 runs"]["steps"] < 8
    assert (tmp_path / "report.html").read_text().count("<svg") == 1


def test_the_exact_gradient_is_that_of_all_stops():
    """Against finite differences of the expected cost, by plain products."""
    torch.manual_seed(0)
    loop = chase.Loop(
        estimators.Known(), 3, init=estimators.init.Projected(4, 4), halt=estimators.halt.Linear(4)
    ).double()
    x, offset = torch.randn(1, 4).double(), torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)

    def cost(states, taken):
        return states[..., 0].square() + 0.1 * taken

    exact = estimators.gradient_of_expectation(loop, {"x": x, "offset": offset}, cost)[0]

    def expected(shift):
        with torch.no_grad():
            path, left, total = loop.start({"x": x, "offset": shift}), 1.0, 0.0
            for step in range(3):
                state = loop.body(path.state, {"x": x, "offset": shift}, step)
                h = 1.0 if step == 2 else torch.sigmoid(loop.halt.head(state)).item()
                total += left * h * cost(state, step + 1).item()
                left *= 1 - h
                path = path._replace(state=state)
        return total

    for step in range(3):
        shift = torch.zeros(1, 3, dtype=torch.float64)
        shift[0, step] = 1e-6
        assert (expected(shift) - expected(-shift)) / 2e-6 == pytest.approx(exact[step].item(), rel=1e-4, abs=1e-8)


def test_estimators_refuse_what_cannot_be(tmp_path):
    for options, message in [
        ({"draws": 1}, "draws must be at least 2, got 1"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"seeds": ()}, "seeds must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimators.run(tmp_path, **options)


TINY = {"steps": 6, "seeds": (0,), "tests": (1, 2), "count": 5, "hops": 2}


def test_halting_rules_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    halting_rules.run(tmp_path, **TINY)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    first = (tmp_path / "results.json").read_bytes()
    results = json.loads(first)["results"]
    assert len(results) == 10 + 5 and all(set(result["scores"]) == {"1", "2"} for result in results)
    assert (tmp_path / "report.html").read_text().count("<svg") == 2
    monkeypatch.setattr(chase.train.fit.__globals__["Keeper"], "take", None)
    halting_rules.run(tmp_path, **{**TINY, "only": ("ACT", "no rule")})
    again = json.loads((tmp_path / "results.json").read_text())["results"]
    assert again == [result for result in results if result["rule"] == "ACT" or result["rule"].startswith("no rule")]
    with pytest.raises(ValueError, match=r"must hold a run with the settings \{'price': 0.5\}"):
        halting_rules.run(tmp_path, **TINY, price=0.5)
    with pytest.raises(ValueError, match="only must name ways to halt, got 'magic'. Known are taught Residual"):
        halting_rules.run(tmp_path, only=("magic",))


def test_every_way_to_halt_is_taught():
    """Each loss reaches every weight of its net, the rule's included."""
    plan = chase.Plan(3, 100, 6, 64, 4, 8, 0, 2e-3, 12, 5)
    for name, way in halting_rules.ways(plan, price=0.1, prior=0.2, beta=0.1, bias=-1.0).items():
        torch.manual_seed(0)
        net = halting_rules.made(plan, way)
        loss, metrics = way.loss(net, chase.drawn(plan)(60, torch.Generator().manual_seed(0)), 60)
        loss.backward()
        dead = [n for n, w in net.named_parameters() if w.grad is None or not w.grad.abs().sum() > 0]
        assert not dead and loss.isfinite() and "accuracy" in metrics, name
