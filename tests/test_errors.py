"""Bad input gets one clear error that names the value and the remedy; nothing is lost."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from loopaware import Loop, Rows, Status, body, execute, files, grad, halt, init, observe, readout, tree, update
from loopaware.cli import main
from loopaware.recipes import RECIPES

X = torch.ones(2, 5, 4)


def half(state, context, index):
    return state / 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": 0}, ValueError, r"max_steps must be at least 1, got 0\. A loop is always bounded\."),
        ({"max_steps": 2.0}, TypeError, r"max_steps must be an integer, got 2\.0\."),
        ({"max_steps": True}, TypeError, r"max_steps must be an integer, got True\."),
        ({"max_steps": 2, "rows": 0}, ValueError, r"rows must be at least 1, got 0\. Use 1 if sequences halt"),
        (
            {"max_steps": 2, "halt": halt.Residual(), "grad": grad.Truncated(2)},
            ValueError,
            r"grad must differentiate every step when halting is learned, got Truncated\(last=2.*grad\.Full\(\)",
        ),
        (
            {"max_steps": 2, "halt": halt.Watched(halt.Linear(4)), "grad": grad.OneStep()},
            ValueError,
            r"grad must differentiate every step when halting is learned, got OneStep\(\)",
        ),
        (
            {"max_steps": 2, "readout": readout.Weighted(), "grad": grad.OneStep()},
            ValueError,
            r"readout must return the last state when no other .* got Weighted\(\) with OneStep\(\)\. Take",
        ),
    ],
)
def test_loops_that_cannot_work_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Loop(half, **options)


def test_a_bound_given_to_a_call_is_checked():
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        Loop(half, 3)(X, max_steps=0)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda state, context, index: state[..., :2], r"\(2, 5, 2\)"),
        (lambda state, context, index: (state, state), r"\(\(2, 5, 4\), \(2, 5, 4\)\)"),
        (lambda state, context, index: None, "None"),
    ],
)
def test_a_body_that_changes_the_shape(function, got):
    with pytest.raises(
        ValueError, match=rf"proposal must have the shape of the state \(2, 5, 4\), got {got}\. Project"
    ):
        Loop(function, 3)(X)


def test_nan_in_the_state_names_step_and_rows():
    broken = X.clone()
    broken[1, 0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"finite, got nan or inf after 0 steps in rows \[1\]\. Look at the input"
    ):
        Loop(half, 3)(broken)
    with pytest.raises(FloatingPointError, match=r"after 2 steps in rows \[\(0, 0\), .*update\.Damped"):
        Loop(lambda state, context, index: state / (1 - index), 3, rows=2)(X)
    assert torch.isnan(Loop(half, 3, execute=execute.Eager(check=False))(broken).value).any()
    assert torch.isnan(Loop(half, 3, execute=execute.Unrolled())(broken).value).any()


def test_the_result_says_why_each_row_stopped():
    """Also of a loop that diverges and is run without looking: the result owns up to every nan."""
    start = torch.tensor([[1.0], [3.0], [1e30], [1.0]])
    mask = torch.tensor([True, True, True, False])

    def squared(state, context, index):
        return torch.where(state > 2, state * state, state / 2)

    rule = halt.Converged(atol=0.2, rtol=0.0)
    loop = Loop(squared, 3, halt=rule, execute=execute.Unrolled())
    out = loop(start, mask=mask)
    assert [Status(code).name for code in out.status.tolist()] == ["HALTED", "BOUND", "DIVERGED", "PADDING"]
    tokens = loop.replace(rows=2)(start.expand(4, 3)[..., None], mask=mask[:, None].expand(4, 3))
    assert tokens.status.tolist() == [[1] * 3, [2] * 3, [3] * 3, [0] * 3]
    with pytest.raises(FloatingPointError, match=r"nan or inf after 1 steps in rows \[2\]"):
        loop.replace(execute=execute.Eager())(start, mask=mask)


def test_nan_in_padding_is_nobodys():
    padded = X.clone()
    padded[1, 4] = float("nan")
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    assert Loop(half, 3)(padded, mask=mask).value[mask].isfinite().all()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, dtype=torch.bool), ValueError, r"first 1 or more axes of the state \(2, 5, 4\), got \(3,\)"),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"got \(2, 4\)\. True marks what is real"),
        (torch.ones(2, 5, 4, 1, dtype=torch.bool), ValueError, r"got \(2, 5, 4, 1\)"),
        (torch.ones(2), TypeError, r"mask must be boolean with True = real, got torch\.float32\. Pass mask\.bool\(\)"),
    ],
)
def test_a_mask_of_the_wrong_shape(mask, error, message):
    with pytest.raises(error, match=message):
        Loop(half, 3)(X, mask=mask)


def test_a_mask_and_a_carry_are_one_too_many():
    loop = Loop(half, 3)
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask must be None when a carry is given, got both\. The carry holds"):
        loop(X, carry=loop(X, mask=mask, max_steps=1).carry, mask=mask)


def test_states_and_contexts_that_are_none():
    with pytest.raises(TypeError, match=r"a context must be a tensor or a mapping with a tensor under 'x', got list\."):
        Loop(half, 3)([1.0])
    with pytest.raises(TypeError, match=r"a state must hold a tensor, got NoneType\. Let init return"):
        Loop(half, 3, init=lambda context: None)(X)
    with pytest.raises(ValueError, match=r"must lead with the same 2 row axes, got \(\(2, 5, 4\), \(2,\)\)\."):
        Loop(half, 3, rows=2, init=lambda context: (context, context[:, 0, 0]))(X)
    with pytest.raises(
        TypeError, match=r"state read by halt\.Linear must be one tensor, got dict\. Give the part a `read`"
    ):
        halt.Linear(4)(None, {"h": X}, (Rows(), None), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: halt.Converged(rtol=0.0), "one of them above it, got 0.0 and 0.0"),
        (lambda: halt.Converged(rtol=-1.0), "at least 0 and one of them above it, got -1.0 and 0.0"),
        (lambda: halt.KL(half, 0.0), "threshold must be above 0.0 and at most inf, got 0.0"),
        (lambda: halt.Entropy(half, float("nan")), "threshold must be above 0.0 and at most inf, got nan"),
        (lambda: halt.Confidence(half, 1.5), "threshold must be above 0.0 and at most 1.0, got 1.5"),
        (lambda: halt.Residual(threshold=1.0), "threshold must be above 0.0 and at most .*, got 1.0"),
        (lambda: halt.Patience(halt.Never(), 0), "times must be at least 1, got 0"),
        (lambda: halt.Grouped(halt.Never(), 0), "size must be at least 1, got 0"),
        (lambda: halt.Any(), r"halt\.Any must hold at least one rule, got none\. Pass halt\.Any\(first"),
        (lambda: halt.All(), r"halt\.All must hold at least one rule, got none"),
        (lambda: body.Stack(), "a Stack must hold at least one body, got none"),
        (lambda: update.Damped(0.0), "rate must be above 0.0 and at most 1.0, got 0.0"),
        (lambda: update.Momentum(1.0), "momentum must be from 0 to below 1, got 1.0"),
        (lambda: update.Momentum(0.5, rate=2.0), "rate must be above 0.0 and at most 1.0, got 2.0"),
        (lambda: update.GRU(4, chrono=2), "chrono must be at least 3, got 2"),
        (lambda: update.Residual(0), "dim must be at least 1, got 0"),
        (lambda: update.Quantized(update.Replace(), 1), "kind must be at least 2, got 1"),
        (lambda: update.Quantized(update.Replace(), 17), "kind must be at most 16 bits, got 17. Take torch.float32"),
        (lambda: init.Zeros(0), "dim must be at least 1, got 0"),
        (lambda: init.Gaussian(std=0.0), "std must be above 0.0 and at most inf, got 0.0"),
        (lambda: grad.Truncated(0), "last must be at least 1, got 0"),
        (lambda: grad.Checkpointed(0), "every must be at least 1, got 0"),
    ],
)
def test_parts_refuse_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_grouped_sequences_would_wait_for_each_other():
    with pytest.raises(ValueError, match=r"rows must be at least 2 for halt\.Grouped, got 1\. Sequences never wait"):
        Loop(half, 3, halt=halt.Grouped(halt.Converged(), 2))(X)


def test_recordings_need_a_loop_and_one_call():
    with (
        pytest.raises(ValueError, match=r"must contain a Loop, got Linear without one"),
        observe.record(torch.nn.Linear(1, 1)),
    ):
        pass
    with observe.record(Loop(half, 3)) as tape:
        pass
    with pytest.raises(
        ValueError, match=r"must hold one trajectory to be read by `only`, got \{'': 0\}\. Read it by name"
    ):
        _ = tape.only


@pytest.mark.parametrize("words", [["run", "distance"], ["run", "distance", "--steps", "3"]])
def test_an_unknown_recipe(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr().err
    assert left.value.code == 1 and f"a recipe must be one of {', '.join(RECIPES)}, got 'distance'" in said
    assert len(said.splitlines()) == 1


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = files.write(tmp_path / "kept.txt", "before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="5 bytes must fit on the disk .* got 'No space left on device'. Free space or choose"
    ):
        files.write(path, "after")
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_a_folder_that_is_a_file(tmp_path):
    files.write(tmp_path / "file", "")
    with pytest.raises(OSError, match="must fit on the disk and be writable, got"):
        files.write(tmp_path / "file" / "inside.txt", "x")


def test_trees_are_described_by_shapes():
    assert tree.describe({"a": X, "b": (X[0], None)}) == {"a": (2, 5, 4), "b": ((5, 4), None)}


def test_a_type_that_is_no_precision():
    with pytest.raises(TypeError, match=r"kind must be a floating-point type, got torch.int8. For integers give"):
        update.Quantized(update.Replace(), torch.int8)
