"""Masked ACT as it is commonly written: it does the work it is timed for, and nothing is said of it otherwise."""

from __future__ import annotations

import pytest
import torch

from loopaware import Loop, halt, readout, testing
from loopaware.nn import Block, Post
from loopaware.recipes import execution, execution_baselines
from loopaware.recipes.execution_baselines import Chance, MaskedACT, masked_act

DIM = 8


def fixed(steps: int) -> Loop:
    torch.manual_seed(0)
    return Loop(Block(DIM, 2, placement=Post()), steps, rows=2)


@pytest.mark.parametrize("steps", [1, 3, 12, 150])
def test_tokens_halt_where_it_is_written_down(steps: int):
    ends = torch.randint(1, steps + 1, (3, 7))
    ends[0, 0] = steps
    answer = masked_act(fixed(steps), x := torch.randn(3, 7, DIM), ends)(x)
    assert torch.equal(answer.updates, ends.float())
    assert ((answer.remainder > 0) & (answer.remainder <= 1)).all()


def test_the_answer_is_the_recursive_mix_of_the_states_of_a_fixed_depth():
    """Another twin, with weights typed by hand: tokens go on being updated, and no longer count."""
    loop, x = fixed(5), torch.randn(3, 7, DIM)
    ends = torch.randint(1, 6, (3, 7))
    own = masked_act(loop, x, ends)
    value = torch.zeros_like(x)
    for index, state in enumerate(loop.replace(readout=readout.Every())(x).value):
        share = (0.99 / (ends - 0.5)).clamp(max=0.999)
        weight = torch.where(index + 1 < ends, share, torch.where(index + 1 == ends, 1 - share * (ends - 1), 0.0))
        value = weight[..., None] * state + (1 - weight[..., None]) * value
    testing.assert_close(own(x).value, value, "the mix of the states")
    assert all(gradient.abs().sum() > 0 for gradient in execution_baselines.differentiated(own, own(x).value)[1:])


def test_it_runs_all_tokens_until_the_last_one_halts():
    ends = torch.ones(3, 7, dtype=torch.long)
    ends[1, 2] = 4
    seen = []
    own = masked_act(fixed(9), x := torch.randn(3, 7, DIM), ends)
    own.block.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    own(x)
    assert seen == [(3, 7, DIM)] * 4


def test_nothing_is_said_of_a_baseline_that_is_wrong(monkeypatch: pytest.MonkeyPatch):
    x, ends = torch.randn(3, 7, DIM), torch.full((3, 7), 3)

    class Late(Chance):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return super().forward(state) - 1.0

    monkeypatch.setattr(execution_baselines, "Chance", Late)
    with pytest.raises(ValueError, match=r"halt as written down .* got 21 tokens that halt at other steps"):
        masked_act(fixed(9), x, ends)
    monkeypatch.undo()

    class Raw(MaskedACT):
        def forward(self, state: torch.Tensor) -> execution_baselines.Answer:
            answer = super().forward(state)
            return answer._replace(value=answer.value * 1.1)

    monkeypatch.setattr(execution_baselines, "MaskedACT", Raw)
    with pytest.raises(ValueError, match=r"within 0\.001 of tensor2tensor_act, got 0 tokens .* 1\.0e-01\. Nothing is"):
        masked_act(fixed(9), x, ends)


def test_it_has_a_line_in_the_table():
    seconds = {execution.DENSE: 2.0, execution.MASKED: 2.2, execution.ACT: 2.5, execution.COMPACTED: 1.0}
    columns, rows = execution.table([execution.Line(8, 3, "forward", seconds, 0.5, 0.4, 0.0)])
    assert rows[0][columns.index("masked ACT")] == "1.250" and len(columns) == len(rows[0])


def test_a_rule_of_its_own_agrees():
    """The same shares by `halt.ACT` on the same chance, whose answer is a mean: the steps are the same."""
    x, ends = torch.randn(3, 7, DIM), torch.randint(1, 6, (3, 7))
    rule = halt.ACT(halt.Before(halt.Linear(DIM)))
    rule.rule.rule.head = Chance(DIM, ends)
    loop = fixed(5).replace(halt=rule, readout=readout.Weighted())
    assert torch.equal(loop(x).steps, ends)
