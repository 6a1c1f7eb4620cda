"""The contract suite catches a broken driver: each row seeds one mistake by hand into the source of `loop.py`.

Run `python tests/test_mutants.py` for the list of mistakes and the law that caught each.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

import loopaware.loop
from loopaware import halt, readout, testing, update

MUTANTS = {
    "drop the mask": ("state, update, halt = tree.where(alive, (state, update, halt), kept)", "pass"),
    "freeze the state, not the memories": (
        "state, update, halt = tree.where(alive, (state, update, halt), kept)",
        "update, halt = tree.where(alive, (update, halt), kept[1:])",
    ),
    "count halted rows": ("carry.steps + alive", "carry.steps + 1"),
    "weigh halted rows": ("verdict.weight * unheard", "verdict.weight"),
    "forget who halted": ("halted = halted | verdict.stop", "halted = verdict.stop"),
    "believe the last verdict": ("alive = alive > halted", "alive = ~verdict.stop"),
    "step padding": ("alive=rows.real(state)", "alive=~rows.zeros(state, torch.bool)"),
    "stop one step late": ("alive = alive > halted", "alive = unheard"),
    "start anew when resumed": ("max(limit - carry.index, 0)", "limit"),
    "lose the index": ("carry.index + 1", "carry.index"),
    "judge the proposal against itself": ("self.halt(carry.state, state,", "self.halt(state, state,"),
    "halt together": ("halted | verdict.stop", "halted | verdict.stop.any()"),
}


def mutated(old: str, new: str) -> types.ModuleType:
    source = Path(loopaware.loop.__file__).read_text()
    assert source.count(old) == 1, f"the mutant must change one place, got {source.count(old)} of {old!r}"
    module = types.ModuleType("mutant")
    sys.modules["mutant"] = module
    exec(compile(source.replace(old, new), "mutant.py", "exec"), module.__dict__)
    return module


class Stepping(torch.nn.Module):
    """A body that knows its step."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, state: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        return torch.tanh(self.linear(state) * 0.3 + x + 0.1 / (1 + index))


def checked(module: types.ModuleType) -> None:
    """The laws on a loop whose rows stop at different steps, with padding, memory and a step signal."""
    torch.manual_seed(0)
    context = torch.randn(3, 5, 6) * torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    loop = module.Loop(
        Stepping(),
        7,
        rows=2,
        update=update.Momentum(0.2),
        halt=halt.Patience(halt.Converged(rtol=0.1), times=2),
        readout=readout.Weighted(),
    )
    for rule in (loop.halt, halt.Converged(rtol=0.1)):
        testing.check_loop(loop.replace(halt=rule), context, mask=torch.arange(5) < torch.tensor([5, 3, 1])[:, None])


def test_the_driver_itself_passes():
    checked(loopaware.loop)


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_suite_catches(mistake: str):
    module = mutated(*MUTANTS[mistake])
    with pytest.raises(AssertionError):
        checked(module)


if __name__ == "__main__":
    for mistake, change in MUTANTS.items():
        module = mutated(*change)
        try:
            checked(module)
            print(f"{mistake:40} SURVIVED")
        except AssertionError as error:
            print(f"{mistake:40} caught: {str(error).splitlines()[0][:90]}")
