"""Prefix sums and parities: labels are those of plain Python, and the recipe of prefix sums runs."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware.recipes import prefix_sums
from loopaware.recipes.prefix_sums_report import CHANGE, DOUBLE, FORGETFUL, KL, LEARNED
from loopaware.tasks import bits

TINY = {"steps": 12, "seeds": (0, 1), "tests": (4, 9), "count": 7, "batch": 4, "length": 6, "dim": 8}


def test_prefix_sums_are_those_of_plain_python():
    strings = bits.prefix_sums(31, 63, generator=torch.Generator().manual_seed(0))
    for row, labels in zip(strings.bits.tolist(), strings.labels.tolist(), strict=True):
        assert labels == [sum(row[: place + 1]) % 2 for place in range(63)]
    assert 0.45 < strings.bits.float().mean() < 0.55


def test_parities_are_those_of_plain_python():
    vectors = bits.parity(500, 9, (2, 7), generator=torch.Generator().manual_seed(0))
    for x, label, many in zip(vectors.x.tolist(), vectors.label.tolist(), vectors.nonzeros.tolist(), strict=True):
        assert label == x.count(1.0) % 2 and all(x[:many]) and not any(x[many:])
    counts = torch.bincount(vectors.nonzeros, minlength=10)
    assert counts[2:8].min() > 50 and counts[:2].sum() == counts[8:].sum() == 0


def test_held_out_strings_are_always_the_same():
    assert torch.equal(bits.held_out(3, 9).bits, bits.held_out(3, 9).bits)
    assert not torch.equal(bits.held_out(3, 9).bits, bits.held_out(3, 9, seed=1).bits)


def test_a_string_is_right_if_every_bit_is():
    strings = bits.held_out(2, 5)
    logits = torch.nn.functional.one_hot(strings.labels, 2).float()
    logits[1, 3] = -logits[1, 3]
    assert bits.right(torch.stack([logits, logits]), strings).tolist() == [[True, False]] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: bits.prefix_sums(0, 4, generator=g), "count must be at least 1, got 0"),
        (lambda g: bits.prefix_sums(1, 0, generator=g), "length must be at least 1, got 0"),
        (
            lambda g: bits.parity(1, 4, (2, 5), generator=g),
            "nonzeros must be a range within 1 and the width 4, got 2 to 5",
        ),
        (lambda g: bits.parity(1, 4, (3, 2), generator=g), "got 3 to 2"),
    ],
)
def test_bits_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.Generator())


def test_prefix_sums_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    prefix_sums.run(tmp_path, **TINY)
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in said and "loops of the KL stop" in said
    first = (tmp_path / "results.json").read_bytes()
    kept = json.loads(first)
    sweep = kept["results"][1]["sweeps"]["9"]
    assert set(kept[FORGETFUL]) == {"4", "9"} and len(sweep["by_loop"]) == 18
    assert set(sweep["steps"]) == {KL, CHANGE, LEARNED} and sweep["flops"][KL] <= sweep["flops"][DOUBLE]
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    monkeypatch.setattr(prefix_sums.train.fit.__globals__["Keeper"], "take", None)
    prefix_sums.run(tmp_path, **TINY)
    assert (tmp_path / "results.json").read_bytes() == first, "finished nets are read and not trained again"
    with pytest.raises(ValueError, match=r"must hold a run with the settings \{'progressive': 0.0\}"):
        prefix_sums.run(tmp_path, **TINY, progressive=0.0)


def test_every_weight_of_the_net_is_taught_and_the_past_is_not():
    torch.manual_seed(0)
    net, strings = prefix_sums.Thinker(8), bits.held_out(3, 6)
    x = net.embedding(strings.bits)
    loss = prefix_sums.resumed(net, x, strings.labels, before=3, span=2)
    carry = net.loop(x.detach(), max_steps=3).carry
    value = net.loop(x, carry=carry._replace(state=carry.state.detach()), max_steps=5).value
    again = torch.nn.functional.cross_entropy(net.head(value).flatten(0, 1), strings.labels.flatten())
    weights = [*net.loop.body.parameters(), *net.head.parameters()]
    for one, other in zip(
        *(torch.autograd.grad(part, weights, retain_graph=True) for part in (loss, again)), strict=True
    ):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0
    plan = prefix_sums.Plan(6, 100, 4, 8, 2e-3, 5, 0.5)
    prefix_sums.loss_of(plan)(net, prefix_sums.drawn(plan)(50, torch.Generator().manual_seed(0)), 0)[0].backward()
    assert not [name for name, weight in net.named_parameters() if not weight.grad.abs().sum() > 0]


def test_prefix_sums_refuse_what_cannot_be(tmp_path):
    for options, message in [
        ({"seeds": ()}, "seeds must be at least 1, got 0"),
        ({"length": 3}, "length must be at least 4, got 3"),
        ({"extra": 2}, "extra must be at least 3, got 2"),
        ({"progressive": -1.0}, "progressive must be above 0.0 and at most 10.0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefix_sums.run(tmp_path, **{**TINY, **options})


@pytest.mark.slow
def test_prefix_sums_show_what_they_promise(tmp_path):
    """Two of the three seeds of the recipe, at its own settings: whole strings of 64 bits, stopped by a fixed rule."""
    prefix_sums.run(tmp_path, seeds=(0, 1), tests=(64,))
    for result in json.loads((tmp_path / "results.json").read_text())["results"]:
        assert result["sweeps"]["64"]["accuracy"][KL] >= 0.95
