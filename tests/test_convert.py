"""Dense models become looped ones: the same at one loop, the same where layers are tied at full rank, written whole."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import loopaware
from loopaware import cli, convert, halt, train
from loopaware.models.looped_encoder import LoopedEncoder, LoopedForMaskedLM
from loopaware.models.looped_lm import LoopedForCausalLM
from loopaware.models.relaxed_lm import RelaxedConfig, RelaxedForCausalLM
from loopaware.recipes import retrofit

LAYERS, VOCABULARY = 5, 31
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24}
SMALL |= {"num_attention_heads": 4, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
ENDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=6),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3),
    "smollm3": SmolLM3Config(**SMALL, num_key_value_heads=2, no_rope_layers=[1, 0, 1, 1, 0], **ENDS),
    "olmo": OlmoConfig(**SMALL, **ENDS),
    "olmo2": Olmo2Config(**SMALL, **ENDS),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_head=4, n_layer=LAYERS, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
INJECTIONS = ("none", "add", "concat", "gated", "diagonal")
SPLIT = convert.Split.of(range(LAYERS), 1, 3, 1)
every_family = pytest.mark.parametrize("family", CONFIGS)
TOKENS = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] * 6 + [0]])
STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260k"


def dense(family: str = "llama", seed: int = 0) -> Any:
    """A model whose norms and biases are no ones and zeros."""
    torch.manual_seed(seed)
    return shaken(AutoModelForCausalLM.from_config(CONFIGS[family]))


def bert(headed: bool = True) -> Any:
    torch.manual_seed(0)
    return shaken((AutoModelForMaskedLM if headed else AutoModel).from_config(BertConfig(**SMALL)))


@torch.no_grad()
def shaken(model: Any) -> Any:
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def same(ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor = MASK) -> None:
    where = real.bool()
    assert (ours - theirs)[where].abs().max() < 1e-5


@pytest.mark.parametrize("injection", INJECTIONS)
@every_family
def test_one_loop_is_the_original(family: str, injection: str):
    old = dense(family)
    new = convert.looped(old, SPLIT, steps=4, injection=injection)
    same(new(TOKENS, attention_mask=MASK, max_steps=1).logits, old(TOKENS, attention_mask=MASK).logits)
    again = new(TOKENS, MASK)
    assert (
        not torch.allclose(again.logits, old(TOKENS, attention_mask=MASK).logits, atol=1e-3)
        and (again.steps == MASK * 4).all()
    )


@every_family
def test_gradients_of_one_loop_are_the_originals(family: str):
    old = dense(family)
    new = convert.looped(old, SPLIT)
    for model in (old, new):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    layers = convert.dense.parts(old).layers
    for ours, theirs in zip(new.layers, layers, strict=True):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, atol=1e-5)


@every_family
def test_greedy_text_of_one_loop_is_the_originals(family: str):
    old = dense(family)
    new = convert.looped(old, SPLIT)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(new.generate(TOKENS, **options), old.generate(TOKENS, **options))


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_one_loop_of_an_encoder_is_bert(injection: str, headed: bool):
    old = bert(headed)
    new = convert.looped(old, SPLIT, steps=3, injection=injection)
    segments = (torch.arange(7) > 2).long().expand(3, -1)
    ours, theirs = (model(TOKENS, MASK, segments, **more) for model, more in ((new, {"max_steps": 1}), (old, {})))
    if headed:
        assert isinstance(new, LoopedForMaskedLM)
        same(ours.logits, theirs.logits)
    else:
        assert isinstance(new, LoopedEncoder)
        same(ours.last_hidden_state, theirs.last_hidden_state)
        assert torch.allclose(ours.pooler_output, theirs.pooler_output, atol=1e-5)
    assert (new(TOKENS, MASK).steps == MASK * 3).all()


def test_an_encoder_halts_by_its_prediction_whatever_its_neighbours_are():
    new = convert.looped(bert(), SPLIT, steps=9)
    rule = halt.KL(new.predict, 2e-3)
    new.encoder.loop = new.encoder.loop.replace(halt=rule)
    whole = new(TOKENS, MASK)
    assert len(whole.steps[MASK.bool()].unique()) > 1
    for row in range(3):
        alone = new(TOKENS[row : row + 1, : MASK[row].sum()])
        assert torch.equal(alone.steps[0], whole.steps[row, : MASK[row].sum()])
        same(alone.logits, whole.logits[row : row + 1, : MASK[row].sum()], torch.ones(alone.logits.shape[:2]))


def test_an_encoders_loss_is_that_of_its_labels():
    new = convert.looped(bert(), SPLIT)
    labels = TOKENS.masked_fill(MASK == 0, -100)
    out = new(TOKENS, MASK, labels=labels)
    chances = out.logits[MASK.bool()].log_softmax(-1)
    assert torch.allclose(out.loss, -chances.gather(1, TOKENS[MASK.bool()][:, None]).mean())
    out.loss.backward()
    assert all(weight.grad is not None for weight in new.parameters())


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"smollm3"}))
def test_tied_layers_at_full_rank_are_the_original(family: str):
    """Three layers become one that runs three times, each time with its own difference of full rank."""
    old = dense(family)
    new = convert.tied(old, 1, 1, 1, rank=99)
    assert isinstance(new, RelaxedForCausalLM) and len(new.layers) == 3 and new.config.steps == 3
    same(new(TOKENS, attention_mask=MASK).logits, old(TOKENS, attention_mask=MASK).logits)


@pytest.mark.parametrize("shared", [None, 0, 1])
def test_groups_of_two_are_tied_and_any_of_them_may_be_shared(shared: int | None):
    old = dense()
    new = convert.tied(old, 0, 2, 1, rank=16, shared=shared)
    same(new(TOKENS, attention_mask=MASK).logits, old(TOKENS, attention_mask=MASK).logits)
    weight = new.core.layers[1].mlp.up_proj.weight
    own = [old.model.layers[number].mlp.up_proj.weight for number in (1, 3)]
    assert torch.allclose(weight, own[shared] if shared is not None else (own[0] + own[1]) / 2)


def test_the_difference_falls_with_the_rank_and_without_one_nothing_is_added():
    old = dense()
    plain = convert.tied(old, 1, 1, 1)
    assert type(plain) is LoopedForCausalLM
    assert sum(w.numel() for w in plain.parameters()) < sum(w.numel() for w in old.parameters())
    wanted = old.model.layers[2].mlp.up_proj.weight
    gaps = []
    for rank in (1, 4, 15):
        relaxed = convert.tied(old, 1, 1, 1, rank=rank).relaxed
        weights = relaxed.variants(1, dict(relaxed.block.named_parameters()))
        gaps.append((weights["layers.0.mlp.up_proj.weight"] - wanted).norm().item())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.2 * gaps[0]


def test_gradients_of_tied_layers_are_those_of_the_layers_they_replace():
    """The shared weights' is the sum; a step's difference has U V, so its left factor has the layer's times V^T."""
    old = dense()
    new = convert.tied(old, 1, 1, 1, rank=99)
    for model in (old, new):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    layers = [old.model.layers[number].mlp.down_proj.weight.grad for number in (1, 2, 3)]
    assert torch.allclose(new.core.layers[0].mlp.down_proj.weight.grad, sum(layers), atol=1e-5)
    left, right = (
        side["layers/0/mlp/down_proj/weight"] for side in (new.relaxed.variants.left, new.relaxed.variants.right)
    )
    for step, grad in enumerate(layers):
        assert torch.allclose(left.grad[step], grad @ right[step].T, atol=1e-5)


def test_later_steps_of_a_relaxed_loop_use_the_last_difference():
    block = nn.Linear(3, 2)
    variants = loopaware.nn.LowRank(block, count=2, rank=1)
    wanted = [{"weight": torch.randn(2, 3), "bias": torch.randn(2)} for _ in range(2)]
    weights = dict(block.named_parameters())
    for number, each in enumerate(wanted):
        variants.take(number, weights, each)
    made = [variants(number, weights) for number in range(4)]
    assert torch.equal(made[1]["weight"], made[3]["weight"]) and not torch.equal(made[0]["weight"], made[1]["weight"])
    for ours, theirs in zip(made, wanted, strict=False):
        values = torch.linalg.svdvals(theirs["weight"] - block.weight)
        assert torch.allclose((ours["weight"] - theirs["weight"]).norm(), values[1:].norm(), atol=1e-5)
        assert torch.allclose(ours["bias"], theirs["bias"], atol=1e-6)


def test_relaxed_models_decode_with_a_cache_as_without():
    new = convert.tied(dense(), 1, 1, 1, rank=2)
    whole = new(TOKENS, max_steps=5)
    first = new(TOKENS[:, :4], use_cache=True, max_steps=5)
    rest = new(TOKENS[:, 4:], past_key_values=first.past_key_values, max_steps=5)
    same(torch.cat((first.logits, rest.logits), 1), whole.logits, torch.ones(3, 7))


@pytest.mark.parametrize("headed", [True, False])
def test_an_encoder_comes_back_from_its_folder(tmp_path, headed):
    old = bert(headed)
    old.save_pretrained(tmp_path / "dense")
    new = convert.looped(convert.read(tmp_path / "dense"), SPLIT)
    convert.write(new, tmp_path / "looped")
    again = (AutoModelForMaskedLM if headed else AutoModel).from_pretrained(tmp_path / "looped").eval()
    for ours, theirs in zip(again(TOKENS, MASK).to_tuple(), new(TOKENS, MASK).to_tuple(), strict=True):
        assert torch.equal(ours, theirs)


def test_layers_are_compared_as_a_naive_loop_does():
    """States from transformers' own hidden states; a group run twice from a model with its layers written out twice."""
    old = dense()
    found = convert.groups(old, TOKENS, 2)
    assert [group.first for group in found] == [1, 2] and list(found[0].layers) == [1, 2]
    out = old(TOKENS, output_hidden_states=True)
    for group in found:
        pair = [out.hidden_states[place].flatten(0, 1) for place in (group.first, group.first + 2)]
        cosine = torch.cosine_similarity(*pair)
        assert math.isclose(group.influence, (1 - cosine).mean().item(), abs_tol=1e-5)
        assert math.isclose(group.angle, (cosine.acos() / math.pi).mean().item(), abs_tol=1e-5)
        twice = AutoModelForCausalLM.from_config(
            LlamaConfig(**{**SMALL, "num_hidden_layers": 7}, num_key_value_heads=2)
        )
        order = [*range(group.first + 2), *range(group.first, LAYERS)]
        for new, number in zip(twice.model.layers, order, strict=True):
            new.load_state_dict(old.model.layers[number].state_dict())
        twice.model.embed_tokens, twice.model.norm, twice.lm_head = old.model.embed_tokens, old.model.norm, old.lm_head
        once, again = (logits.log_softmax(-1) for logits in (out.logits, twice.eval()(TOKENS).logits))
        assert math.isclose(group.divergence, (once.exp() * (once - again)).sum(-1).mean().item(), rel_tol=1e-3)
    assert convert.least(found, "similarity") is min(found, key=lambda group: group.angle)
    assert convert.least(found, "repetition") is min(found, key=lambda group: group.divergence)


def test_layers_of_a_model_without_head_are_chosen_by_similarity_alone():
    found = convert.groups(bert(headed=False), TOKENS, 1)
    assert len(found) == 3 and all(math.isnan(group.divergence) for group in found)
    assert convert.least(found, "similarity") in found
    with pytest.raises(ValueError, match="layers must be chosen by similarity"):
        convert.least(found, "repetition")


def test_layers_left_out_are_left_out():
    old = dense()
    new = convert.looped(old, convert.Split((0,), (2,), (4,)))
    short = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "num_hidden_layers": 3}, num_key_value_heads=2))
    for layer, number in zip(short.model.layers, (0, 2, 4), strict=True):
        layer.load_state_dict(old.model.layers[number].state_dict())
    short.model.embed_tokens, short.model.norm, short.lm_head = old.model.embed_tokens, old.model.norm, old.lm_head
    same(new(TOKENS, attention_mask=MASK).logits, short.eval()(TOKENS, attention_mask=MASK).logits)


def test_healing_is_seeded_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    tokens = torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"steps": 6, "batch": 2, "length": 9, "seed": 3}
    curriculum = convert.Curriculum(halt.depths.Uniform(1, 3))

    def healed(folder: Path, fails: bool = False) -> Any:
        model = convert.looped(dense(), SPLIT, 3)
        if fails:
            forward, calls = model.forward, []

            def failing(**given: Any) -> Any:
                calls.append(given["max_steps"])
                if len(calls) == 5:
                    raise KeyboardInterrupt
                return forward(**given)

            monkeypatch.setattr(model, "forward", failing)
        lines = convert.heal(model, tokens, curriculum, journal=train.Journal(folder, 1, 2), **options)
        assert not model.training
        return model, lines

    whole, lines = healed(tmp_path / "whole")
    assert {line["steps"] for line in lines} <= {1.0, 2.0, 3.0} and lines[0]["steps"] == 1
    with pytest.raises(KeyboardInterrupt):
        healed(tmp_path / "killed", fails=True)
    resumed, again = healed(tmp_path / "killed")
    assert again == lines
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_held_out_is_the_mean_loss():
    model = convert.looped(dense(), SPLIT)
    whole = model(TOKENS, labels=TOKENS, max_steps=2).loss.item()
    assert math.isclose(convert.held_out(model, TOKENS, 2, batch=2), whole, rel_tol=1e-5)


def test_a_curriculum_grows_and_is_refused_out_of_range():
    fixed = convert.Curriculum(halt.depths.Fixed(5), growing=0.0)
    assert [fixed.at(step, 4) for step in range(4)] == [5] * 4
    with pytest.raises(ValueError, match="growing must be from 0 to 1, got 2"):
        convert.Curriculum(halt.depths.Fixed(5), growing=2)


def folder(path: Path, tokenizer: bool = True) -> Path:
    """A dense model over bytes, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    model = shaken(AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "vocab_size": 256}, num_key_value_heads=2)))
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    if tokenizer:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(path)
    return path


def said(capsys: pytest.CaptureFixture[str], *words: Any, status: int = 0) -> str:
    left = 0
    try:
        cli.main(["convert", *map(str, words)])
    except SystemExit as done:
        left = done.code or 0
    assert left == status
    got = capsys.readouterr()
    return got.err if status else got.out


def test_the_command_converts_heals_and_what_it_writes_is_loaded(tmp_path, capsys):
    source, text = folder(tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text("round and round it goes, and when it is right it stops. " * 9)
    plain = said(capsys, source, tmp_path / "plain", "--prelude", 1, "--coda", 1)
    assert "prelude 0, core 1–3, coda 4" in plain and "differ from the original's by" in plain
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("dense", "plain"))
    same(new(TOKENS, attention_mask=MASK, max_steps=1).logits, old(TOKENS, attention_mask=MASK).logits)
    assert new.generation_config.temperature == 0.25 and new.config.steps == 4
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("plain", "dense"))
    assert ours("halting").input_ids == theirs("halting").input_ids
    options = ("--text", text, "--heal", 3, "--batch", 2, "--length", 16, "--steps", 2, "--core", 2)
    healed = said(capsys, source, tmp_path / "healed", *options, "--choose", "repetition")
    assert "KL of twice from once" in healed and "healed for 3 steps" in healed and " *" in healed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert model.config.core == 2 and model.config.steps == 2
    assert (tmp_path / "healed" / "healing" / "metrics.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "healed", "plain", "text.txt"]


def test_the_command_ties_layers_and_drops_others(tmp_path, capsys):
    source = folder(tmp_path / "dense", tokenizer=False)
    text = said(capsys, source, tmp_path / "tied", "--tie", "--prelude", 1, "--core", 1, "--coda", 1, "--lora", 99)
    assert "core 1 x 3 loops" in text
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("dense", "tied"))
    assert isinstance(new, RelaxedForCausalLM)
    same(new(TOKENS, attention_mask=MASK).logits, old(TOKENS, attention_mask=MASK).logits)
    said(capsys, source, tmp_path / "short", "--drop", 3, "--prelude", 1, "--core", 2, "--coda", 1)
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert torch.equal(short.layers[3].mlp.up_proj.weight, old.model.layers[4].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heal", "3"], "text must be given to heal"),
        (["--lora", "3"], "lora must be 0 where layers are not tied"),
        (["--tie", "--core", "2"], "prelude, core and coda must be given where layers are tied"),
        (["--prelude", "2"], "prelude and coda must be given together"),
        (["--prelude", "1", "--core", "1", "--coda", "1"], "prelude, core and coda must add up to the 5 layers"),
        (["--core", "4"], "size must be at most the 3 layers"),
        (["--tie", "--prelude", "1", "--core", "2", "--coda", "1"], "must be a multiple of the core's 2, got 3 of 5"),
        (["--text", "README.md"], "must hold a tokenizer to read text"),
    ],
)
def test_the_command_refuses_what_does_not_fit_and_writes_nothing(tmp_path, capsys, options, message):
    source = folder(tmp_path / "dense", tokenizer=False)
    said_ = said(capsys, source, tmp_path / "new", *options, status=1)
    lines = [line for line in said_.splitlines() if line and "?it/s" not in line and "it/s]" not in line]
    assert message in lines[0] and len(lines) == 1 and not (tmp_path / "new").exists()


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a folder with config.json and weights.*got nothing there"):
        convert.read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got a folder without config.json"):
        convert.read(tmp_path / "empty")
    source = folder(tmp_path / "dense")
    (source / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="must hold a dense model that can be looped, got"):
        convert.read(source)
    looped = convert.write(convert.looped(dense(), SPLIT), tmp_path / "looped")
    with pytest.raises(ValueError, match="base must be one of .*, got 'looped'"):
        convert.read(looped)
    (source / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="base must be one of .*, got 't5'"):
        convert.read(source)


def test_a_model_with_a_missing_weight_is_refused(tmp_path):
    from safetensors import torch as safetensors

    source = folder(tmp_path / "dense")
    weights = safetensors.load_file(source / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    safetensors.save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="must hold a whole model, got model.layers.3.mlp.up_proj.weight missing"):
        convert.read(source)


def test_a_full_folder_is_never_written_over(tmp_path):
    source = folder(tmp_path / "dense")
    before = (source / "config.json").read_bytes()
    with pytest.raises(ValueError, match="must be a new folder, got one with files"):
        convert.write(convert.looped(dense(), SPLIT), source)
    assert (source / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="must be a new folder, got a file"):
        convert.free(source / "config.json")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = convert.looped(dense(), SPLIT)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert.write(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_wrong_splits_ties_and_bases_are_refused():
    old = dense()
    with pytest.raises(ValueError, match="layers must be some of 0 to 4, each once and in order"):
        convert.looped(old, convert.Split((0,), (2, 2), ()))
    with pytest.raises(ValueError, match="core must be at least 1, got 0"):
        convert.Split.of(range(3), 2, 0, 1)
    with pytest.raises(ValueError, match="shared must be a group from 0 to 2, got 3"):
        convert.tied(old, 1, 1, 1, shared=3)
    with pytest.raises(ValueError, match="base must be one of .*, got 'bert'"):
        convert.tied(bert(), 1, 1, 1)
    with pytest.raises(ValueError, match="text must|tokens must be one text of at least 9 tokens"):
        convert.heal(old, torch.arange(5), convert.Curriculum(halt.depths.Fixed(1)), steps=1, length=9)
    with pytest.raises(ValueError, match="a model must be causal to be healed, got LoopedForMaskedLM"):
        convert.heal(convert.looped(bert(), SPLIT), TOKENS[0], convert.Curriculum(halt.depths.Fixed(1)), steps=1)
    mixed = AutoModelForCausalLM.from_config(
        Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    )
    with pytest.raises(ValueError, match="groups of layers must be alike to share weights, got layer_types"):
        convert.tied(mixed, 1, 1, 1)
    numbered = CONFIGS["gpt2"].to_dict() | {"scale_attn_by_inverse_layer_idx": True}
    scaled = AutoModelForCausalLM.from_config(GPT2Config(**numbered)).eval()
    with pytest.raises(ValueError, match="layers must not depend on their number"):
        convert.looped(scaled, convert.Split((0,), (2,), (4,)))
    same(convert.looped(scaled, SPLIT)(TOKENS, attention_mask=MASK).logits, scaled(TOKENS, attention_mask=MASK).logits)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        RelaxedConfig(base=CONFIGS["llama"], prelude=1, core=3, coda=1, rank=0)
    with pytest.raises(ValueError, match="the base of an encoder must be bert, got llama"):
        LoopedEncoder(convert.looped(old, SPLIT).config)
    config = convert.looped(bert(), SPLIT).config
    config.exits = "every"
    with pytest.raises(ValueError, match="exits must be 'last' in an encoder"):
        LoopedForMaskedLM(config)


TINY: dict[str, Any] = {"pretraining": 3, "steps": 2, "batch": 2, "length": 16, "windows": 3, "depth": 2, "rank": 2}


def test_the_recipe_end_to_end_again_and_on_a_folder(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("round and round it goes, and when it is right it stops. " * 9)
    retrofit.run(tmp_path / "own", text=tmp_path / "text.txt", seeds=(0, 1), **TINY)
    assert f"report: {tmp_path / 'own' / 'report.html'}" in capsys.readouterr().out
    first = (tmp_path / "own" / "results.json").read_bytes()
    scores = json.loads(first)["results"]["1"]
    assert len(scores["looped, healed"]["losses"]) == 4 and len(scores["original, fine-tuned"]["losses"]) == 1
    assert scores["original"]["losses"][0] == pytest.approx(scores["looped, not healed"]["losses"][0], abs=1e-5)
    assert scores["tied"]["weights"] < scores["tied with LoRA"]["weights"] < scores["original"]["weights"]
    page = (tmp_path / "own" / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") == 1 and "(chosen)" in page
    retrofit.run(tmp_path / "own", text=tmp_path / "text.txt", seeds=(0, 1), **TINY)
    assert (tmp_path / "own" / "results.json").read_bytes() == first
    source = folder(tmp_path / "dense")
    retrofit.run(tmp_path / "given", base=source, text=tmp_path / "text.txt", seeds=(0,), **{**TINY, "core": 1})
    assert "The model in dense, of 5 layers," in (tmp_path / "given" / "report.html").read_text()


def test_the_recipe_refuses_what_it_cannot_use(tmp_path):
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(ValueError, match="text must have at least 160 tokens"):
        retrofit.run(tmp_path / "own", text=tmp_path / "text.txt", **TINY)
    source = folder(tmp_path / "dense")
    bert().save_pretrained(source)
    with pytest.raises(ValueError, match="base must be a causal model"):
        retrofit.run(tmp_path / "given", base=source, **TINY)


def test_a_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="must be a text in UTF-8"):
        convert.content(tmp_path / "text.txt")


def test_layer_kinds_go_with_their_layers():
    """Layers that slide stay those that slide, wherever they are put."""
    old = AutoModelForCausalLM.from_config(
        Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    ).eval()
    new = convert.looped(old, SPLIT)
    same(new(TOKENS, attention_mask=MASK).logits, old(TOKENS, attention_mask=MASK).logits)
    short = convert.looped(old, convert.Split((1,), (2,), (4,)))
    assert short.config.base.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.skipif(not STORIES.exists(), reason="no shared/data/stories260k beside the checkout")
def test_a_real_llama_is_converted_and_loops():
    old = stories()
    new = convert.looped(old, SPLIT, 2)
    tokens = torch.randint(512, (2, 63), generator=torch.Generator().manual_seed(0))
    assert (new(tokens, max_steps=1).logits - old(tokens).logits).abs().max() < 1e-5
    tied = convert.tied(old, 1, 1, 1, rank=64)
    assert (tied(tokens).logits - old(tokens).logits).abs().max() < 1e-4
    assert new.generate(tokens[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 9)


def stories() -> Any:
    """The weights of llama2.c's format: sizes, then matrices of all layers by kind; pairs of rotary features adjoin."""
    raw = (STORIES / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, groups, vocabulary, longest = struct.unpack("7i", raw[:28])
    numbers, place = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0

    def next_(*shape: int) -> torch.Tensor:
        nonlocal place
        place += math.prod(shape)
        return numbers[place - math.prod(shape) : place].view(shape)

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.view(layers, count, -1, 2, dim).transpose(2, 3).reshape(layers, -1, dim)

    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=longest,
                    rms_norm_eps=1e-5, tie_word_embeddings=True)
    )  # fmt: skip
    narrow = dim // heads * groups
    kinds = {"input_layernorm": (dim,), "self_attn.q_proj": (dim, dim), "self_attn.k_proj": (narrow, dim)}
    kinds |= {"self_attn.v_proj": (narrow, dim), "self_attn.o_proj": (dim, dim), "post_attention_layernorm": (dim,)}
    kinds |= {"mlp.gate_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "mlp.up_proj": (hidden, dim)}
    weights = {"model.embed_tokens.weight": next_(vocabulary, dim)}
    for kind, shape in kinds.items():
        stacked = next_(layers, *shape)
        if kind.endswith(("q_proj", "k_proj")):
            stacked = halves(stacked, heads if kind.endswith("q_proj") else groups)
        weights |= {f"model.layers.{number}.{kind}.weight": each for number, each in enumerate(stacked)}
    weights["model.norm.weight"] = next_(dim)
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return model.eval()
