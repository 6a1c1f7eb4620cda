"""`LoopedForCausalLM`: the dense model at one step, every option, training, saving, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import loopaware
from loopaware import Loop, execute, grad, halt, init, lm, observe, testing
from loopaware.models.looped_config import LoopedConfig
from loopaware.models.looped_lm import LoopedForCausalLM
from loopaware.protocols import Rows
from looped import VOCABULARY, base, model, pieces

KINDS = ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "gpt2")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (3, 8))


def gradients(made: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    made.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in made.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_at_one_step_it_is_the_dense_model(kind, tokens):
    made = model(kind, steps=1)
    dense = AutoModelForCausalLM.from_config(made.config.base).eval()
    body, names = dense.base_model, lm.layers.anatomy(kind)
    getattr(body, names.tokens).load_state_dict(made.embed_tokens.state_dict())
    getattr(body, names.norm).load_state_dict(made.norm.state_dict())
    if names.places:
        getattr(body, names.places).load_state_dict(made.embed_places.state_dict())
    for old, new in zip(getattr(body, names.layers), made.layers, strict=True):
        old.load_state_dict(new.state_dict())
    dense.get_output_embeddings().load_state_dict(made.lm_head.state_dict())
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    expected = dense(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    testing.assert_close(made(tokens, attention_mask=mask).logits[mask > 0], expected[mask > 0], "one step")
    assert torch.equal(made.generate(tokens, max_new_tokens=4), dense.generate(tokens, max_new_tokens=4))


OPTIONS = [
    {"steps": 3},
    {"injection": "add"},
    {"injection": "concat"},
    {"injection": "gated"},
    {"injection": "diagonal"},
    {"injection": "add", "start": "zeros"},
    {"injection": "add", "start": "noise"},
    {"injection": "add", "start": "noise", "noise": 1.0},
    {"prelude": 2, "core": 1, "coda": 1},
    {"prelude": 1, "core": 1, "coda": 2},
]


@torch.no_grad()
def test_every_option_of_structure_changes_the_answer(tokens):
    wide = {"initializer_range": 0.2}
    logits = [model(more=wide, **options)(tokens).logits for options in ({}, *OPTIONS)]
    for number, one in enumerate(logits):
        for other in logits[:number]:
            assert (one - other).abs().max() > 1e-4


@torch.no_grad()
def test_every_option_of_exits_and_caches_is_read(tokens):
    sure = {"exits": "gate", "more": {"initializer_range": 0.3}}
    early, late = (model(threshold=threshold, **sure)(tokens).steps for threshold in (0.5, 0.9))
    assert early.sum() < late.sum() < model(**sure)(tokens).steps.sum() == 5 * 24
    losses = [model(entropy=entropy, **sure)(tokens, labels=tokens).loss for entropy in (0.0, 0.5)]
    assert losses[1] < losses[0] - 1e-3
    for name, policy in {"exact": lm.Exact(), "latest": lm.Latest(), "first": lm.First(), "last": lm.Last()}.items():
        made = model(policy=name)
        assert made.policy == policy and made(tokens).past_key_values.policy == policy
    assert model(use_cache=False)(tokens).past_key_values is None
    assert model(injection="add", truncate=2).loop.grad == grad.Truncated(2)
    assert isinstance(model(exits="every").objective, lm.EveryExit) and isinstance(model().loop.grad, grad.Full)
    tied = model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert model(pad_token_id=3).generation_config.pad_token_id == 3


TRAINED = [
    {},
    {"exits": "every"},
    {"exits": "gate", "injection": "diagonal"},
    {"injection": "concat", "start": "noise", "truncate": 2},
    {"policy": "first", "injection": "gated"},
]


@pytest.mark.parametrize("options", TRAINED, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_parameter_learns_and_checkpointing_changes_nothing(kind, options, tokens):
    made = model(kind, **options).train()
    torch.manual_seed(1)
    out = made(tokens, labels=tokens)
    plain = gradients(made, out.loss)
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
    made.activation_checkpointing_enable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in made.loop.modules())
    torch.manual_seed(1)
    again = made(tokens, labels=tokens)
    testing.assert_close(gradients(made, again.loss), plain, "steps that are run again")
    assert out.past_key_values is None
    made.activation_checkpointing_disable()
    assert not made.gradient_checkpointing


def test_checkpointing_runs_steps_again(tokens):
    made = model(steps=32, core=2, prelude=0, coda=0).train()
    kept = [observe.peak(lambda: made(tokens, labels=tokens).loss.backward()).bytes]
    made.activation_checkpointing_enable()
    kept.append(observe.peak(lambda: made(tokens, labels=tokens).loss.backward()).bytes)
    assert kept[1] < 0.4 * kept[0]


def test_losses_of_exits_against_their_words(tokens):
    """Each exit's cross-entropy by hand, from runs that are cut there."""
    labels = tokens.clone()
    labels[0, 3] = -100
    for exits in ("last", "every", "gate"):
        made = model(exits=exits, injection="add", more={"initializer_range": 0.2})
        losses = []
        for steps in range(1, 6):
            logits = made(tokens, max_steps=steps).logits[:, :-1]
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
            losses.append(flat.view(3, 7))
        losses, real = torch.stack(losses), labels[:, 1:] != -100
        made.train()
        out = made(tokens, labels=labels)
        expected = losses[-1] if exits == "last" else losses.mean(0)
        if exits == "gate":
            with observe.record(made) as tape:
                made.eval()(tokens, use_cache=False)
            left, weights = torch.ones(3, 8), []
            for score in tape.only.scores:
                weights.append(left * score.sigmoid())
                left = left * (1 - score.sigmoid())
            weights[-1] = weights[-1] + left
            weights = torch.stack(weights)[..., :-1]
            expected = (weights * losses).sum(0) + 0.05 * (weights * weights.log()).sum(0)
        testing.assert_close(out.loss.detach(), expected[real].mean().detach(), exits)
        if out.exits is not None:
            testing.assert_close(out.exits, losses[:, real].mean(1).detach(), "each exit's own loss")
        assert (out.exits is None) == (exits == "last")


def test_a_number_of_items_divides_the_loss(tokens):
    made = model().train()
    mean = made(tokens, labels=tokens).loss
    summed = made(tokens, labels=tokens, num_items_in_batch=torch.tensor(7)).loss
    testing.assert_close(summed, mean * 21 / 7, "21 next tokens")


def test_it_trains_in_the_trainer(tmp_path, tokens):
    made = model(exits="gate", injection="diagonal", more={"initializer_range": 0.1})
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens.repeat(4, 1)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=5,
        activation_checkpointing=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(made, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0])
    assert all(not torch.equal(weight, before[name]) for name, weight in made.named_parameters())
    assert trainer.evaluate()["eval_loss"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    testing.assert_close(saved(tokens).logits, made.eval()(tokens).logits, "the trainer's checkpoint")


def environment() -> dict[str, str]:
    source = str(Path(loopaware.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, *filter(None, sys.path)])}


@pytest.mark.parametrize(
    "first",
    [
        "import loopaware",
        pytest.param("import loopaware.lm", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoModelForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_three_lines_load_it(first, tmp_path, tokens):
    made = model(injection="diagonal", exits="gate", threshold=0.9)
    made.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    code = f"""{first}
import loopaware
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(model({tokens.tolist()} and __import__("torch").tensor({tokens.tolist()})).logits.double().sum().item())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - made(tokens).logits.double().sum().item()) < 1e-3


@pytest.fixture
def folder(tmp_path) -> Path:
    model(injection="add").save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **weights: torch.Tensor | None) -> None:
    held = load_file(folder / "model.safetensors") | weights
    held = {name: weight for name, weight in held.items() if weight is not None}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


WHOLE = r"must hold a whole LoopedForCausalLM, got"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"norm.weight": None}, rf"{WHOLE} norm\.weight missing\. Fetch or save it again; weights of parts"),
        ({"loop.halt.x": torch.ones(1)}, rf"{WHOLE} loop\.halt\.x unexpected\. .* once the same parts are in model"),
        ({"norm.weight": torch.ones(7)}, rf"{WHOLE} norm\.weight \(7,\) for \(16,\) of another shape"),
        ({"norm.weight": torch.full((16,), float("nan"))}, rf"{WHOLE} norm\.weight with nan or inf"),
        ({f"x.{i}": torch.ones(1) for i in range(9)}, r"x\.0, x\.1, x\.2, x\.3, x\.4 and 4 more unexpected"),
    ],
)
def test_a_checkpoint_is_whole_or_refused(weights, message, folder):
    edit(folder, **weights)
    with pytest.raises(ValueError, match=rf"{folder}.*{message}|{message}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_things_that_are_wrong_with_a_folder(folder, tmp_path_factory):
    made, info = LoopedForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(made, LoopedForCausalLM) and not info["missing_keys"]
    edit(folder, **{"norm.weight": torch.ones(7)})
    assert LoopedForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).norm.weight.shape == (16,)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=rf"{folder} {WHOLE}: Error while deserializing header"):
        AutoModelForCausalLM.from_pretrained(folder)
    other = tmp_path_factory.mktemp("dense")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**base())).save_pretrained(other)
    with pytest.raises(ValueError, match=rf"{other} {WHOLE}: model_type must be 'looped', got 'llama'\. Load it with"):
        LoopedForCausalLM.from_pretrained(other)
    config = json.loads((folder / "config.json").read_text())
    loopaware.files.write(folder / "config.json", json.dumps(config | {"steps": 0}))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": 0}, "core must be at least 1, got 0"),
        ({"prelude": -1}, "prelude must be at least 0, got -1"),
        ({"coda": 3}, r"must add up to the base's 4 layers, got 6\. Set num_hidden_layers of the base"),
        ({"truncate": 0, "injection": "add"}, "truncate must be at least 1, got 0"),
        ({"truncate": 2}, r"truncate must be None where nothing is injected, got 2\. Prelude and embeddings"),
        ({"start": "zeros"}, r"start must be 'input' where nothing is injected, got 'zeros'\. The loop would never"),
        ({"injection": "sum"}, r"injection must be one of none, add, .*, got 'sum'\. Choose one\."),
        ({"start": "one", "injection": "add"}, "start must be one of input, zeros, noise, got 'one'"),
        ({"threshold": 1.5}, r"threshold must be a number from 0\.0 to 1\.0, got 1\.5\. Set it in the config"),
        ({"noise": "much"}, r"noise must be a number from 0\.0 to inf, got 'much'"),
        ({"entropy": -0.1}, r"entropy must be a number from 0\.0 to inf, got -0\.1"),
        ({"policy": "all"}, "policy must be one of latest, exact, first, last, got 'all'"),
        ({"exits": "all"}, "exits must be one of last, every, gate, got 'all'"),
    ],
)
def test_configs_that_are_refused(options, message):
    sizes = {"prelude": 1, "core": 2, "coda": 1}
    with pytest.raises(ValueError, match=message):
        LoopedConfig(base=base(), **sizes | options)


def test_more_that_is_refused(tokens):
    with pytest.raises(ValueError, match=r"base must be one of gpt2, llama, .*, got 'bloom'\. Take a base of these"):
        LoopedForCausalLM(LoopedConfig(base={"model_type": "bloom", "n_layer": 2}, prelude=0, core=2, coda=0))
    with pytest.raises(ValueError, match="grad must differentiate every step when halting is learned"):
        model(exits="gate", injection="add", truncate=2)
    for given, what in ({}, "none"), ({"input_ids": tokens, "inputs_embeds": torch.ones(3, 8, 16)}, "both"):
        with pytest.raises(
            ValueError, match=rf"exactly one of input_ids and inputs_embeds must be given, got {what}\."
        ):
            model()(**given)
    for name in ("embed", "behind"):
        with pytest.raises(NotImplementedError, match=f"must have a method `{name}`, got none"):
            getattr(lm.RecurrentForCausalLM, name)(None, tokens, None)
    with pytest.raises(ValueError, match=r"entropy must be at least 0, got -1\. 0 leaves the losses alone"):
        lm.GatedExit(-1)
    with pytest.raises(ValueError, match=r"threshold must be above 0\.0 and at most 1\.0, got 1\.5"):
        lm.ExitGate(halt.Linear(4), 1.5)
    with pytest.raises(ValueError, match="the rule in lm.ExitGate must be learned"):
        lm.ExitGate(halt.Never())
    with pytest.raises(ValueError, match="std must be above 0.0"):
        lm.Noise(0.0)


def test_a_gate_keeps_the_laws_of_a_rule(tokens):
    for threshold, training in ((1.0, True), (0.4, False), (1.0, False)):
        rule = lm.ExitGate(halt.Linear(16, bias=-1.0), threshold).train(training)
        states = [torch.randn(3, 5, 16) for _ in range(6)]
        testing.check_halt(rule, states, Rows(2))
    loop = Loop(lambda state, context, index: state * 0.9, 6, rows=2, readout=lm.Exits())
    x = torch.randn(3, 5, 16)
    for halting in (halt.Never(), halt.Converged(rtol=0.2), lm.ExitGate(halt.Linear(16), 0.4).eval()):
        testing.check_readout(lm.Exits(), loop.replace(halt=halting), x)


@torch.no_grad()
def test_noise_knows_positions(tokens):
    made = model(injection="add", start="noise", noise=0.5)
    for within in (None, 1.0):
        made.loop = made.loop.replace(init=lm.Noise(0.5, within))
        logits, _ = pieces(made, tokens, None, [3, 4])
        testing.assert_close(logits, made(tokens, use_cache=False).logits, "the same noise in pieces")
        attention = lm.Attention(None, torch.arange(900)[None])
        for rule in (made.loop.init.eval(), made.loop.init.train()):
            drawn = rule({"x": torch.zeros(1, 900, 64), "attention": attention})
            spread = 0.5 if within is None else 0.5 * 0.5396  # of a normal cut off at one standard deviation
            assert abs(drawn.std().item() - spread) < 0.01 and drawn.mean().abs() < 0.01
            assert within is None or drawn.abs().max() <= 0.5 * within + 1e-6
        made.loop.init.eval()


def test_modes_and_hooks_of_the_loop_are_kept(tokens):
    made, seen = model(exits="every", injection="add").train(), []
    made.loop.body.eval()
    made.loop.register_forward_hook(lambda *_: seen.append("loop"))
    made(tokens, labels=tokens)
    assert seen == ["loop"] and made.loop.training and not made.loop.body.training
    made.loop = made.loop.replace(grad=grad.Phantom())
    with pytest.raises(ValueError, match="readout must return the last state when no other carries a gradient"):
        made(tokens, labels=tokens)


@torch.no_grad()
def test_parts_of_the_loop_may_be_replaced(tokens):
    made = model(injection="add")
    plain = made(tokens).logits
    made.loop = made.loop.replace(execute=execute.Unrolled(), halt=halt.Converged(rtol=1e-9))
    testing.assert_close(made(tokens).logits, plain, "another execution")
    made.loop = made.loop.replace(rows=1, halt=halt.Converged(rtol=0.4), init=init.FromContext())
    out = made(tokens, use_cache=False)
    assert out.steps.shape == out.halted.shape == (3, 8) and (out.steps == out.steps[:, :1]).all()
    testing.assert_close(pieces(made, tokens, None, [])[0], out.logits, "sequences that halt as one")
