"""Huginn answers what the authors' code answers (tests/recorded), and keeps what is promised beyond it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loopaware import execute, grad, halt
from loopaware.lm import Exact, First, Last, Noise, token_cost
from loopaware.models.huginn import HuginnForCausalLM
from loopaware.models.huginn_config import HuginnConfig
from loopaware.testing import assert_close
from recordings import SINGLY, alike, pieces, recording

RECORDED, WEIGHTS, METADATA = recording("huginn")
FIELDS = METADATA["config"]
IDS = RECORDED["ids"]


def given(context: dict) -> Tensor:
    """The recorded start of each token."""
    return RECORDED["state"][:, context["attention"].positions[0]]


def huginn(attention: str = "sdpa", **fields: object) -> HuginnForCausalLM:
    """The recorded model, with a start of its own."""
    config = HuginnConfig(**{**FIELDS, **fields})
    model = HuginnForCausalLM._from_config(config, attn_implementation=attention).eval()
    told = model.load_state_dict(WEIGHTS, strict=False)
    assert told.missing_keys == ["lm_head.weight"] and told.unexpected_keys == ["freqs_cis"]
    return model


@pytest.fixture
def model() -> HuginnForCausalLM:
    """The recorded model, from the recorded start."""
    model = huginn()
    model.loop = model.loop.replace(init=given)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8])
@torch.no_grad()
def test_logits_are_the_authors(attention: str, steps: int):
    model = huginn(attention)
    model.loop = model.loop.replace(init=given)
    asked = None if steps == 4 else steps
    for use_cache in (True, False):
        out = model(IDS, max_steps=asked, use_cache=use_cache)
        assert_close(out.logits, RECORDED[f"logits.{steps}"], "the authors' logits")
        assert (out.steps == steps).all() and (out.past_key_values is not None) == use_cache


def test_logits_with_a_cache_are_the_authors(model: HuginnForCausalLM):
    assert_close(pieces(model, IDS, [7, 8, 9, 10], max_steps=8)[0], RECORDED["cached.8"], "the authors' cache")
    for steps in (1, 7):
        for policy in (model.policy, Exact()):
            model.policy = policy
            logits = pieces(model, IDS, [3, 4, 9], max_steps=steps)[0]
            assert_close(logits, RECORDED[f"logits.{steps}"], "pieces equal the whole")
    model.policy = Last()
    assert_close(pieces(model, IDS, [7, 8, 9, 10])[0], RECORDED["compressed.4"], "compress-s4 is Last")


@pytest.mark.parametrize("name", ["kl", "latent"])
def test_exits_of_a_batch_are_the_authors_for_single_sequences(model: HuginnForCausalLM, name: str):
    threshold = METADATA[f"exit.{name}"]
    rule = halt.KL(model.glance, threshold) if name == "kl" else halt.Converged(threshold)
    model.loop = model.loop.replace(halt=rule, max_steps=8, execute=execute.Compacted(break_even=0))
    logits, steps, cache = pieces(model, IDS, SINGLY)
    assert torch.equal(steps, RECORDED[f"exit.{name}.steps"]) and steps.unique().numel() > 3
    assert_close(logits, RECORDED[f"exit.{name}.logits"], "the authors' adaptive logits")
    assert cache.ran == steps.sum(), "nobody waits for the slowest row"


RULES = {
    "kl": lambda model: halt.KL(model.predict, 0.02),
    "entropy": lambda model: halt.Entropy(model.predict, 3.35),
    "confidence": lambda model: halt.Confidence(model.predict, 0.11),
    "patience": lambda model: halt.Patience(halt.KL(model.predict, 0.2), 2),
    "converged": lambda model: halt.Converged(0.15),
}


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_batch_equals_its_rows_and_pieces_equal_the_whole(model: HuginnForCausalLM, name: str):
    model.loop = huginn().loop.replace(
        body=model.loop.body, halt=RULES[name](model), max_steps=8, execute=execute.Compacted(break_even=0)
    )
    whole = model(IDS)
    assert whole.steps.unique().numel() > 2, "the rows stop at different steps"
    logits, steps, cache = pieces(model, IDS, [4, *range(6, 11)])
    assert torch.equal(steps, whole.steps) and torch.equal(cache.steps, steps)
    assert_close(logits, whole.logits, "pieces equal the whole")
    alike(model, IDS, logits, steps)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [None, "kl"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(attention: str, name: str | None):
    model = huginn(attention)
    if name is not None:
        model.loop = model.loop.replace(halt=RULES[name](model), max_steps=8)
    for left in (True, False):
        mask = torch.arange(11).expand(3, 11) >= torch.tensor([4, 0, 1])[:, None]
        mask = mask if left else mask.flip(1)
        for cuts in ([], [4, 5, 6, 9]):
            logits, steps, _ = pieces(model, IDS, cuts, mask=mask.long())
            for row in (0, 2):
                alone = model(IDS[row, mask[row]][None])
                assert torch.equal(steps[row, mask[row]], alone.steps[0])
                assert_close(logits[row, mask[row]], alone.logits[0], "padding is not seen")
        assert (steps[~mask] == 0).all()


def test_generate_with_any_number_of_steps_and_padding():
    model = huginn()
    mask = torch.arange(11).expand(3, 11) >= torch.tensor([4, 0, 1])[:, None]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for steps in (1, 9):
        told = model.generate(IDS, attention_mask=mask.long(), max_steps=steps, **options)
        again = model.generate(IDS, attention_mask=mask.long(), max_steps=steps, use_cache=False, **options)
        assert torch.equal(told, again)
        for row in range(3):
            alone = IDS[row, mask[row]][None]
            alone = model.generate(alone, attention_mask=torch.ones_like(alone), max_steps=steps, **options)
            assert torch.equal(alone[0, -4:], told[row, -4:])


def released(folder: Path, **fields: object) -> Path:
    """A folder as the authors' code writes it: derived fields, the table of angles, tied weights once."""
    derived = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "effective_expected_depth": 20}
    noise = {"test_time_noise": 0, "test_time_noise_type": "fixed", "init_values": {"std": 0.1}}
    code = {"architectures": ["RavenForCausalLM"], "auto_map": {"AutoConfig": "raven_config_minimal.RavenConfig"}}
    config = {**FIELDS, **derived, **noise, **code, "torch_dtype": "float32", **fields}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def test_released_folders_load_by_name_and_come_back(tmp_path: Path):
    ours = huginn()
    model = AutoModelForCausalLM.from_pretrained(released(tmp_path))
    assert isinstance(model, HuginnForCausalLM) and not model.training
    assert_close(model(IDS).logits, ours(IDS).logits, "loaded by name")
    assert model.train()(IDS[:1]).steps.unique().numel() == 1
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager", mean_recurrence=7)
    assert not hasattr(again.config, "effective_expected_depth"), "what follows from other fields is not believed"
    assert again.lm_head.weight is again.transformer["wte"].weight
    assert_close(again(IDS).logits, ours(IDS, max_steps=7).logits, "written and read again")


def test_a_broken_or_foreign_folder_is_one_clear_error(tmp_path: Path):
    folder = released(tmp_path)
    some = {name: weight for name, weight in WEIGHTS.items() if "core_block.1" not in name}
    save_file(some, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="must hold a whole HuginnForCausalLM, got transformer.core_block.1.*missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    released(folder, n_embd=32)
    with pytest.raises(ValueError, match="of another shape"):
        AutoModelForCausalLM.from_pretrained(folder)
    released(folder, injection_type="add")
    with pytest.raises(ValueError, match="injection_type must be 'linear', as in the released Huginn, got 'add'."):
        AutoModelForCausalLM.from_pretrained(folder)
    released(folder, model_type="llama")
    with pytest.raises(ValueError, match="model_type must be 'huginn_raven', got 'llama'. Load it with Auto"):
        HuginnForCausalLM.from_pretrained(folder)


def test_configs_out_of_range_are_refused():
    with pytest.raises(ValueError, match="n_heads must divide n_embd into heads of an even size, got 3 and 16. Rotary"):
        HuginnConfig(**{**FIELDS, "n_heads": 3})
    with pytest.raises(ValueError, match="mean_recurrence must be at least 1, got 0. It counts"):
        HuginnConfig(**{**FIELDS, "mean_recurrence": 0})
    with pytest.raises(ValueError, match="n_layers_in_coda must be at least 0, got -1. It counts layers."):
        HuginnConfig(**{**FIELDS, "n_layers_in_coda": -1})


def test_training_draws_a_depth_for_the_batch_that_no_bound_cuts():
    model = huginn(mean_recurrence=4, mean_backprop_depth=2).train()
    steps = torch.stack([model(IDS[:, :1]).steps for _ in range(100)])
    assert (steps == steps[:, :1, :1]).all(), "one depth for a batch"
    depths = steps[:, 0, 0]
    assert depths.max() > 2 * model.loop.max_steps and depths.min() < 3
    assert abs(depths.float().mean() - 5) < 3 * 2.9 / math.sqrt(100)
    assert not model.shares(), "nobody needs keys and values of steps that are not differentiated"
    assert (model.eval()(IDS).steps == 4).all() and not model.shares()
    model.loop = model.loop.replace(halt=halt.Converged())
    assert model.shares()


def test_a_training_step_is_the_authors_and_reaches_every_weight(model: HuginnForCausalLM):
    model.train()
    model.loop = model.loop.replace(halt=halt.Never(), max_steps=5, grad=grad.Truncated(2))
    out = model(IDS, labels=IDS)
    out.loss.backward()
    taught = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in taught.values())
    model.zero_grad()
    logits = naive(model, steps=5, attached=2)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    assert_close(out.loss.detach(), loss.detach(), "the loss")
    for name, weight in model.named_parameters():
        assert_close(taught[name], weight.grad, f"the gradient of {name}")


def naive(model: HuginnForCausalLM, steps: int, attached: int) -> Tensor:
    """The equations of the file, written down plainly: no cache, no frame, one mask."""
    parts, turns = model.transformer, model.rotary(IDS, torch.arange(11)[None])

    def layer(block: torch.nn.Module, x: Tensor) -> Tensor:
        q, k, v = block.attn.Wqkv(block.norm_1(x)).view(3, 11, 3, 2, 8).unbind(2)
        cos, sin = (each[0, :, None, :] for each in turns)
        both = torch.stack((q, k)) + block.attn.qk_bias[:, :, None]
        pairs = torch.view_as_complex(both.unflatten(-1, (4, 2)).contiguous())
        q, k = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
        hidden = torch.ones(11, 11).triu(1).bool()
        mixed = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(2)
        x = block.norm_2(x + block.attn.proj(mixed))
        one, two = block.mlp.fc(block.norm_3(x)).chunk(2, -1)
        return block.norm_4(x + block.mlp.proj(torch.nn.functional.silu(one) * two))

    x = parts["wte"](IDS) * 4
    for block in parts["prelude"]:
        x = layer(block, x)
    state = RECORDED["state"]
    for step in range(steps):
        state = state if step > steps - attached else state.detach()
        state = parts["adapter"](torch.cat((state, x), -1))
        for block in parts["core_block"]:
            state = layer(block, state)
    state = parts["ln_f"](state)
    for block in parts["coda"]:
        state = layer(block, state)
    return model.lm_head(parts["ln_f"](state))


def test_gradient_checkpointing_changes_no_gradient(model: HuginnForCausalLM):
    model.train()
    model.loop = model.loop.replace(halt=halt.Never())

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    assert_close(gradients(), plain, "checkpointed gradients")


def test_first_weights_and_first_states_are_spread_as_in_the_paper():
    config = HuginnConfig(n_embd=64, n_heads=2, intermediate_size=96, vocab_size=301, mean_recurrence=8)
    model, std = HuginnForCausalLM(config), math.sqrt(2 / (5 * 64))
    back = std / math.sqrt(2 * (4 + 4 * 8))
    block = model.transformer["core_block"][0]
    gate, value = block.mlp.fc.weight.chunk(2)
    for weight, expected in (
        (model.transformer["wte"].weight, std),
        (model.transformer["adapter"].weight, std),
        (block.attn.Wqkv.weight, std),
        (gate, std),
        (value, back),
        (block.mlp.proj.weight, back),
        (block.attn.proj.weight, back),
    ):
        assert weight.abs().max() <= 3 * expected and abs(weight.std() / expected - 0.987) < 0.03
    start = model.loop.init
    assert isinstance(start, Noise) and start.within == 3 and start.std == pytest.approx(math.sqrt(2 / 5))


@torch.no_grad()
def test_a_copy_runs_on_its_own_weights(model: HuginnForCausalLM):
    before, other = model(IDS).logits, copy.deepcopy(model)
    assert other.loop.body.parts is other.transformer
    other.transformer["adapter"].weight.zero_()
    assert torch.equal(model(IDS).logits, before) and not torch.allclose(other(IDS).logits, before)


@torch.no_grad()
def test_one_slot_for_all_steps_is_a_model_of_its_own(model: HuginnForCausalLM):
    model.policy = First()
    whole = model(IDS, use_cache=False).logits
    logits, _, cache = pieces(model, IDS, [5, 6])
    assert_close(logits, whole, "pieces equal the whole")
    assert cache.bytes_per_token == 8 * 2 * 16 * 4
    assert not torch.allclose(whole, RECORDED["logits.4"])


def test_what_a_token_costs_is_counted():
    cost, layer = token_cost(huginn()), 2 * 16 * (48 + 16 + 48 + 24)
    assert cost.step == 2 * 32 * 16 + 4 * layer and cost.once == 4 * layer + 2 * 16 * 37
    assert cost.step_by_key == cost.once_by_key == 4 * 2 * 2 * 16
