"""The recipes that compare halting rules, small, and what they must show whatever their size."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware.recipes import chase, copy_reverse, estimators, halting_rules, parity
from loopaware.tasks import bits, strings


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


def test_parity_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    tiny = {"width": 5, "nonzeros": 3, "steps": 6, "batch": 4, "dim": 8, "max_steps": 4, "count": 9, "seeds": (0, 1)}
    parity.run(tmp_path, **tiny)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    first = (tmp_path / "results.json").read_bytes()
    results = json.loads(first)["results"]
    assert set(results) == {"0", "1"} and set(results["0"]) == {"Repeat-RNN", "ACT", "PonderNet", "PonderNet, drawn"}
    assert all(abs(sum(s["weights"]) - 1) < 1e-5 for by in results["0"].values() for s in by.values())
    assert results["1"]["Repeat-RNN"]["5"]["steps"] == 4 + 2, "six repetitions, whatever the bound of the others"
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    monkeypatch.setattr(parity.train.fit.__globals__["Keeper"], "take", None)
    parity.run(tmp_path, **tiny)
    assert (tmp_path / "results.json").read_bytes() == first
    with pytest.raises(ValueError, match="nonzeros must be from 2 to the width 5, got 6. Take a wider vector"):
        parity.run(tmp_path, width=5, nonzeros=6)


def test_every_parity_loss_teaches_every_weight():
    plan = parity.Plan(5, 3, 10, 8, 8, 1e-3, 3, 4, 0.1, 0.3, 0.1)
    batch = bits.parity(8, 5, (1, 3), generator=torch.Generator().manual_seed(0))
    losses = {"Repeat-RNN": parity.answer_loss(plan, 0.0), "ACT": parity.answer_loss(plan, 0.1)}
    for name, loss in {**losses, "PonderNet": parity.ponder_loss(plan)}.items():
        torch.manual_seed(0)
        net = parity.made(plan, name)
        loss(net, batch, 8)[0].backward()
        dead = [n for n, w in net.named_parameters() if w.grad is None or not w.grad.abs().sum() > 0]
        assert not dead, name


SMALL = {
    "longest": 3,
    "tests": (3, 5),
    "steps": 4,
    "batch": 4,
    "dim": 8,
    "heads": 2,
    "loops": 2,
    "shift": 4,
    "count": 5,
}


def test_copy_reverse_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    copy_reverse.run(tmp_path, **SMALL, seeds=(0,))
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    first = (tmp_path / "results.json").read_bytes()
    found = json.loads(first)
    assert set(found["results"]["0"]) == set(copy_reverse.NETS) == set(found["parameters"])
    shared, unshared = found["parameters"][copy_reverse.FIXED], found["parameters"][copy_reverse.PLAIN]
    assert unshared > 1.5 * shared
    scores = found["results"]["0"]
    assert scores[copy_reverse.FIXED]["5"]["loops"] == scores[copy_reverse.PLAIN]["5"]["loops"] == 2
    assert scores[copy_reverse.FIXED]["5"]["flops"] == scores[copy_reverse.PLAIN]["5"]["flops"]
    monkeypatch.setattr(copy_reverse.train.fit.__globals__["Keeper"], "take", None)
    copy_reverse.run(tmp_path, **SMALL, seeds=(0,))
    assert (tmp_path / "results.json").read_bytes() == first


def test_generated_strings_are_those_of_one_pass():
    """The answer that is generated is the one that a pass over it predicts, each row as its task asks."""
    torch.manual_seed(0)
    plan = copy_reverse.Plan(3, 4, 4, 8, 2, 2, 1e-3, 4, 1e-3)
    net, batch = (
        copy_reverse.made(plan, copy_reverse.ACT).eval(),
        strings.sample(9, (1, 5), generator=torch.Generator().manual_seed(1)),
    )
    said = copy_reverse.answers(net, batch)
    given = torch.cat([batch.task[:, None], said[:, :-1]], 1)
    with torch.no_grad():
        again = net(batch.source, given, batch.mask).value.argmax(-1)
    ended = (said == strings.END).cumsum(-1) - (said == strings.END).long() > 0
    assert torch.equal(again[~ended], said[~ended]) and bool((said[ended] == strings.END).all())


def test_strings_are_copied_and_reversed():
    batch = strings.sample(200, (1, 9), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(batch.length.tolist()):
        source = batch.source[row, :length].tolist()
        expected = source if batch.task[row] == strings.COPY else source[::-1]
        assert batch.target[row].tolist() == [*expected, *[strings.END] * (10 - length)]
        assert batch.mask[row].tolist() == [place <= length for place in range(10)]
        assert batch.given[row].tolist() == [batch.task[row].item(), *batch.target[row, :-1].tolist()]
    assert 60 < (batch.task == strings.COPY).sum() < 140
    said = batch.target.clone()
    said[0, batch.length[0]] = 3
    assert not strings.right(said, batch)[0].all() and strings.right(said, batch)[1:].all()
    with pytest.raises(ValueError, match="lengths must be a range from 1 on, got 3 to 2"):
        strings.sample(1, (3, 2), generator=torch.Generator())
