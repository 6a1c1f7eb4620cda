"""What `bench overhead` runs alone is what a block runs, and nothing is reported of a loop that is another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loopaware import Loop
from loopaware.nn import Block
from loopaware.recipes import overhead, overhead_report
from loopaware.recipes.overhead import ATTENTION, KINDS, PRODUCTS, Body, Driver

SMALL = {"dims": (8, 16), "batch": 3, "tokens": 9, "heads": 2, "loops": ((8, 3, 5), (4, 1, 3)), "steps": 3}


@pytest.fixture(autouse=True)
def a_small_square(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overhead, "SIDE", 16)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overhead.run(tmp_path, **SMALL, repeats=1)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    passes = ["forward", "forward and backward"]
    assert [(line["dim"], line["passes"]) for line in result["bodies"]] == [(8, p) for p in passes] + [
        (16, p) for p in passes
    ]
    assert [line["operations"] for line in result["bodies"]] == [
        2 * 27 * 12 * dim**2 * times for dim in (8, 16) for times in (1, 3)
    ]
    assert all(line["share"] > 0 and set(line["kinds"]) == set(KINDS) for line in result["bodies"])
    assert [(line["dim"], line["batch"], line["tokens"]) for line in result["drivers"]][::2] == [(8, 3, 5), (4, 1, 3)]
    assert all(line["ratio"] > 0 for line in result["drivers"]) and result["plan"]["square"]["PyTorch"] > 0


@pytest.mark.parametrize("training", [False, True])
def test_the_products_of_a_block_are_run_again_and_nothing_else(training: bool):
    block, x = Block(8, 2), torch.randn(3, 5, 8)
    kernels = overhead.watched(
        (lambda: overhead.passed(block, x)) if training else (lambda: overhead.forward(block, x))
    )
    with FlopCounterMode(display=False) as counter:
        kernels.alone(PRODUCTS)()
    assert counter.get_total_flops() == kernels.operations == 2 * 15 * 12 * 8**2 * (3 if training else 1)
    with overhead.Kernels() as again:
        kernels.alone(PRODUCTS, ATTENTION)()
    assert [name for name, _ in again.calls] == [name for name, _ in kernels.calls]
    assert [name for name, _ in kernels.calls].count(ATTENTION) == (2 if training else 1)
    assert set(kernels.seconds) == set(KINDS)


def test_products_that_are_not_the_blocks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(overhead, "kind", lambda name: PRODUCTS if name == "aten::mm" else "sums and copies")
    with pytest.raises(ValueError, match=r"must be those of the linear maps, \d+ operations, got \d+ at dim 8\."):
        overhead.run(tmp_path, **SMALL, repeats=1)
    assert not list(tmp_path.iterdir())


def test_a_loop_that_is_not_its_steps_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overhead, "Loop", lambda block, steps, **parts: Loop(block, steps + 1, **parts))
    with pytest.raises(ValueError, match=r"those of its bare steps, got a difference of .* at dim 8\. Nothing"):
        overhead.measured_driver(8, 3, 5, heads=2, steps=2, repeats=1)


def test_shares_and_ratios_are_what_they_say():
    seconds = {
        "body": 0.0038,
        "watched": 0.004,
        "matrix products": 0.003,
        "products and attention": 0.0035,
    }
    line = Body(8, "forward", seconds, 3_000_000, dict.fromkeys(KINDS, 4e-4) | {PRODUCTS: 0.002})
    assert (line.share, line.both) == (0.003 / 0.0038, 0.0035 / 0.0038)
    parts = overhead_report.shares(line)
    assert sum(parts.values()) == pytest.approx(1) and parts["between kernels"] == pytest.approx(0.1)
    columns, rows = overhead_report.table_of_bodies([line])
    assert rows[0][columns.index("GFLOP/s of products")] == "1" and len(columns) == len(rows[0])
    driver = Driver(8, 1, 3, "forward", {"bare steps": 0.010, "loop": 0.011}, 10)
    assert driver.ratio == pytest.approx(1.1) and driver.each == pytest.approx(100)


def test_nothing_to_measure_is_refused(tmp_path: Path):
    for name, what in {"dims": "Name at least one width", "loops": "Name at least one loop as features"}.items():
        with pytest.raises(ValueError, match=rf"{name} must be at least 1, got 0\. {what}"):
            overhead.run(tmp_path, **{**SMALL, name: ()})
