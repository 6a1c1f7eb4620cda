"""Generation: exits row by row that save work, beams, padding, speculation, and whatever else `generate` asks for."""

from __future__ import annotations

import warnings

import pytest
import torch

from loopaware import execute, halt, lm, testing
from loopaware.lm.operations import counter
from looped import EXACT, VOCABULARY, model, pieces, planned

every_exact = pytest.mark.parametrize("policy", EXACT, ids=str)

NEW = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (3, 7))


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randint(1, 6, (1, 64))


def left_padded(tokens: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    length = tokens.shape[1]
    mask = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask.long()


RULES = {
    "KL": lambda made: halt.KL(made.predict, 2e-3),
    "Entropy": lambda made: halt.Entropy(made.predict, 2.8),
    "Confidence": lambda made: halt.Confidence(made.predict, 0.2),
    "Patience": lambda made: halt.Patience(halt.KL(made.predict, 5e-3), times=2),
    "Converged": lambda made: halt.Converged(rtol=0.17),
    "ExitGate": lambda made: made.loop.halt,
}


def leaving(name: str, policy=None):
    """A model with a rule by which tokens leave at different steps."""
    options = {"exits": "gate", "threshold": 0.5} if name == "ExitGate" else {}
    made = model(steps=12, injection="add", start="zeros", more={"initializer_range": 0.3}, **options)
    made.policy = lm.Latest() if policy is None else policy
    made.loop = made.loop.replace(halt=RULES[name](made), execute=execute.Compacted(break_even=0))
    return made


@pytest.mark.parametrize("name", RULES)
def test_exits_of_a_batch_are_those_of_its_sequences(name):
    """16 padded prompts with sampling off: tokens, steps and logits of each are those of the prompt alone."""
    made = leaving(name)
    lengths = [1, 3, 7, 6, 5, 4, 2, 7, 3, 3, 6, 1, 2, 7, 5, 4]
    tokens, mask = left_padded(torch.randint(1, VOCABULARY, (16, 7)), lengths)
    cache = lm.LoopCache(made.policy)
    out = made.generate(
        tokens, attention_mask=mask, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **NEW
    )
    steps = cache.steps[:, 7:]
    assert len(steps.unique()) > 1 and steps.float().mean() < 11, "rows leave, and not all at once"
    for row, length in enumerate(lengths):
        own = lm.LoopCache(made.policy)
        alone = made.generate(
            tokens[row : row + 1, 7 - length :],
            past_key_values=own,
            output_logits=True,
            return_dict_in_generate=True,
            **NEW,
        )
        assert torch.equal(alone.sequences[0, length:], out.sequences[row, 7:])
        assert torch.equal(own.steps[0], cache.steps[row, 7 - length :])
        both = [torch.stack(one.logits)[:, place] for one, place in ((alone, 0), (out, row))]
        testing.assert_close(both[0], both[1], "batch N equals batch 1")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("policy", [lm.Latest(), lm.Exact()], ids=str)
@torch.no_grad()
def test_rules_stop_in_pieces_as_at_once(name, policy, tokens):
    """What a rule reads through the coda depends on how deep earlier tokens were at that step, not on the pieces."""
    made = leaving(name, policy)
    whole = made(tokens, use_cache=False)
    logits, cache = pieces(made, tokens, None, [2, 3, 4, 6])
    assert len(whole.steps.unique()) > 1
    assert torch.equal(cache.steps, whole.steps)
    testing.assert_close(logits, whole.logits, "in pieces as at once")


def test_operations_are_those_of_the_exits():
    """16 rows that leave by themselves: the counter of operations shows the sum over rows, not the slowest row's."""
    for name in ("KL", "Entropy", "ExitGate"):
        made = leaving(name)
        tokens = torch.randint(1, VOCABULARY, (16, 5))
        with counter() as prefill, torch.no_grad():
            made(tokens, past_key_values=lm.LoopCache(made.policy), logits_to_keep=1)
        cache = lm.LoopCache(made.policy)
        with counter() as all_of_it:
            made.generate(tokens, past_key_values=cache, **NEW | {"do_sample": True})
        steps = cache.steps[:, 5:]
        assert steps.shape == (16, 5)
        cost, keys = lm.token_cost(made), torch.arange(6, 11)
        spent = all_of_it.get_total_flops() - prefill.get_total_flops()
        expected = cost.operations(steps, keys).sum().item()
        slowest = cost.operations(steps.amax(0).expand_as(steps), keys).sum().item()
        assert abs(spent / expected - 1) < 0.02, f"{name}: {spent} operations, {expected} by the exits"
        assert spent < 0.8 * slowest, f"{name}: {spent} operations, {slowest} if all waited for the slowest"


@torch.no_grad()
def test_tokens_that_were_stepped_are_counted(tokens, table):
    made = planned(model(), table, lm.Latest())
    cache = lm.LoopCache()
    for place in range(7):
        made(tokens[:, place : place + 1], past_key_values=cache)
    assert cache.ran == cache.steps.sum() == 3 * table[0, :7].sum()
    assert lm.token_cost(made).operations(torch.tensor([[0, 1]]))[0, 0] == 0, "padding costs nothing"
    cache = lm.LoopCache(lm.Exact())
    for place in range(7):
        made(tokens[:, place : place + 1], past_key_values=cache)
    assert cache.ran == 3 * 7 * 5, "the exact law costs every step"


@every_exact
def test_greedy_is_the_argmax_of_whole_passes(policy, tokens, table):
    made = planned(model(injection="add"), table, policy)
    padded, mask = left_padded(tokens, [7, 4, 1])
    out = made.generate(padded, attention_mask=mask, **NEW)
    text, real = padded, mask
    for _ in range(6):
        with torch.no_grad():
            following = made(text, attention_mask=real, use_cache=False).logits[:, -1].argmax(-1)
        text = torch.cat((text, following[:, None]), 1)
        real = torch.cat((real, torch.ones(3, 1, dtype=torch.long)), 1)
    assert torch.equal(out, text)


@every_exact
def test_beam_search_with_and_without_a_cache(policy, tokens, table):
    made = planned(model(injection="add"), table, policy)
    padded, mask = left_padded(tokens, [7, 3, 5])
    options = NEW | {"num_beams": 4, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    cached = made.generate(padded, attention_mask=mask, **options)
    plain = made.generate(padded, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    testing.assert_close(cached.sequences_scores, plain.sequences_scores, "the beams' scores")
    assert cached.past_key_values.steps.shape == (12, 12)


@every_exact
def test_steps_are_an_option_of_a_call(policy, tokens):
    made = model(injection="add")
    made.policy = policy
    texts = {}
    for steps in (1, 5, 9):
        texts[steps] = made.generate(tokens, max_steps=steps, **NEW)
        assert torch.equal(texts[steps], made.generate(tokens, max_steps=steps, use_cache=False, **NEW))
    assert torch.equal(texts[5], made.generate(tokens, **NEW))


def test_ways_of_generating_agree(tokens, table):
    made = planned(model(injection="add"), table, lm.Latest())
    text = made.generate(tokens[:1], **NEW)
    assert torch.equal(made.generate(tokens[:1], prompt_lookup_num_tokens=2, **NEW), text)
    assert torch.equal(made.generate(tokens[:1], prefill_chunk_size=3, **NEW), text)
    embedded = made.get_input_embeddings()(tokens[:1]).detach()
    assert torch.equal(made.generate(inputs_embeds=embedded, **NEW), text[:, 7:])
    half = made.generate(tokens[:1], return_dict_in_generate=True, **NEW | {"max_new_tokens": 3})
    more = NEW | {"max_new_tokens": 3}
    assert torch.equal(made.generate(half.sequences, past_key_values=half.past_key_values, **more), text)


@pytest.mark.parametrize(
    "more", [{}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}], ids=str
)
@pytest.mark.parametrize("kind", ["eager", "flex_attention"])
@torch.no_grad()
def test_attention_interfaces_agree(kind, more, tokens, table):
    padded, mask = left_padded(tokens, [7, 3, 5])
    logits = []
    for implementation in ("sdpa", kind):
        size = {"hidden_size": 64, "head_dim": 16}  # flex attention wants no smaller heads
        made = planned(model("qwen3", more=size | more), table, lm.Latest())
        made.set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            logits.append(pieces(made, padded, mask, [3, 4, 6])[0][mask.bool()])
            whole = made(padded, attention_mask=mask, use_cache=False).logits[mask.bool()]
        testing.assert_close(logits[-1], whole, "in pieces as at once")
    testing.assert_close(logits[1], logits[0], f"{kind} is sdpa")


@torch.no_grad()
def test_half_precision(tokens, table):
    made = planned(model(injection="concat", start="noise", noise=0.5), table, lm.Latest()).to(torch.bfloat16)
    logits, _ = pieces(made, tokens, None, [3, 4])
    testing.assert_close(logits, made(tokens, use_cache=False).logits, "in bfloat16")


def test_a_cache_of_another_kind_is_refused(tokens):
    with pytest.raises(ValueError, match=r"cache_implementation must be None for a model with a loop, got 'static'"):
        model().generate(tokens, cache_implementation="static", **NEW)


def test_generate_begins_with_the_policy_of_the_model(tokens):
    made = model(policy="first")
    assert made.generate(tokens, return_dict_in_generate=True, **NEW).past_key_values.policy == lm.First()
    cache = lm.LoopCache(lm.Exact())
    out = made.generate(tokens, return_dict_in_generate=True, past_key_values=cache, **NEW)
    assert out.past_key_values is cache and cache.steps.shape == (3, 12)
