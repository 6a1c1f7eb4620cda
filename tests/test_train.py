"""Training: a run that is killed ends like one that was not; nothing is lost on a full disk; schedules and averages."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from loopaware import files, testing, train

SCRIPT = """
import os, signal, sys, time
import torch
from loopaware import Loop, body, files, init, train
torch.set_num_threads(1)
folder, kill_write, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
written, write = 0, files.write

def deadly(path, content):
    global written
    written += 1
    if written == kill_write:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.with_name("." + path.name + ".tmp").write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)

files.write = deadly
torch.manual_seed(1)
block = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Dropout(0.3))
model = torch.nn.Sequential(Loop(body.Called(block), 3, init=init.Gaussian(std=0.1)), torch.nn.Linear(5, 1))
model[0].forward, forward = (lambda x: forward(x).value), model[0].forward

def batches(step, generator):
    time.sleep(pause)
    x = torch.randn(7, 5, generator=generator)
    return x, x.sum(-1, keepdim=True)

def objective(model, batch, step):
    loss = (model(batch[0]) - batch[1]).square().mean()
    return loss, {"accuracy": (loss < 1).float()}

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
average = train.Average(0.9)
journal = train.Journal(folder, log_every=3, save_every=4, tensorboard=True)
schedule = train.Warmup(5, then=train.Drop())
print("ready", flush=True)
train.fit(model, objective, batches, optimizer, steps=30, schedule=schedule, average=average, journal=journal, seed=2)
"""


def run(folder, kill_write: int = 0, pause: float = 0.0, kill_after: float | None = None) -> int:
    """The exit code of the script in a process of its own, killed `kill_after` seconds behind its start of training."""
    words = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(kill_write), str(pause)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        if kill_after is not None:
            process.stdout.readline()
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        said = process.stderr.read()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert run(folder) == 0
    return folder


def same(folder, other) -> None:
    """The same numbers: weights, moments, average and metrics, bit for bit."""
    ends = [train.latest(place) for place in (folder, other)]
    for name in ("tensors.safetensors", "state.json"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("kill_write", [1, 2, 3, 4, 6, 9])
def test_killed_while_writing_it_ends_like_an_unbroken_run(unbroken, tmp_path, kill_write):
    assert run(tmp_path, kill_write=kill_write) == -signal.SIGKILL
    assert run(tmp_path) == 0
    same(tmp_path, unbroken)


@pytest.mark.parametrize("kill_after", [0.3, 0.7])
def test_killed_at_any_moment_again_and_again(unbroken, tmp_path, kill_after):
    while run(tmp_path, pause=0.05, kill_after=kill_after + 0.4) != 0:
        kill_after += 0.4
    same(tmp_path, unbroken)


def test_the_run_leaves_two_checkpoints_and_whole_lines(unbroken):
    assert [path.name for path in sorted(unbroken.glob("step-*"))] == ["step-00000028", "step-00000030"]
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(3, 31, 3))
    assert set(lines[0]) == {"step", "loss", "norm", "accuracy"}
    assert list((unbroken / "tensorboard").iterdir())


def simple(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batches(step: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(63, 3, generator=generator)


def objective(model, batch, step):
    return (model(batch) - batch.sum(-1, keepdim=True)).square().mean(), {}


def test_it_learns_and_a_finished_run_returns_at_once(tmp_path):
    model, optimizer = simple()
    first = train.fit(model, objective, batches, optimizer, steps=100, journal=train.Journal(tmp_path))
    testing.assert_close(model.weight.detach(), torch.ones(1, 3), "w = 1 solves it")
    assert first[-1]["loss"] < 1e-6 < first[0]["loss"]

    def never(step, generator):
        raise AssertionError("a finished run draws no batch")

    other, optimizer = simple(seed=1)
    again = train.fit(other, objective, never, optimizer, steps=100, journal=train.Journal(tmp_path))
    assert again == first and torch.equal(other.weight, model.weight)


def test_a_folder_with_another_run_is_refused(tmp_path):
    model, optimizer = simple()
    train.fit(model, objective, batches, optimizer, steps=2, journal=train.Journal(tmp_path))
    with pytest.raises(
        ValueError, match=r"must hold a run with the settings \{'steps': 3\}, got \{'steps': 2\}\. Choose"
    ):
        train.fit(model, objective, batches, optimizer, steps=3, journal=train.Journal(tmp_path))
    wide = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"weight \(1, 3\) instead of \(1, 4\)\. Build the model with the options"):
        train.fit(wide, objective, batches, optimizer, steps=2, journal=train.Journal(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    model, optimizer = simple()

    def broken(model, batch, step):
        loss, metrics = objective(model, batch, step)
        return (loss * math.nan if step == 6 else loss), metrics

    with pytest.raises(
        FloatingPointError, match=r"the loss must be finite, got nan at step 8\. Lower the learning rate"
    ):
        train.fit(model, broken, batches, optimizer, steps=20, journal=train.Journal(tmp_path, save_every=4))
    newest = train.latest(tmp_path)
    assert newest.name == "step-00000004" and train.load(newest)["model"]["weight"].isfinite().all()


def test_clipping_and_the_schedule_reach_the_optimizer():
    model, optimizer = simple()
    before = model.weight.detach().clone()
    train.fit(model, objective, batches, optimizer, steps=1, clip=1e-3, schedule=train.Warmup(4))
    moved = torch.cat([(model.weight - before).flatten(), model.bias.detach() - simple()[0].bias]).norm()
    assert moved.item() == pytest.approx(0.1 * 0.25 * 1e-3, rel=1e-3)


def test_the_average_is_its_formula(tmp_path):
    model, average, expected = torch.nn.Linear(2, 1), train.Average(0.5), None
    for step in range(5):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.step(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert average.weights["weight"][0, 0].item() == pytest.approx(expected, rel=1e-6)
    with average.used_by(model):
        assert model.weight[0, 0].item() == pytest.approx(expected, rel=1e-6)
    assert model.weight[0, 0].item() == 4.0


def test_schedules_are_their_formulas():
    assert [train.Cosine(0.1)(step, 2) for step in range(3)] == pytest.approx([1.0, 0.55, 0.1])
    assert [train.Drop(0.7, 0.2)(step, 10) for step in (6, 7)] == [1.0, 0.2]
    assert train.Warmup(10, then=train.Drop(0.5, 0.5))(5, 10) == pytest.approx(0.6 * 0.5)
    for make, message in (
        (lambda: train.Warmup(0), "count must be at least 1, got 0"),
        (lambda: train.Drop(at=2.0), "at must be above 0.0 and at most 1.0, got 2.0"),
        (lambda: train.Cosine(floor=-1.0), "floor must be from 0 to 1, got -1.0"),
        (lambda: train.Average(1.0), "decay must be above 0.0 and at most .*, got 1.0"),
        (lambda: train.Journal("x", log_every=0), "log_every must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


CONTENTS = {"step": 3, "tensors": {0: torch.arange(3.0), "b": [torch.ones(2), (None, True, 0.1)]}, "name": "é"}


def test_checkpoints_come_back_as_they_were(tmp_path):
    got = train.load(train.save(tmp_path, 3, CONTENTS))
    assert got["step"] == 3 and got["name"] == "é" and got["tensors"]["b"][1] == [None, True, 0.1]
    assert torch.equal(got["tensors"][0], CONTENTS["tensors"][0]) and torch.equal(got["tensors"]["b"][0], torch.ones(2))
    with pytest.raises(TypeError, match=r"/x must be a tensor or plain value to be saved, got set\. Convert it first"):
        train.save(tmp_path, 4, {"x": {1}})


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_broken_checkpoint_is_named_with_the_one_before_it(tmp_path, file, damage):
    older, newer = train.save(tmp_path, 3, CONTENTS), train.save(tmp_path, 5, CONTENTS)
    path = newer / file
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * len(whole))
    with pytest.raises(
        ValueError, match=rf"{file} must be part of a whole checkpoint.*step-00000003: remove step-00000005"
    ):
        train.load(newer)
    assert train.load(older)["step"] == 3


def test_a_broken_first_checkpoint_says_start_anew(tmp_path):
    path = train.save(tmp_path, 3, CONTENTS)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"Remove it and start anew\."):
        train.load(path)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch, fails_at):
    kept, calls, write = train.save(tmp_path, 3, CONTENTS), 0, os.fsync

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"bytes must fit on the disk .* got 'No space left on device'\. Free space"):
        train.save(tmp_path, 5, CONTENTS)
    assert train.latest(tmp_path) == kept and [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert train.load(kept)["step"] == 3


def test_a_file_size_limit_is_a_full_disk_for_real(tmp_path):
    """The kernel itself refuses: a limit on file sizes, as a disk would at its end."""
    code = (
        "import resource, signal, sys, torch\n"
        "from loopaware import train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "train.save(sys.argv[1], 1, {'x': torch.zeros(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "train.save(sys.argv[1], 2, {'x': torch.zeros(100_000)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "OSError" in done.stderr and "bytes must fit on the disk" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_model_alone_is_saved_and_checked(tmp_path):
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    path = train.save_model(tied, tmp_path / "model.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other[1].weight = other[0].weight
    train.load_model(other, path)
    assert torch.equal(other[1].weight, tied[0].weight) and torch.equal(other[1].bias, tied[1].bias)
    wrong = torch.nn.Sequential(torch.nn.Linear(3, 2))
    before = wrong[0].weight.clone()
    with pytest.raises(ValueError, match=r"got .*1\.bias unexpected; 0\.weight \(3, 3\) instead of \(2, 3\)"):
        train.load_model(wrong, path)
    assert torch.equal(wrong[0].weight, before)
    with pytest.raises(ValueError, match=r"got 2\.weight missing; 2\.bias missing\. Build the model"):
        train.load_model(torch.nn.Sequential(*other, torch.nn.Linear(1, 1)), path)
    with pytest.raises(ValueError, match=r"nothing\.safetensors must be a safetensors file, got FileNotFoundError"):
        train.load_model(wrong, tmp_path / "nothing.safetensors")


def test_settings_that_are_no_json(tmp_path):
    files.write(tmp_path / "settings.json", "{")
    model, optimizer = simple()
    with pytest.raises(ValueError, match=r"settings\.json must hold json, got '\{'\. Remove the folder to start anew"):
        train.fit(model, objective, batches, optimizer, steps=3, journal=train.Journal(tmp_path))


@pytest.mark.parametrize("name", ["accelerate", "tensorboard"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    model, optimizer = simple()
    with pytest.raises(ImportError, match=rf"{name} must be installed .*pip install 'loopaware\[train\]'"):
        train.fit(model, objective, batches, optimizer, steps=3, journal=train.Journal(tmp_path, tensorboard=True))


def test_two_processes_never_train_in_one_folder(tmp_path):
    """The second is refused while the first runs, and goes on from it once that has been killed."""
    code = "import sys, time; from loopaware import files; kept = files.Reserved(sys.argv[1]); print(1, flush=True); "
    words = [sys.executable, "-c", code + "time.sleep(60)", str(tmp_path)]

    def trained():
        net = torch.nn.Linear(1, 1)
        journal, optimizer = train.Journal(tmp_path), torch.optim.SGD(net.parameters(), lr=0.1)
        return train.fit(
            net,
            lambda net, batch, step: (net(batch).sum(), {}),
            lambda *_: torch.ones(1, 1),
            optimizer,
            steps=2,
            journal=journal,
        )

    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match="must be used by one process at a time, got a second one. Wait for"):
            trained()
        other.kill()
    assert trained() and trained()
