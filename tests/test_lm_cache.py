"""Keys and values of past tokens: in pieces as at once, whatever each token's depth, the batch and its padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import DynamicCache

from loopaware import execute, grad, halt, lm, testing, tree
from looped import EXACT, LEAVING, POLICIES, VOCABULARY, ByPosition, base, model, naive, pieces, planned

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)
every_exact = pytest.mark.parametrize("policy", EXACT, ids=str)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (3, 10))


@some.composite
def texts(draw):
    """Tokens, their padding on either side, depths by position, where the text is cut, a policy, and how it is run."""
    batch, length = draw(some.integers(1, 3)), draw(some.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 99)))
    tokens = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    table = torch.randint(1, 7, (batch, 64), generator=generator)
    before = draw(some.lists(some.integers(0, length - 1), min_size=batch, max_size=batch))
    behind = [draw(some.integers(0, length - 1 - one)) for one in before]
    mask = torch.tensor(
        [[one <= place < length - two for place in range(length)] for one, two in zip(before, behind, strict=True)]
    )
    cuts = sorted(draw(some.sets(some.integers(1, length - 1), max_size=4))) if length > 1 else []
    runs = (LEAVING, execute.Compacted(), execute.Eager(), execute.Unrolled())
    return tokens, mask, table, cuts, draw(some.sampled_from(EXACT)), draw(some.sampled_from(runs))


MODELS = [
    model("llama", injection="concat", start="noise", noise=0.5),
    model("gpt2", coda=0, prelude=0),
]


def same_in_pieces(case) -> None:
    tokens, mask, table, cuts, policy, run = case
    for made in MODELS:
        made = planned(made, table, policy, run)
        with torch.no_grad():
            whole = made(tokens, attention_mask=mask, use_cache=False)
            logits, cache = pieces(made, tokens, mask, cuts)
        assert torch.equal(cache.steps, whole.steps)
        testing.assert_close(logits[mask], whole.logits[mask], "in pieces as at once")
        for row in range(len(tokens)):
            real = mask[row]
            alone = planned(made, table[row : row + 1], policy)
            with torch.no_grad():
                single = alone(tokens[row : row + 1, real], use_cache=False)
            testing.assert_close(single.logits[0], whole.logits[row, real], "batch N equals batch 1, padding or not")
            assert torch.equal(single.steps[0], whole.steps[row, real])


@settings(max_examples=25, deadline=None)
@given(texts())
def test_a_text_in_pieces_is_the_text_at_once(case):
    same_in_pieces(case)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(texts())
def test_a_text_in_pieces_is_the_text_at_once_many_times(case):
    same_in_pieces(case)


@every_exact
@pytest.mark.parametrize("options", [{}, {"injection": "diagonal", "start": "noise", "noise": 0.5}], ids=str)
def test_the_naive_twin(policy, options, tokens):
    """Logits and gradients are those of a plain cache for every step, filled token by token."""
    made = planned(model(**options), table := torch.randint(1, 6, (1, 64)), policy)
    losses, gradients = [], []
    for logits in (made(tokens[:1], use_cache=False).logits, naive(made, tokens[:1], table[0, :10].tolist())):
        losses.append(logits)
        gradients.append(torch.autograd.grad(logits.square().sum(), list(made.parameters())))
    testing.assert_close(losses[0], losses[1], "the twin's logits")
    testing.assert_close(gradients[0], gradients[1], "the twin's gradients")


@every_exact
def test_gradients_flow_through_a_cache(policy, tokens):
    made = planned(model(injection="add"), torch.randint(1, 6, (3, 64)), policy)
    whole = made(tokens, use_cache=False).logits
    logits, _ = pieces(made, tokens, None, [3, 4, 8])
    for one, other in zip(
        torch.autograd.grad(logits.square().sum(), list(made.parameters())),
        torch.autograd.grad(whole.square().sum(), list(made.parameters())),
        strict=True,
    ):
        testing.assert_close(one, other, "gradients through the past")


@every_policy
@pytest.mark.parametrize("exits", ["last", "every"])
def test_tokens_that_stop_apart_are_taught_alike_however_it_is_run(policy, exits, tokens):
    """Executions, steps that are run again, and windows as long as the loop: one loss, one gradient."""
    made = model(injection="add", exits=exits)
    table = torch.randint(1, 6, (3, 64))
    expected = None
    for run, rule, again in [
        (execute.Unrolled(), grad.Full(), False),
        (LEAVING, grad.Full(), False),
        (execute.Eager(), grad.Full(), True),
        (LEAVING, grad.Full(), True),
        (LEAVING, grad.Truncated(5), True),
    ]:
        made = planned(made, table, policy, run).train()
        made.loop = made.loop.replace(grad=rule)
        made.activation_checkpointing_enable() if again else made.activation_checkpointing_disable()
        loss = made(tokens, labels=tokens).loss
        got = (loss.detach(), torch.autograd.grad(loss, list(made.parameters())))
        expected = got if expected is None else expected
        testing.assert_close(got, expected, f"{run} {rule} {again}")


@torch.no_grad()
def test_exact_is_the_plain_loop(tokens):
    """Where nothing is kept and nobody shares, the loop stands as it is; and all agree where depths are equal."""
    made = planned(model(), torch.full((1, 64), 3), lm.Exact())
    logits = [planned(made, torch.full((1, 64), 3), policy)(tokens).logits for policy in (lm.Exact(), lm.Latest())]
    made.loop = made.loop.replace(halt=halt.Never(), max_steps=3)
    testing.assert_close(logits[0], made(tokens, use_cache=False).logits, "a stop at the bound is none")
    testing.assert_close(logits[1], logits[0], "equal depths need no policy")


@torch.no_grad()
def test_policies_differ_where_they_say_so(tokens):
    table = torch.randint(1, 6, (1, 64))
    made = model(injection="add")
    whole = {policy: planned(made, table, policy)(tokens).logits for policy in POLICIES}
    for one, other in [(lm.Exact(), lm.Latest()), (lm.Latest(), lm.First())]:
        assert (whole[one] - whole[other]).abs().max() > 1e-3
    parts, _ = pieces(planned(made, table, lm.Last()), tokens, None, [2, 5])
    assert (parts - whole[lm.Last()]).abs().max() > 1e-3, "Last is not exact, and says so"
    assert not lm.Last().exact


@every_policy
@torch.no_grad()
def test_what_a_token_takes(policy, tokens):
    made = planned(model(), torch.full((1, 64), 5), policy)
    cache = made(tokens).past_key_values
    one = 2 * 2 * 4 * 4  # keys and values, heads, features, bytes
    assert cache.bytes_per_token == one * (2 + 2 * policy.slots(5))


@every_exact
@torch.no_grad()
def test_more_and_fewer_steps_than_configured(policy, tokens):
    made = model(injection="add")
    made.policy = policy
    for steps in (1, 3, 9):
        whole = made(tokens, max_steps=steps, use_cache=False)
        logits, cache = pieces(made, tokens, None, [4, 5, 6], max_steps=steps)
        testing.assert_close(logits, whole.logits, f"{steps} steps")
        assert (cache.steps == steps).all() and made.config.steps == 5


@every_policy
@torch.no_grad()
def test_depths_that_change_between_calls(policy, tokens):
    """A token that takes more steps than any before sees the latest of those before."""
    made = model(injection="add")
    made.policy = policy
    shallow = made(tokens[:, :6], max_steps=2)
    deep = made(tokens[:, 6:], past_key_values=shallow.past_key_values, max_steps=7)
    assert deep.past_key_values.steps.tolist() == [[2] * 6 + [7] * 4] * 3 and deep.logits.isfinite().all()
    if policy != lm.Exact():  # whose steps beyond the bound are not made from the state it stopped in
        table = torch.tensor([[2] * 6 + [7] * 58])
        expected = planned(made, table, policy)(tokens, max_steps=9, use_cache=False).logits
        if policy.exact:
            testing.assert_close(deep.logits, expected[:, 6:], "as if the depths had been planned")


@torch.no_grad()
def test_exact_goes_on_to_the_deepest_step_seen(tokens):
    made = planned(model(injection="add"), table := torch.tensor([[1] * 6 + [7] * 58]), lm.Exact())
    logits, cache = pieces(made, tokens, None, [3, 6], max_steps=7)
    testing.assert_close(logits, made(tokens, max_steps=7, use_cache=False).logits, "frozen states go on")
    made.loop = made.loop.replace(halt=ByPosition(torch.ones_like(table)))
    more = made(tokens, past_key_values=cache, attention_mask=torch.ones(3, 20), max_steps=1)
    assert all(slot.length == 20 for slot in cache.filled()) and (more.steps == 1).all()


@every_exact
@torch.no_grad()
def test_rewind(policy, tokens):
    made = planned(model(injection="add"), torch.randint(1, 6, (3, 64)), policy)
    straight, _ = pieces(made, tokens, None, [4, 7])
    _, cache = pieces(made, torch.cat((tokens[:, :4], tokens.flip(1)), 1), None, [4, 7, 9])
    cache.crop(-10)
    assert cache.get_seq_length() == 4 and cache.steps.shape == (3, 4)
    logits = [made(tokens[:, a:b], past_key_values=cache).logits for a, b in ((4, 7), (7, 10))]
    testing.assert_close(torch.cat(logits, 1), straight[:, 4:], "as if the other text had not been read")
    cache.crop(0)
    cache.reset()
    planned(made, torch.full((1, 64), 2), policy)(tokens[:1], past_key_values=cache)
    assert cache.steps.tolist() == [[2] * 10], "another batch begins"


@every_policy
@torch.no_grad()
def test_beams_are_followed(policy, tokens):
    made = planned(model(injection="add"), torch.randint(1, 6, (1, 64)), policy)
    order = torch.tensor([2, 0, 0, 1])
    cache = made(tokens[:, :6]).past_key_values
    other = made(tokens[order, :6]).past_key_values
    cache.reorder_cache(order)
    after = [made(tokens[order, 6:7], past_key_values=one).logits for one in (cache, other)]
    testing.assert_close(after[0], after[1], "rows in another order")
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 7]))
    assert cache.batch_size == 2 and cache.steps.shape == (2, 7)
    some_rows = made(tokens[order, 7:8][[0, 3]], past_key_values=cache).logits
    whole = made(tokens[order, 7:8], past_key_values=other).logits
    testing.assert_close(some_rows, whole[[0, 3]], "rows that were kept")


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing(tokens):
    made = planned(model(injection="add"), torch.full((1, 64), 2), lm.Latest())
    cache = made(tokens[:, :4]).past_key_values
    good = made.loop
    made.loop = good.replace(halt=halt.Never(), max_steps=5)
    with pytest.raises(FloatingPointError, match="the state must be finite"):
        made(inputs_embeds=torch.full((3, 2, 16), float("nan")), past_key_values=cache)
    made.loop = good
    logits = made(tokens[:, 4:], past_key_values=cache).logits
    testing.assert_close(logits, made(tokens).logits[:, 4:], "the failed pass is forgotten")


@torch.no_grad()
def test_rows_that_are_left_are_views_where_they_stand_together(tokens):
    cache = model()(tokens).past_key_values
    view = cache.view(1, 3)
    beside, apart = view.among(torch.tensor([1, 2])), view.among(torch.tensor([0, 2]))
    whole = cache.once[0].part(0, 10)[0]
    assert beside.chosen(whole).data_ptr() == whole[1:].data_ptr() and apart.span is None
    assert torch.equal(apart.chosen(whole), whole[[0, 2]])
    assert beside.among(torch.tensor([1])).rows.tolist() == [2]
    copies = [apart.chosen(whole, "keys").data_ptr() for _ in range(2)]
    assert copies[0] == copies[1] == cache.spare["keys"].data_ptr(), "one buffer serves all steps"
    with torch.enable_grad():
        assert apart.chosen(whole, "keys").data_ptr() != copies[0], "a graph may hold what it has seen"


@torch.no_grad()
def test_a_new_token_copies_no_past(tokens):
    made = model()
    cache = made(tokens).past_key_values
    places = [slot.buffers[0].data_ptr() for slot in cache.filled()]
    for _ in range(20):
        made(tokens[:, :1], past_key_values=cache)
    assert places == [slot.buffers[0].data_ptr() for slot in cache.filled()]


def test_a_context_may_hold_things_that_know_their_rows():
    class Thing:
        def among(self, index):
            return index.tolist()

    assert tree.among(torch.tensor([2, 0]), {"x": torch.zeros(3, 1), "thing": Thing()}, 3)["thing"] == [2, 0]
    with pytest.raises(TypeError, match="got object in 'thing'. Pass a mapping, give it a method `among"):
        tree.among(torch.tensor([0]), {"thing": object()}, 3)


def test_errors(tokens):
    made = model()
    with pytest.raises(TypeError, match=r"past_key_values must be a LoopCache, got DynamicCache\. A model with a loop"):
        made(tokens, past_key_values=DynamicCache())
    cache = made(tokens).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values must hold 2 sequences, got 3\. Start from a new cache"):
        made(tokens[:2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask must cover 10 past and 10 new tokens, got 10\. Append"):
        made(tokens, past_key_values=cache, attention_mask=torch.ones_like(tokens))
    made.train().activation_checkpointing_enable()
    with pytest.raises(
        ValueError, match=r"use_cache must be False where steps are run again .*, got a cache\. Leave it"
    ):
        made(tokens, use_cache=True)
    for number in (1, -11):
        with pytest.raises(ValueError, match=rf"tokens_to_remove must be from -10 to 0, got {number}"):
            cache.crop(number)
    with pytest.raises(LookupError, match=r"a state must be read while the loop .* runs, got none running\. Use model"):
        made.predict(torch.zeros(1, 1, 16))


def test_a_cache_shows_itself():
    assert repr(lm.LoopCache()) == "LoopCache(policy=Latest(), length=0, batch=0, depth=0)"
    assert lm.LoopCache().batch_size == -1 and not lm.LoopCache().is_initialized
    assert base("gpt2")["n_layer"] == 4 and execute.Compacted().gathers
