"""Self-speculative decoding: the tokens of plain decoding, or their distribution, in fewer passes in a row."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from transformers import StoppingCriteriaList

from loopaware import execute, halt, readout
from loopaware.lm import Exact, ExitGate, First, Last, Latest, LoopCache
from loopaware.lm.frame import looped
from loopaware.lm.operations import counter
from loopaware.lm.rejection import Sampling, instead, kept_chance
from loopaware.lm.speculative import Speculated, Speculative, joined, reopen
from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM
from loopaware.recipes import speculative

VOCABULARY = 13
BASES = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3, "bos_token_id": None, "eos_token_id": None},
}
BASES["mistral"] = BASES["llama"] | {"num_key_value_heads": 1, "sliding_window": 4}
HALTING = {
    "KL": lambda model: halt.KL(model.predict, 0.05),
    "converged": lambda model: halt.Converged(rtol=0.3),
    "patience": lambda model: halt.Patience(halt.Converged(rtol=0.4), 2),
}


def made(kind="llama", **options):
    torch.manual_seed(0)
    base = {"model_type": kind, "vocab_size": VOCABULARY, "initializer_range": 0.3, "eos_token_id": None} | BASES[kind]
    vocabulary = options.pop("vocabulary", VOCABULARY)
    config = {"prelude": 1, "core": 1, "coda": 1, "steps": 5, "injection": "add"} | options
    return LoopedForCausalLM(LoopedConfig(base=base | {"vocab_size": vocabulary}, **config)).double().eval()


def agreeing(**options):
    """A model whose loop changes nothing: one step says what all say."""
    model = made(injection="none", **options)
    with torch.no_grad():
        for name, weight in model.loop.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    return model


def prompt(batch=1, length=7):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def padded(batch=5, length=7):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, :3] = mask[3, :1] = 0
    return prompt(batch, length) * mask, mask


def greedy(model, tokens, rule=None, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(tokens, custom_generate=rule, **options)


@pytest.mark.parametrize("ahead", [1, 3, 6])
@pytest.mark.parametrize("few", [1, 2, 4])
@pytest.mark.parametrize("kind", BASES)
def test_greedy_tokens_are_those_of_plain_decoding(kind, few, ahead):
    model, seen = made(kind), []
    state = torch.get_rng_state()
    assert torch.equal(greedy(model, prompt(), Speculative(few, ahead, seen.append)), greedy(model, prompt()))
    assert torch.equal(state, torch.get_rng_state())
    assert seen[0].tokens == 20 and 0 < seen[0].accepted <= seen[0].drafted
    assert seen[0].share < 1 or few > 1 or kind == "gpt2"


def same_caches(new, old, real):
    """Keys and values of real places, up to where the new one ends. Shapes: real (B, T) bool.

    What a rule read of stopped tokens is left out under Exact: there it depends on how many are read at once.
    """
    assert 0 < new.length <= old.length
    real = real[:, : new.length]
    assert torch.equal(new.steps[real], old.steps[:, : new.length][real])
    slots = [(new.once[layer], slot) for layer, slot in old.once.items()]
    for layer, kept in old.looped.items():
        if layer not in old.once or not old.policy.frozen:
            slots += zip(new.looped[layer], kept, strict=False)
    for one, other in slots:
        for fresh, kept in zip(one.part(0, new.length), other.part(0, new.length), strict=True):
            torch.testing.assert_close(fresh.transpose(1, 2)[real], kept.transpose(1, 2)[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("end", [None, 4])
@pytest.mark.parametrize("kind", BASES)
def test_in_a_padded_batch_every_sequence_keeps_its_own_number(kind, end):
    """Sequences end apart, some by eos; the cache that is returned is that of plain decoding, up to the first end."""
    model, (tokens, mask) = made(kind), padded()
    options = {"attention_mask": mask, "eos_token_id": end, "return_dict_in_generate": True}
    plain, drafted = (greedy(model, tokens, rule, **options) for rule in (None, Speculative(2, 3)))
    assert torch.equal(drafted.sequences, plain.sequences)
    written = plain.sequences[:, 7:] != 0 if end else torch.ones(5, 20, dtype=torch.bool)
    assert drafted.past_key_values.length == 7 + int(written.sum(1).min()) - 1
    same_caches(drafted.past_key_values, plain.past_key_values, torch.cat((mask.bool(), written), 1))


def test_a_batch_equals_its_sequences_alone_and_goes_on_from_its_cache():
    model, (tokens, mask) = made(), padded()
    first = greedy(model, tokens, Speculative(1, 4), attention_mask=mask, return_dict_in_generate=True)
    for row in range(len(tokens)):
        alone = greedy(model, tokens[row : row + 1, mask[row].bool()], Speculative(1, 4))
        assert torch.equal(first.sequences[row, 7:], alone[0, -20:])
    more = {"attention_mask": torch.cat((mask, mask.new_ones(5, 20)), 1), "past_key_values": first.past_key_values}
    again = greedy(model, first.sequences, Speculative(2, 2), **more)
    assert torch.equal(again, greedy(model, tokens, attention_mask=mask, max_new_tokens=40))


@pytest.mark.parametrize("rule", HALTING)
@pytest.mark.parametrize("policy", ["latest", "exact", "first"])
@pytest.mark.parametrize("batch", [1, 5])
def test_tokens_that_stop_in_the_draft_or_behind_it_leave_the_same_keys_and_values(rule, policy, batch):
    model, (tokens, mask) = made(steps=8, policy=policy), padded()
    if batch == 1:
        tokens, mask = tokens[:1], mask[:1]
    model.loop = model.loop.replace(halt=HALTING[rule](model), execute=execute.Compacted(break_even=0))
    options = {"attention_mask": mask, "return_dict_in_generate": True}
    plain = greedy(model, tokens, **options)
    assert len(plain.past_key_values.steps.unique()) > 1
    for few in (1, 3):
        drafted = greedy(model, tokens, Speculative(few, 3), **options)
        assert torch.equal(drafted.sequences, plain.sequences)
        real = torch.cat((mask.bool(), torch.ones(batch, 20, dtype=torch.bool)), 1)
        same_caches(drafted.past_key_values, plain.past_key_values, real)


@pytest.mark.parametrize(
    "options",
    [
        {"injection": "concat", "start": "noise"},
        {"injection": "diagonal", "start": "zeros"},
        {"prelude": 0, "core": 3, "coda": 0},
    ],
)
def test_starts_and_injections(options):
    model = made(**options)
    assert torch.equal(greedy(model, prompt(2), Speculative(2, 3)), greedy(model, prompt(2)))


def test_soft_weights_and_gates():
    model = made(exits="gate", threshold=0.6)
    assert isinstance(model.loop.halt, ExitGate)
    assert torch.equal(greedy(model, prompt(3), Speculative(1, 3)), greedy(model, prompt(3)))
    soft = halt.StickBreaking(halt.Linear(16).double())
    model.loop = model.loop.replace(halt=soft, readout=readout.Weighted())
    assert torch.equal(greedy(model, prompt(3), Speculative(1, 3)), greedy(model, prompt(3)))


def test_prompts_of_one_token_and_other_steps():
    model = made()
    for steps, length in product((3, 9), (1, 4)):
        plain = greedy(model, prompt(2, length), max_steps=steps)
        assert torch.equal(greedy(model, prompt(2, length), Speculative(2, 3), max_steps=steps), plain)
    assert greedy(model, prompt(), Speculative(), max_new_tokens=1).shape == (1, 8)


def test_processors_look_at_each_text_and_criteria_end_it():
    model, (tokens, mask) = made(), padded()
    options = {"attention_mask": mask, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "eos_token_id": [4, 7]}
    assert torch.equal(greedy(model, tokens, Speculative(2, 4), **options), greedy(model, tokens, **options))
    plain = greedy(model, prompt())
    third = plain[0, 9]

    def seen(text, scores, **_):
        return text[:, -1] == third

    ended = greedy(model, prompt(), Speculative(4, 6), stopping_criteria=StoppingCriteriaList([seen]))
    assert torch.equal(ended, plain[:, : ended.shape[1]]) and ended[0, -1] == third and ended.shape[1] <= 10


def test_the_rule_leaves_the_distribution_as_it_is():
    """Every way that two drafts can be kept or refused, added up in float64: the joint chances are those of p alone."""
    random = torch.Generator().manual_seed(0)
    symbols = 4
    sizes = [(symbols,) * number for number in (1, 2, 3)]
    p, q = ([torch.rand(size, generator=random, dtype=torch.float64).pow(3) for size in sizes] for _ in "pq")
    p[0][1] = q[0][2] = q[1][0, 3] = 0.0
    p, q = ([each / each.sum(-1, keepdim=True) for each in chances] for chances in (p, q))
    found = torch.zeros(symbols, symbols, dtype=torch.float64)
    for x, y in product(range(symbols), repeat=2):
        way = q[0][x] * q[1][x, y]
        if way == 0:
            continue
        quick = torch.stack((q[0], q[1][x]))[None]
        full = torch.stack((p[0], p[1][x], p[2][x, y]))[None]
        kept = kept_chance(torch.tensor([[x, y]]), quick, full)[0]
        other = instead(quick, full)[0]
        torch.testing.assert_close(other.sum(-1), torch.ones(3, dtype=torch.float64))
        assert torch.equal(other[2], p[2][x, y])
        found[x, y] += way * kept[0] * kept[1]
        found[x] += way * kept[0] * (1 - kept[1]) * other[1]
        found += way * (1 - kept[0]) * other[0][:, None] * p[1]  # the next is a round of its own
    torch.testing.assert_close(found, p[0][:, None] * p[1], rtol=1e-12, atol=1e-14)


def test_equal_distributions_keep_every_draft():
    chances = torch.tensor([[0.2, 0.3, 0.5]]).expand(2, 3, 3)
    draft = torch.tensor([[0, 1], [2, 2]])
    assert (kept_chance(draft, chances[:, :2], chances) == 1).all()
    assert torch.equal(instead(chances[:, :2], chances), chances)
    count, tokens = Sampling([], True).verified(draft, chances[:, :2], chances)
    assert count.tolist() == [2, 2] and torch.equal(tokens[:, :2], draft)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 4}])
def test_the_first_two_tokens_are_distributed_as_by_plain_sampling(options):
    """Chi-square of 4000 draws against exact chances: within its 0.999 quantile, and the drafts' own far outside."""
    model, tokens, count, symbols = made(vocabulary=5), prompt() % 4 + 1, 4000, 5
    seen = []
    torch.manual_seed(1)
    settings = {"do_sample": True, "pad_token_id": 0, "max_new_tokens": 3, "top_k": 0} | options
    drawn = model.generate(tokens.expand(count, -1), custom_generate=Speculative(1, 2, seen.append), **settings)
    counts = torch.zeros(symbols, symbols).index_put((drawn[:, 7], drawn[:, 8]), torch.ones(count), accumulate=True)

    def off(steps):
        expected = joint(model, tokens, steps, **options) * count
        some = expected > 0
        assert not counts[~some].any()
        return ((counts - expected)[some].square() / expected[some]).sum(), int(some.sum()) - 1

    (right, degrees), (quick, _) = off(5), off(1)
    assert right < {24: 51.2, 15: 37.7}[degrees]
    assert quick > 5 * right and 0.2 < seen[0].share < 0.95


def joint(model, tokens, steps, temperature=1.0, top_k=5):
    """The chances of the next two tokens."""

    def chances(text):
        logits = model(text, max_steps=steps).logits[:, -1].float() / temperature
        least = logits.topk(top_k).values[:, -1:]
        return logits.masked_fill(logits < least, -torch.inf).softmax(-1)

    with torch.no_grad():
        first = chances(tokens)[0]
        second = chances(torch.cat((tokens.expand(5, -1), torch.arange(5)[:, None]), 1))
    return first[:, None] * second


def test_where_drafts_agree_each_step_is_run_once_and_passes_are_fewer():
    model, seen = agreeing(steps=8), []
    few, ahead, new = 2, 4, 20
    rule = Speculative(few, ahead, seen.append)
    assert torch.equal(greedy(model, prompt(), rule), greedy(model, prompt()))
    did = seen[0]
    assert did == Speculated(new, 4, 4 * ahead, 4 * ahead, 4 * ((ahead + 1) * few + 8 - few), new * 8)
    assert did.share == 1.0 and did.passes == 64 < new * 8

    with counter() as plain:
        greedy(model, prompt())
    with counter() as drafted:
        greedy(model, prompt(), rule)
    coda = sum(weight.numel() for part in (model.coda, model.lm_head) for weight in part.parameters())
    extra = drafted.get_total_flops() - plain.get_total_flops()
    assert 0 < extra < 3 * did.drafted * coda  # what drafts read: coda and head, two operations a weight, and attention


def test_refused_drafts_are_counted():
    model, seen = made(steps=6), []
    greedy(model, prompt(), Speculative(1, 3, seen.append))
    did = seen[0]
    assert did.ran == 6 * (did.rounds + did.drafted)  # the newest token and each draft, all steps
    assert did.tokens == did.accepted + did.rounds
    assert Speculated().share == 0.0


def test_sequences_that_have_ended_are_not_run():
    model, tokens, seen = made(), prompt(3), []
    model.loop = model.loop.replace(execute=execute.Compacted(break_even=0))
    first = greedy(model, tokens)[0, 7].item()
    rule = Speculative(1, 2, seen.append)
    out = greedy(model, tokens, rule, eos_token_id=first)
    assert torch.equal(out, greedy(model, tokens, eos_token_id=first)) and (out[0, 8:] == 0).all()
    whole = 5 * (seen[0].drafted + seen[0].rounds * len(tokens))
    assert 0 < seen[0].ran < whole


def test_a_carry_of_tokens_goes_on_as_each_would():
    model, tokens = made(), prompt(2, 3)
    cache = LoopCache(Latest())
    with torch.no_grad():
        whole = model(tokens)
        parts = []
        for place in range(3):
            context, outside, real = model.surroundings(tokens[:, place : place + 1], None, None, cache, True)
            out = looped(model.loop, context, real, 2)
            model.behind(out.value, outside)
            cache.commit(outside.cache.run, out.steps)
            parts.append(out.carry)
        both = joined(parts)
    assert both.index == 2 and both.steps.tolist() == [[2] * 3] * 2 and both.state.shape == (2, 3, 16)
    reopen(cache, 2, 2)
    assert cache.length == 1 and cache.steps.shape == (2, 1)
    assert [slot.length for slot in cache.looped[1]] == [3, 3] and whole.steps.tolist() == [[5] * 3] * 2


@pytest.mark.parametrize(
    ("rule", "options", "error"),
    [
        (Speculative(5), {}, "draft_steps must be below the 5 steps of the model, got 5. Take fewer"),
        (Speculative(2), {"max_steps": 2}, "draft_steps must be below the 2 steps"),
        (Speculative(), {"use_cache": False}, "past_key_values must be a LoopCache, got None. Speculation needs"),
        (Speculative(), {"past_key_values": LoopCache(Last())}, r"policy must be exact, got Last\(\)\. What"),
        (Speculative(), {"output_scores": True, "return_dict_in_generate": True}, "output_scores must be left out"),
        (Speculative(), {"num_beams": 2}, "num_beams must be left out, got 2"),
        (Speculative(), {"guidance_scale": 1.5}, "logits_processor must be without memory .* got Unbatched"),
        (Speculative(), {"prefix_allowed_tokens_fn": lambda row, text: [1]}, "logits_processor must .* got PrefixCons"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(rule, options, error):
    with pytest.raises(ValueError, match=error):
        greedy(made(), prompt(2), rule, **options)


def test_allowed_tokens_of_one_sequence():
    model, options = made(), {"prefix_allowed_tokens_fn": lambda row, text: [1, 2, 3]}
    assert torch.equal(greedy(model, prompt(), Speculative(), **options), greedy(model, prompt(), **options))


def test_other_refusals():
    model = made()
    with pytest.raises(ValueError, match="inputs_embeds must be None, got embeddings. Speculation reads token ids"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 16).double(), custom_generate=Speculative(), max_new_tokens=2)
    model.loop = model.loop.replace(rows=1)
    with pytest.raises(ValueError, match="rows of the loop must be 2, got 1. Each token goes on"):
        greedy(model, prompt(), Speculative())
    with pytest.raises(ValueError, match="draft_steps must be at least 1, got 0. Drafts are made by the loop"):
        Speculative(0)
    with pytest.raises(ValueError, match="tokens_ahead must be at least 1, got 0. Without a draft"):
        Speculative(1, 0)


def test_policies_of_the_cache_that_is_given():
    model = made()
    for policy in (Exact(), First()):
        caches = [LoopCache(policy) for _ in "ab"]
        plain, drafted = (
            greedy(model, prompt(2), rule, past_key_values=cache)
            for rule, cache in zip((None, Speculative(2, 2)), caches, strict=True)
        )
        assert torch.equal(plain, drafted)


TINY = {
    "draft_steps": (1, 2),
    "ahead": (2,),
    "steps": 3,
    "dim": 16,
    "heads": 2,
    "batches": 2,
    "batch": 2,
    "context": 10,
}
TINY |= {"new": 6, "repeats": 2}


def test_bench_speculative_end_to_end(tmp_path, capsys):
    speculative.run(tmp_path, **TINY)
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(line["how"], line["draft_steps"]) for line in result["lines"]] == [
        ("greedy", 1),
        ("greedy", 2),
        ("sampled", 1),
        ("sampled", 2),
    ]
    assert len(result["exits"]) == 3 and all(3 <= line["steps"] <= 9 for line in result["lines"])
    assert all(line["passes"] <= 2 * line["draft_steps"] + 3 for line in result["lines"])


def test_bench_speculative_reports_nothing_if_tokens_are_others(tmp_path, monkeypatch):
    plain = speculative.generated

    def wrong(model, prompt, rule, how, new):
        return plain(model, prompt, rule, how, new) + (rule is not None and rule.draft_steps == 2)

    monkeypatch.setattr(speculative, "generated", wrong)
    with pytest.raises(ValueError, match="greedy tokens must be those of plain decoding, got others with Speculative"):
        speculative.run(tmp_path, **TINY)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0. Medians need at least one run"):
        speculative.run(tmp_path, **TINY | {"repeats": 0})
