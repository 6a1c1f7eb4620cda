"""Checks of one part against the law of its slot.

In: a part and material to try it on. Out: nothing, or an AssertionError with the broken law.
Deliberately elsewhere: parts working together in a loop (`loopaware.testing.loops`).
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from loopaware import execute, grad, tree
from loopaware.loop import Loop
from loopaware.protocols import Body, Execute, Grad, Halt, Init, Readout, Rows, State, Update, Verdict, partial
from loopaware.testing.naive import naive
from loopaware.testing.tolerance import assert_close, batch_size, rows_of
from loopaware.tokens import Tokens


def check_module(part: Any) -> None:
    """A part says what it is; its weights survive being saved and loaded, and copying.

    >>> check_module(nn.Linear(1, 1))
    """
    text = repr(part)
    assert type(part).__name__ in text and " at 0x" not in text, f"a repr names its class and no address: {text}"
    if isinstance(part, nn.Module):
        tensors = {name: value.contiguous() for name, value in part.state_dict().items() if isinstance(value, Tensor)}
        twin = copy.deepcopy(part)
        for parameter in twin.parameters():
            nn.init.zeros_(parameter)
        twin.load_state_dict(load(save(tensors)) if tensors else {})
        for name, value in twin.state_dict().items():
            assert_close(value, part.state_dict()[name], f"saved and loaded, {name} is as before")


def check_alive(part: Any, value: Any) -> None:
    """Every trainable parameter of `part` receives a gradient that is not zero from `value`."""
    named = [(n, p) for n, p in part.named_parameters() if p.requires_grad] if isinstance(part, nn.Module) else []
    if not named:
        return
    leaves = [leaf for leaf in tree.leaves(value) if leaf.requires_grad]
    assert leaves, "the value carries a gradient: nothing was differentiated"
    noise = torch.Generator().manual_seed(7)
    terms = [(leaf * torch.randn(leaf.shape, generator=noise, dtype=leaf.dtype)).sum() for leaf in leaves]
    found = torch.autograd.grad(torch.stack(terms).sum(), [p for _, p in named], allow_unused=True, retain_graph=True)
    dead = [name for (name, _), g in zip(named, found, strict=True) if g is None or not g.abs().sum() > 0]
    assert not dead, f"every trainable parameter receives a gradient: none in {dead}"


def check_init(part: Init, context: Any) -> None:
    """An init keeps the rows of its context, starts each row alone, and is alive."""
    check_module(part)
    check_alive(part, part(context))
    still = copy.deepcopy(part).eval() if isinstance(part, nn.Module) else part
    state = still(context)
    x = tree.content(context)
    for leaf in tree.leaves(state):
        assert leaf.shape[:-1] == x.shape[:-1] and leaf.dtype == x.dtype, "rows and dtype of the context are kept"
    assert_close(still(context), state, "evaluation starts the same way twice")
    for item in range(batch_size(context)):
        assert_close(still(rows_of(context, item, item + 1)), rows_of(state, item, item + 1), "a row starts alone")
    if x.ndim > 2:
        shorter = {**context, "x": x[:, :-1]} if isinstance(context, dict) else x[:, :-1]
        assert_close(still(shorter), tree.map(lambda leaf: leaf[:, :-1], state), "positions behind do not matter")


def check_body(body: Body, state: State, context: Any, index: int = 1) -> None:
    """A body proposes rows for rows, each from its own sequence, is alive, and can be run in part if it says so."""
    if isinstance(body, nn.Module):
        check_module(body)
    proposal = body(state, context, index)
    assert tree.describe(proposal) == tree.describe(state), "a proposal has the shapes of the state"
    check_alive(body, proposal)
    for item in range(batch_size(state)):
        alone = body(rows_of(state, item, item + 1), rows_of(context, item, item + 1), index)
        assert_close(alone, rows_of(proposal, item, item + 1), "batch N equals batch 1")
    if partial(body):
        check_partial(body, state, context, index)


def check_partial(body: Any, state: Tensor, context: Any, index: int) -> None:
    """What a body proposes for some tokens is what it proposes for them among all, over steps in which they move."""
    generator = torch.Generator().manual_seed(7)
    run, moved, held = torch.rand(state.shape[:2], generator=generator) < 0.8, None, None
    for step in range(index, index + 4):
        run[0, 0] = True  # never nobody
        tokens = Tokens(run, moved)
        new, held = body.some(state, context, step, tokens, held)
        assert_close(new[0], body(state, context, step)[run], "what is proposed for some is what is proposed among all")
        state, moved = tokens.put(state, new), None if held is None else run
        run = run & (torch.rand(run.shape, generator=generator) < 0.6)


def check_update(part: Update, state: State, proposal: State) -> None:
    """An update keeps fixed points if it says so, in training and in evaluation, is alive in what it returns over two
    steps, and in evaluation keeps rows apart.
    """
    check_module(part)
    calm = copy.deepcopy(part).eval() if isinstance(part, nn.Module) else part
    for mode in (part, calm):
        still, _ = mode(state, state, mode.start(state))
        held = all(torch.equal(one, two) for one, two in zip(tree.leaves(still), tree.leaves(state), strict=True))
        assert held == mode.keeps_fixed_points, (
            "fresh memory and proposal == state change nothing, or the trait says no"
        )
    check_alive(part, twice(part, state, proposal))
    first, second = twice(calm, state, proposal)
    assert tree.describe(second) == tree.describe(state), "an update keeps the shapes of the state"
    for item in range(batch_size(state)):
        alone = twice(calm, rows_of(state, item, item + 1), rows_of(proposal, item, item + 1))
        assert_close(alone[1], rows_of(second, item, item + 1), "batch N equals batch 1")
    trees = calm(
        {"a": state, "b": (proposal,)}, {"a": proposal, "b": (state,)}, calm.start({"a": state, "b": (state,)})
    )
    assert_close(trees[0]["a"], first, "a state that is a tree is updated leaf by leaf")


def twice(part: Update, state: State, proposal: State) -> tuple[State, State]:
    """The states after one step and after two."""
    first, memory = part(state, proposal, part.start(state))
    return first, part(first, proposal, memory)[0]


def check_halt(part: Halt, states: list[State], rows: Rows) -> None:
    """A rule's weights are not negative and sum to one when it stops, in training and in evaluation; learned ones are
    alive; in evaluation rows are judged alone; who foresees the stops keeps to it.

    Args:
        states: h_0, h_1, ..., each leading with the batch.
        rows: as the loop would pass them.
    """
    check_module(part)
    still = copy.deepcopy(part).eval() if isinstance(part, nn.Module) else part
    check_weights(part, judged(part, states, rows), rows)
    verdicts = judged(still, states, rows)
    check_weights(still, verdicts, rows)
    for mode in (part, still):
        check_foreseen(mode, states, rows)
    if part.learned:
        check_alive(part, tuple(verdict.score for verdict in judged(part, states, rows)))
    for item in range(batch_size(states[0])):
        own = Rows(rows.axes, None if rows.mask is None else rows.mask[item : item + 1])
        alone = judged(still, [rows_of(state, item, item + 1) for state in states], own)
        for one, all_rows in zip(alone, verdicts, strict=True):
            assert_close(tuple(one), rows_of(tuple(all_rows), item, item + 1), "a row is judged alone")


def check_weights(part: Halt, verdicts: list[Verdict], rows: Rows) -> None:
    """Weights are not negative, never sum to more than one, and to one when a row stops."""
    total, stopped = torch.zeros_like(verdicts[0].weight), torch.zeros_like(verdicts[0].stop)
    for verdict in verdicts:
        assert all(tensor.shape == total.shape and tensor.ndim == rows.axes for tensor in verdict), "one for each row"
        assert verdict.stop.dtype == torch.bool and (verdict.weight >= 0).all(), "weights are not negative"
        total = total + verdict.weight * ~stopped
        stopped = stopped | verdict.stop
        assert_close(total[stopped], torch.ones_like(total[stopped]), "weights sum to one when a row stops")
        assert (total <= 1 + 1e-5).all(), "weights never sum to more than one"
    assert part.stops or not stopped.any(), "a rule that never stops says so"


def check_foreseen(part: Halt, states: list[State], rows: Rows) -> None:
    """A rule that says at its start after how many steps rows stop does stop them then, and not before."""
    memory, foreseen = part.start(states[0], rows), getattr(part, "foreseen", None)
    ends = None if foreseen is None else foreseen(memory)
    if ends is None:
        return
    for index, (old, new) in enumerate(itertools.pairwise(states)):
        verdict, memory = part(old, new, memory, index)
        assert torch.equal(verdict.stop, ends <= index + 1), "a row stops when it was foreseen to"


def judged(part: Halt, states: list[State], rows: Rows) -> list[Verdict]:
    """The rule's verdicts along a trajectory."""
    memory, verdicts = part.start(states[0], rows), []
    for index, (old, new) in enumerate(itertools.pairwise(states)):
        verdict, memory = part(old, new, memory, index)
        verdicts.append(verdict)
    return verdicts


def check_readout(part: Readout, loop: Loop, context: Any) -> None:
    """Folding in two pieces equals folding in one, wherever the cut; what is folded leads with the rows."""
    check_module(part)
    loop = loop.replace(readout=part)
    whole = loop(context)
    for leaf in tree.leaves(whole.carry.readout):
        assert leaf.shape[: loop.rows] == whole.steps.shape, "what is folded leads with the row axes"
    for cut in range(1, loop.max_steps):
        piece = loop(context, max_steps=cut)
        assert_close(loop(context, carry=piece.carry).value, whole.value, f"cut at step {cut}, the value is the same")


def check_grad(part: Grad, loop: Loop, context: Any) -> None:
    """Values, steps and verdicts equal a plain run's; complete rules are exact; no gradient is dead."""
    check_module(part)
    plain, own = loop.replace(grad=grad.Full()), loop.replace(grad=part)
    expected, got = plain(context), own(context)
    assert_close(got[:3], expected[:3], "values, steps and verdicts equal a plain run's")
    check_alive(own, got.value)
    if part.complete:
        names = [parameter for parameter in loop.parameters() if parameter.requires_grad]
        totals = [torch.stack([leaf.sum() for leaf in tree.leaves(o.value)]).sum() for o in (got, expected)]
        pair = [torch.autograd.grad(total, names) for total in totals]
        assert_close(pair[0], pair[1], "a complete rule has the exact gradient")
    with torch.no_grad():
        assert_close(own(context).value, plain(context).value, "without gradients it is a plain run")


def check_execute(part: Execute, loop: Loop, context: Any) -> None:
    """Equals the naive run in outputs and gradients."""
    check_module(part)
    got, expected = loop.replace(execute=part)(context), naive(loop.replace(execute=execute.Unrolled()), context)
    assert_close(got[:3], expected[:3], "equals the naive run")
    parameters = list(loop.parameters())
    if parameters:
        pair = [torch.autograd.grad(tree.leaves(o.value)[0].sum(), parameters) for o in (got, expected)]
        assert_close(pair[0], pair[1], "has the gradients of the naive run")
