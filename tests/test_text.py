"""Bytes of text: what is held out was not learned, and the recipe of looped and plain language models runs."""

from __future__ import annotations

import json

import pytest
import torch

from loopaware.recipes import text as recipe
from loopaware.recipes.text_report import FEW, KL, LOOPED, MANY, NARROW, UNIFORM, Net, Point, Result, between, verdict
from loopaware.tasks import text

TINY = {"steps": 12, "seeds": (0, 1), "batch": 2, "length": 17, "deepest": 5, "low": 2, "high": 4}
SMALL = {"dim": 8, "heads": 2, "count": 3, "exits": 2}


def test_no_paragraph_that_was_learned_is_held_out():
    source = text.topics()
    learned, held_out = (bytes(part.tolist()).decode(errors="replace").split("\n\n") for part in source)
    same = {" ".join(each.split()) for each in learned} & {" ".join(each.split()) for each in held_out}
    assert len(held_out) > 100 and not same
    assert len(source.held_out) == round(0.1 * (len(source.learned) + len(source.held_out)))


def test_the_text_says_what_it_is():
    about = text.topics(0.25).about
    assert about == text.topics(0.25).about and len(about["sha256"]) == 64
    assert about["sha256"] == text.topics(0.5).about["sha256"] and about["learned"] > 2 * about["held_out"] > 100_000


def test_pieces_stand_in_the_text():
    source = text.topics()
    whole = bytes(source.learned.tolist())
    drawn = text.drawn(source, 31, 63, generator=torch.Generator().manual_seed(0))
    assert all(bytes(row.tolist()) in whole for row in drawn) and len({*map(tuple, drawn.tolist())}) > 25
    pieces = text.pieces(source, 63)
    assert bytes(pieces.flatten().tolist()) == bytes(source.held_out.tolist())[: pieces.numel()]
    assert 0 <= len(source.held_out) - pieces.numel() < 63


def test_the_last_place_can_be_drawn():
    source = text.Text(torch.arange(5, dtype=torch.uint8), torch.arange(3, dtype=torch.uint8))
    drawn = text.drawn(source, 63, 3, generator=torch.Generator().manual_seed(0))
    assert {row[0] for row in drawn.tolist()} == {0, 1, 2} and text.pieces(source, 3).tolist() == [[0, 1, 2]]


def test_text_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="share must be above 0.0 and at most"):
        text.topics(1.0)
    source, generator = text.topics(), torch.Generator()
    with pytest.raises(ValueError, match="count must be at least 1, got 0. Draw at least one piece"):
        text.drawn(source, 0, 8, generator=generator)
    with pytest.raises(ValueError, match="length must be at least 2, got 1. The first byte predicts the second"):
        text.pieces(source, 1)
    with pytest.raises(ValueError, match=r"length must be at most the \d+ bytes of the text, got 1000000"):
        text.drawn(source, 1, 1_000_000, generator=generator)


def test_text_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    recipe.run(tmp_path, **TINY, **SMALL)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    first = json.loads((tmp_path / "results.json").read_text())
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 2 and first["plan"]["sha256"] in page
    result = first["results"][1]
    assert list(result["sweep"]) == ["1", "2", "3", "4", "5"] and result["nets"][LOOPED]["bits"] == result["sweep"]["3"]
    assert all(1 <= point["loops"] <= 4 for points in result["exits"].values() for point in points)

    def refused(*_, **__):
        raise AssertionError("a finished run is not trained again")

    monkeypatch.setattr(recipe, "told", refused)
    monkeypatch.setattr(recipe, "timed", lambda *_: (0.0, 0.0))
    recipe.run(tmp_path, **TINY, **SMALL)
    again = json.loads((tmp_path / "results.json").read_text())["results"][1]
    assert again["sweep"] == result["sweep"] and again["exits"] == result["exits"]


def plan(**options) -> recipe.Plan:
    looped = {"dim": 8, "heads": 2, "prelude": 1, "core": 1, "coda": 1, "low": 2, "high": 4, "alone": 0.0}
    plain = {"injection": "none", "few": 3, "many": 5, "narrow": 4, "deep": 7}
    told = {"steps": 40, "batch": 3, "length": 9, "rate": 1e-3}
    return recipe.Plan(**{**looped, **plain, **told, **options})


def test_baselines_are_equal_in_what_they_are_named_for():
    nets = {name: recipe.made(plan(), name).eval() for name in (LOOPED, FEW, MANY)}
    sizes = {name: sum(weight.numel() for weight in net.parameters()) for name, net in nets.items()}
    assert sizes[LOOPED] == sizes[FEW] < sizes[MANY]
    lesson = recipe.Lesson(torch.zeros(3, 9, dtype=torch.long), torch.tensor(3))
    one = lesson._replace(loops=torch.tensor(1))
    operations = {name: recipe.timed(net, lesson if name == LOOPED else one)[0] for name, net in nets.items()}
    assert operations[LOOPED] == operations[MANY] > operations[FEW] > 0


def test_operations_are_three_times_a_forward_pass_by_hand():
    net = recipe.made(plan(), FEW)
    seen, _ = recipe.timed(net, recipe.Lesson(torch.zeros(3, 9, dtype=torch.long), torch.tensor(1)))
    layer = 2 * (4 * 8 * 8 + 3 * 8 * 21) + 2 * 2 * 9 * 8
    assert seen == 3 * 3 * 9 * (3 * layer + 2 * 8 * text.BYTES)


def test_loops_are_drawn_for_each_step_and_known_beforehand():
    drawn = [recipe.drawn_loops(plan(), 0, LOOPED, step) for step in range(200)]
    assert set(drawn) == {2, 3, 4} and drawn == [recipe.drawn_loops(plan(), 0, LOOPED, step) for step in range(200)]
    assert drawn != [recipe.drawn_loops(plan(), 1, LOOPED, step) for step in range(200)]
    assert {recipe.drawn_loops(plan(), 0, MANY, step) for step in range(9)} == {1}


def test_bits_are_those_of_plain_python():
    torch.manual_seed(0)
    net = recipe.made(plan(), LOOPED).eval()
    pieces = torch.randint(0, 256, (65, 9))
    with torch.no_grad():
        chances = net(pieces, max_steps=2).logits.log_softmax(-1)
    told = [chances[row, place, pieces[row, place + 1]].item() for row in range(65) for place in range(8)]
    found, loops = recipe.bits(net, pieces, 2)
    assert found == pytest.approx(-sum(told) / len(told) / 0.6931471805599453, rel=1e-5) and loops == 2


def test_a_lax_threshold_leaves_at_once_and_a_strict_one_never(monkeypatch):
    torch.manual_seed(0)
    net = recipe.made(plan(), LOOPED).eval()
    pieces = torch.randint(0, 256, (3, 9))
    monkeypatch.setattr(recipe, "THRESHOLDS", {KL: (1e9, 1e-30), "entropy": (9.0, 1e-9), "confidence": (1e-9, 1.0)})
    found = recipe.curves(net, pieces, plan(), deepest=9)
    shallow, deep = found[UNIFORM][0], found[UNIFORM][-1]
    for name in (KL, "entropy", "confidence"):
        lax, strict = found[name]
        assert (lax.loops, strict.loops) == (1, 4)
        assert (lax.bits, strict.bits) == pytest.approx((shallow.bits, deep.bits), rel=1e-5)
    assert recipe.halt.Never is type(net.loop.halt)


def test_the_verdict_is_that_of_the_numbers():
    nets = {name: Net(bits, 1, 1, 1.0, 1.0) for name, bits in ((LOOPED, 2.0), (FEW, 2.1), (NARROW, 2.3), (MANY, 1.9))}
    said = verdict([Result(0, nets, {}, {})])
    assert f"Against {FEW}, the loop is better by 0.100" in said and "ahead with 1 of 1" in said
    assert f"Against {MANY}, the loop is worse by 0.100" in said and "ahead with 0 of 1" in said


def test_equal_depth_is_read_off_the_line():
    uniform = [Point(1, 3.0, 1.0), Point(2, 2.0, 2.0)]
    assert [between(uniform, loops) for loops in (1.0, 1.25, 2.0)] == [3.0, 2.75, 2.0]


def test_the_recipe_refuses_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0. Name at least one seed"):
        recipe.run(tmp_path, **{**TINY, "seeds": ()})
    with pytest.raises(ValueError, match="high must be at least 2, got 1. Swap low and high"):
        recipe.run(tmp_path, **{**TINY, "high": 1})
