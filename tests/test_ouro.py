"""Ouro answers what the authors' code answers (tests/recorded), and keeps what is promised beyond it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from loopaware import execute, halt, readout
from loopaware.lm import Exact, ExitGate, Exits, token_cost
from loopaware.models.ouro import Gate, OuroForCausalLM, Selected
from loopaware.models.ouro_config import OuroConfig
from loopaware.testing import assert_close
from recordings import SINGLY, alike, pieces, recording

RECORDED, WEIGHTS, METADATA = recording("ouro")
FIELDS = METADATA["config"]
IDS = RECORDED["ids"]
MASKS = {side: RECORDED[f"mask.{side}"] for side in ("left", "right")}


def ouro(attention: str = "sdpa", **fields: object) -> OuroForCausalLM:
    """The recorded model."""
    model = OuroForCausalLM._from_config(OuroConfig(**{**FIELDS, **fields}), attn_implementation=attention).eval()
    model.load_state_dict(WEIGHTS)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 8])
@torch.no_grad()
def test_logits_are_the_authors(attention: str, steps: int):
    model = ouro(attention)
    asked = None if steps == 4 else steps
    for use_cache in (True, False):
        out = model(IDS, max_steps=asked, use_cache=use_cache)
        assert_close(out.logits, RECORDED[f"logits.{steps}"], "the authors' logits")
        assert (out.steps == steps).all() and (out.past_key_values is not None) == use_cache
    if steps == 2:
        assert_close(out.logits, RECORDED["at.1"], "exit_at_step counts from 0")


def test_logits_with_a_cache_are_the_authors():
    model = ouro()
    assert_close(pieces(model, IDS, [7, 8, 9, 10], max_steps=8)[0], RECORDED["cached.8"], "the authors' cache")
    for steps in (1, 7):
        for policy in (model.policy, Exact()):
            model.policy = policy
            logits = pieces(model, IDS, [3, 4, 9], max_steps=steps)[0]
            assert_close(logits, RECORDED[f"logits.{steps}"], "pieces equal the whole")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_the_authors_and_changes_nothing(attention: str, side: str):
    model, mask = ouro(attention), MASKS[side]
    real = mask.bool()
    for cuts in ([], SINGLY):
        logits = pieces(model, IDS, cuts, mask=mask)[0]
        assert_close(logits[real], RECORDED[f"masked.{side}"][real], "the authors' masks")
        for row in range(3):
            assert_close(logits[row, real[row]], model(IDS[row, real[row]][None]).logits[0], "padding is not seen")


@torch.no_grad()
def test_sliding_windows_are_the_authors():
    model = ouro(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert_close(model(IDS).logits, RECORDED["sliding.4"], "the authors' windows")
    assert_close(pieces(model, IDS, [6, 7, 8])[0], RECORDED["sliding.4"], "pieces equal the whole")


@torch.no_grad()
def test_the_gate_and_the_authors_exit_which_runs_every_loop():
    model = ouro()
    loop, gates = model.loop, RECORDED["gates.8"]
    seen: list[Tensor] = []
    watched = halt.Watched(Gate(model.model))
    model.loop = loop.replace(halt=watched, max_steps=8, readout=Exits())
    model.loop.halt.register_forward_hook(lambda _, given, told: seen.append(told[0].score))
    model(IDS)
    assert_close(torch.stack(seen, -1), gates, "the authors' gate")
    chances = torch.sigmoid(gates[..., :4])
    reached = 1 - (1 - chances).cumprod(-1)
    reached[..., -1] = 1
    for threshold in (0.5, 0.7):
        rule = ExitGate(Gate(model.model), threshold)
        model.loop = loop.replace(halt=Selected(rule), readout=readout.Weighted())
        out = model(IDS)
        assert_close(out.logits, RECORDED[f"threshold.{threshold}"], "the authors' early exit")
        assert (out.steps == 4).all() and not out.halted.any()
        assert_close(pieces(model, IDS, SINGLY)[0], out.logits, "pieces equal the whole")
        model.loop = loop.replace(halt=rule)
        out = model(IDS)
        first = (reached[:, 0] >= threshold).float().argmax(-1) + 1
        assert torch.equal(out.steps[:, 0], first) and out.steps.unique().numel() > 2
        # Nobody stands before a first token, so that it does not matter whether others run on.
        assert_close(out.logits[:, 0], RECORDED[f"threshold.{threshold}"][:, 0], "the authors' first tokens")


RULES = {
    "gate": lambda model: ExitGate(Gate(model.model), 0.6),
    "kl": lambda model: halt.KL(model.predict, 0.05),
    "entropy": lambda model: halt.Entropy(model.predict, 2.9),
    "confidence": lambda model: halt.Confidence(model.predict, 0.2),
    "patience": lambda model: halt.Patience(halt.Confidence(model.predict, 0.15), 2),
}


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_batch_equals_its_rows_and_pieces_equal_the_whole(name: str):
    model = ouro()
    compacted = execute.Compacted(break_even=0)
    model.loop = model.loop.replace(halt=RULES[name](model), max_steps=7, execute=compacted)
    whole = model(IDS)
    assert whole.steps.unique().numel() > 2, "the rows stop at different steps"
    logits, steps, cache = pieces(model, IDS, SINGLY)
    assert torch.equal(steps, whole.steps) and cache.ran == steps.sum(), "nobody waits for the slowest row"
    assert_close(logits, whole.logits, "pieces equal the whole")
    alike(model, IDS, logits, steps)
    mask, real = MASKS["left"], MASKS["left"].bool()
    padded, its_steps, _ = pieces(model, IDS, [4, 5, 9], mask=mask)
    for row in range(3):
        alone = model(IDS[row, real[row]][None])
        assert torch.equal(its_steps[row, real[row]], alone.steps[0])
        assert_close(padded[row, real[row]], alone.logits[0], "padding is not seen")


def test_generate_with_exits_any_number_of_loops_and_padding():
    model = ouro(early_exit_threshold=0.6)
    mask = MASKS["left"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for steps in (1, 9):
        told = model.generate(IDS, attention_mask=mask, max_steps=steps, **options)
        again = model.generate(IDS, attention_mask=mask, max_steps=steps, use_cache=False, **options)
        assert torch.equal(told, again)
        for row in range(3):
            alone = IDS[row, mask[row].bool()][None]
            alone = model.generate(alone, attention_mask=torch.ones_like(alone), max_steps=steps, **options)
            assert torch.equal(alone[0, -4:], told[row, -4:])


def released(folder: Path, **fields: object) -> Path:
    """A folder as it was released."""
    code = {"architectures": ["OuroForCausalLM"], "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig"}}
    sliding = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 3, "rope_scaling": None}
    config = {**FIELDS, **code, **sliding, "torch_dtype": "float32", "transformers_version": "4.55.0", **fields}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(WEIGHTS, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def test_released_folders_load_by_name_and_come_back(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(released(tmp_path))
    assert isinstance(model, OuroForCausalLM) and model.loop.halt.threshold == 1
    assert_close(model(IDS).logits, RECORDED["logits.4"], "loaded by name")
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500
    config = AutoConfig.from_pretrained(tmp_path / "again")
    config.total_ut_steps = 7
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", config=config, attn_implementation="eager")
    assert_close(again(IDS).logits, RECORDED["logits.7"], "written and read again")
    tied = ouro(tie_word_embeddings=False)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.config.tie_word_embeddings = True
    tied.save_pretrained(tmp_path / "tied")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(loaded(IDS).logits, tied(IDS).logits, "tied weights")


def test_a_broken_or_foreign_folder_is_one_clear_error(tmp_path: Path):
    folder = released(tmp_path)
    some = {name: weight for name, weight in WEIGHTS.items() if "early_exit_gate" not in name}
    save_file(some, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="whole OuroForCausalLM, got model.early_exit_gate.bias.*missing"):
        AutoModelForCausalLM.from_pretrained(folder)
    released(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match="model.layers.2.*unexpected"):
        AutoModelForCausalLM.from_pretrained(folder)
    released(folder, total_ut_steps=0)
    with pytest.raises(ValueError, match="total_ut_steps must be at least 1, got 0. It counts layers or loops."):
        AutoModelForCausalLM.from_pretrained(folder)
    released(folder, model_type="llama")
    with pytest.raises(ValueError, match="model_type must be 'ouro', got 'llama'. Load it with AutoModelForCausalLM"):
        OuroForCausalLM.from_pretrained(folder)


def test_configs_out_of_range_are_refused():
    assert OuroConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope_theta == 1e6
    with pytest.raises(ValueError, match="early_exit_threshold must be above 0.0 and at most 1.0, got 1.5. It is a"):
        OuroConfig(early_exit_threshold=1.5)
    with pytest.raises(
        ValueError, match="layer_types must name one of full_attention and sliding_attention for each of 2"
    ):
        OuroConfig(num_hidden_layers=2, layer_types=["full_attention"])


def test_training_weighs_every_loop_by_the_gate_and_teaches_every_weight():
    model = ouro().train()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    assert out.exits.shape == (4,) and not model.shares()
    taught = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in taught.values())
    model.zero_grad()
    model.loop = model.loop.replace(halt=Selected(model.loop.halt), readout=readout.Weighted())
    assert_close(model(IDS).logits.detach(), RECORDED["weighted"], "the authors' expected logits")
    model.loop = model.loop.replace(readout=readout.Last(), halt=halt.Never())
    losses, logits = [], []
    for steps in range(1, 5):
        logits.append(model(IDS, max_steps=steps).logits)
        loss = torch.nn.functional.cross_entropy(logits[-1][:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
        losses.append(loss)
    states: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda _, given, told: states.append(told))
    model(IDS)
    handle.remove()
    chance = torch.cat([model.model.early_exit_gate(state) for state in states], -1).sigmoid()
    weights = chance * torch.cat((torch.ones_like(chance[..., :1]), (1 - chance).cumprod(-1)[..., :-1]), -1)
    weights = torch.cat((weights[..., :-1], 1 - weights[..., :-1].sum(-1, keepdim=True)), -1)
    mixed = sum(weights[..., n, None] * logits[n] for n in range(4))
    assert_close(mixed.detach(), RECORDED["weighted"], "the authors' weights")
    shares = weights[:, :-1].movedim(-1, 0)
    loss = (shares * torch.stack(losses) + model.objective.entropy * shares * shares.log()).sum(0).mean()
    loss.backward()
    assert_close(out.loss.detach(), loss.detach(), "the paper's loss")
    for name, weight in model.named_parameters():
        assert_close(taught[name], weight.grad, f"the gradient of {name}")


@torch.no_grad()
def test_a_copy_runs_on_its_own_weights():
    model = ouro(early_exit_threshold=0.6)
    before, other = model(IDS), copy.deepcopy(model)
    assert other.loop.body.model is other.model and other.loop.halt.rule.model is other.model
    other.model.early_exit_gate.bias.fill_(9)
    assert (other(IDS).steps == 1).all()
    assert torch.equal(model(IDS).steps, before.steps) and torch.equal(model(IDS).logits, before.logits)


def test_first_weights_and_sharing_of_slots():
    model = OuroForCausalLM(OuroConfig(**{**FIELDS, "hidden_size": 48, "initializer_range": 0.1}))
    assert abs(model.model.layers[0].mlp.up_proj.weight.std() - 0.1) < 0.01
    assert (model.model.layers[0].input_layernorm_2.weight == 1).all() and (model.model.early_exit_gate.bias == 0).all()
    assert not model.eval().shares()
    model.loop = model.loop.replace(halt=ExitGate(Gate(model.model), 0.9))
    assert model.shares() and not model.train().shares()


def test_what_a_token_costs_is_counted():
    cost = token_cost(ouro(early_exit_threshold=0.6))
    attention, mlp, gate = 2 * 24 * (24 + 8 + 8 + 24), 3 * 2 * 24 * 32, 2 * 24
    assert cost.step == 3 * (attention + mlp) + gate and cost.once == 2 * 24 * 37
    assert cost.step_by_key == 3 * 2 * 2 * 24 and cost.once_by_key == 0
