"""Deep equilibrium transformers, and the recipes that compare gradients of places of rest."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware import Loop, grad, halt, models, testing, train
from loopaware.recipes import fixed_point, gradients, quantized


def made(**options) -> models.EquilibriumTransformer:
    torch.manual_seed(0)
    return models.EquilibriumTransformer(8, 2, 300, tolerance=1e-9, **options).double()


def taught(model: models.EquilibriumTransformer, x: torch.Tensor, **options) -> torch.Tensor:
    value = model(x, **options).value
    direction = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.cat([g.flatten() for g in torch.autograd.grad((value * direction).sum(), list(model.parameters()))])


def test_it_is_at_rest_and_has_the_gradient_of_long_backpropagation():
    model, x = made(), torch.randn(3, 5, 8, dtype=torch.float64)
    out = model(x)
    assert out.halted.all() and (out.steps < 100).all()
    with torch.no_grad():
        again = model.loop.body(out.value, model.inject(x), 0)
    torch.testing.assert_close(again, out.value, rtol=1e-7, atol=1e-8)
    implicit = taught(model, x)
    model.loop = model.loop.replace(grad=grad.Full(), halt=halt.Never())
    full = taught(model, x)
    assert (implicit - full).norm() < 1e-6 * full.norm()


def test_batch_padding_and_saving():
    model = made().eval()
    x, lengths = torch.randn(3, 5, 8, dtype=torch.float64), (5, 3, 1)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    out = model(x.masked_fill(~mask[..., None], 7.0), mask)
    for row, length in enumerate(lengths):
        alone = model(x[row : row + 1, :length])
        torch.testing.assert_close(alone.value[0], out.value[row, :length], rtol=1e-6, atol=1e-7)
    other = made()
    torch.nn.init.zeros_(other.inject.weight)
    other.load_state_dict(model.state_dict())
    testing.assert_close(other.eval()(x).value, model(x).value, "saved and loaded")


def test_dropout_holds_still_so_that_there_is_a_rest():
    model, x = made(dropout=0.1).train(), torch.randn(2, 5, 8, dtype=torch.float64)
    first, second = model(x), model(x)
    assert first.halted.all() and second.halted.all()
    assert (first.value - second.value).abs().max() > 1e-3, "a run draws its own mask"
    plain = made(dropout=0.1).eval()
    assert torch.equal(plain(x).value, plain(x).value)


def test_it_learns_and_stays_where_it_contracts():
    """A few steps with the Jacobian penalty: the loss falls, and every sequence still comes to rest."""
    torch.manual_seed(0)
    model = models.EquilibriumTransformer(8, 2, 80)
    head = torch.nn.Linear(8, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        x = torch.randn(16, 5, 8)
        out = model(x)
        answer = torch.nn.functional.cross_entropy(
            head(out.value).flatten(0, 1), (x.cumsum(1)[..., 0] > 0).long().flatten()
        )
        penalty = train.stability.jacobian(model.loop, out.carry, {"x": model.inject(x), "mask": None}).mean()
        optimizer.zero_grad()
        (answer + 0.1 * penalty).backward()
        optimizer.step()
        losses.append(answer.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]) and out.halted.all()


def test_fixed_point_end_to_end(tmp_path, capsys):
    fixed_point.run(tmp_path, rates=(0.5, 0.9), lengths=(4, 8), seeds=(0,), steps=400, dim=6, batch=3, repeats=1)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    by_rule = {line["rule"]: line for line in found["results"] if line["rate"] == 0.9}
    for name in ("Implicit, Picard", "Implicit, Anderson", "Implicit, Broyden", "Implicit, Anderson twice"):
        assert by_rule[name]["error"] < 1e-6 and by_rule[name]["against_long"] < 1e-6, name
        assert len(set(found["bytes"][name])) == 1, "memory is flat"
    assert by_rule["long backpropagation"]["error"] < 1e-10 and by_rule["OneStep"]["error"] > 0.1
    assert by_rule["Implicit, Anderson twice"]["steps"] < 100
    assert (tmp_path / "report.html").read_text().count("<svg") == 2
    with pytest.raises(ValueError, match="rates must be above 0.0 and at most 0.999999, got 1.0. A loop whose steps"):
        fixed_point.run(tmp_path, rates=(1.0,))


TINY = {"lengths": (2, 3), "dim": 8, "heads": 2, "tokens": 3, "batch": 2, "repeats": 1}


def test_bench_gradients_end_to_end(tmp_path, capsys):
    gradients.run(tmp_path, **TINY)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert {line["rule"] for line in lines} >= {"Full", "Implicit", "Reversible", "Phantom(5, .5)", "Truncated(8)"}
    assert (tmp_path / "figures" / "figure1.svg").exists()


def test_bench_gradients_reports_nothing_if_a_rule_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(grad.Reversible, "__call__", lambda self, run, carry, steps: grad.OneStep()(run, carry, steps))
    with pytest.raises(ValueError, match=r"must be within 0.001 of full backpropagation, got \['coupled, Reversible"):
        gradients.run(tmp_path, **TINY)
    assert not (tmp_path / "report.html").exists()


def test_bench_quantized_end_to_end(tmp_path, capsys):
    quantized.run(tmp_path, lengths=(1, 3), seeds=(0,), dim=8, heads=2, tokens=3, batch=2)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    for loop in ("at rest", "growing"):
        errors = {line["kind"]: line["errors"][0] for line in lines if line["loop"] == loop}
        assert 0 < errors["float16"] < errors["bfloat16"] < errors["8 bits"] < errors["6 bits"] < errors["4 bits"] < 0.3


@pytest.mark.slow
def test_fixed_point_shows_what_it_promises(tmp_path):
    fixed_point.run(tmp_path, repeats=1)
    found = json.loads((tmp_path / "results.json").read_text())
    implicit = [line for line in found["results"] if line["rule"].startswith("Implicit")]
    assert len(implicit) == 4 * 4 * 3 and all(line["against_long"] < 1e-6 for line in implicit)
    assert all(len(set(found["bytes"][line["rule"]])) == 1 for line in implicit)


def test_a_loop_is_what_is_trained_otherwise():
    """The same weights through every step, or through one."""
    model = made()
    assert isinstance(model.loop, Loop) and isinstance(model.loop.grad, grad.Implicit)
    assert models.EquilibriumTransformer(8, 2, 9, grad=grad.OneStep()).loop.grad == grad.OneStep()
