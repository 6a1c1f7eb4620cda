"""ALBERT as a loop: the numbers of transformers' implementation, weights taken over whole or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopaware import halt
from loopaware.models.albert import Albert, Embedding
from loopaware.models.albert import released as name_of
from loopaware.testing import assert_close

SIZES = {"hidden": 12, "embedding": 6, "positions": 9, "max_steps": 5}


def tiny(**changes) -> Albert:
    return Albert(11, 8, 2, **{**SIZES, **changes}).eval()


def theirs(activation: str = "gelu"):
    """Transformers' model of the same size, with weights that matter (its own start is nearly zero)."""
    transformers = pytest.importorskip("transformers", reason="pip install 'loopaware[lm]'")
    config = transformers.AlbertConfig(
        vocab_size=11,
        embedding_size=6,
        hidden_size=8,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=12,
        hidden_act=activation,
        max_position_embeddings=9,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.AlbertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def released() -> dict[str, Tensor]:
    """Weights under released names, without transformers: those of a random model of ours."""
    return {name_of(name): parameter.detach().clone() for name, parameter in tiny().named_parameters()}


def ragged() -> tuple[Tensor, Tensor]:
    """Three sequences of 9, 4 and 1 tokens."""
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    return torch.randint(1, 11, (3, 9)).masked_fill(~mask, 0), mask


@pytest.mark.parametrize(("name", "activation"), [("gelu", None), ("gelu_new", torch.nn.GELU("tanh"))])
def test_equals_transformers_with_padding_and_segments(name, activation):
    reference = theirs(name)
    model = tiny(activation=activation).load_released(reference.state_dict())
    tokens, mask = ragged()
    segments = torch.randint(0, 2, tokens.shape)
    expected = reference(input_ids=tokens, attention_mask=mask.long(), token_type_ids=segments).logits
    out = model.loop({**model.context(tokens, mask), "segments": segments}, mask=mask)
    assert_close(model.head(out.value)[mask], expected[mask], "logits of transformers")
    expected = reference(input_ids=tokens, attention_mask=mask.long()).logits
    assert_close(model(tokens, mask).value[mask], expected[mask], "logits of transformers, one segment")


def test_equals_transformers_in_gradients():
    reference = theirs()
    model = tiny().load_released(reference.state_dict())
    tokens, mask = ragged()
    model(tokens, mask).value[mask].square().mean().backward()
    reference(input_ids=tokens, attention_mask=mask.long()).logits[mask].square().mean().backward()
    layer = reference.albert.encoder.albert_layer_groups[0].albert_layers[0]
    assert_close(model.loop.init.tokens.weight.grad, reference.albert.embeddings.word_embeddings.weight.grad, "tied")
    assert_close(model.loop.body.attention.key.weight.grad, layer.attention.key.weight.grad, "shared by all loops")
    assert_close(model.head.bias.grad, reference.predictions.bias.grad, "head")


def test_every_parameter_has_a_gradient():
    model = tiny().train()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.loop({"x": tokens, "segments": torch.tensor([[0, 1, 1], [1, 0, 0]])})
    model.head(out.value).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_loops_are_counted_and_can_be_set():
    model, tokens = tiny(), torch.tensor([[1, 2, 3]])
    assert model(tokens).steps.tolist() == [5]
    one, two = (model(tokens, max_steps=steps).value for steps in (1, 2))
    assert not torch.allclose(one, two)
    state = model.loop.init(tokens)
    for _ in range(2):
        state = model.loop.body(state, None, 0)
    assert_close(two, model.head(state), "the layer, twice")


@pytest.mark.parametrize("rows", [1, 2])
def test_rules_read_the_head_and_padding_changes_nothing(rows):
    model = tiny().load_released({name: 5 * tensor for name, tensor in released().items()})
    tokens, mask = ragged()
    stopped = set()
    for rule in (halt.KL(model.head, 0.02), halt.Entropy(model.head, 2.0), halt.Confidence(model.head, 0.2)):
        loop = model.loop.replace(rows=rows, halt=rule)
        out = loop(model.context(tokens, mask), mask=mask)
        short = loop(model.context(tokens[1:2, :4], mask[1:2, :4]), mask=mask[1:2, :4])
        assert_close(short.value, out.value[1:2, :4], "padding changes no state")
        assert torch.equal(short.steps[0], out.steps[1, :4] if rows == 2 else out.steps[1])
        stopped |= set(out.steps[out.halted].tolist())
    assert stopped - {5}, "a rule stops something before the last loop"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("predictions.bias"), "predictions.bias missing"),
        (lambda w: w.update(surprise=torch.zeros(1)), "surprise unexpected"),
        (lambda w: w.update({"predictions.bias": torch.zeros(3)}), r"predictions.bias of shape \(3,\) for \(11,\)"),
        (lambda w: w["predictions.bias"].fill_(torch.nan), "predictions.bias with nan or inf"),
        (lambda w: w.update({"predictions.decoder.bias": torch.zeros(11)}), "decoder.bias other than predictions.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(change, said):
    model, weights = tiny(), {name: tensor + 1 for name, tensor in released().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=said):
        model.load_released(weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_all_that_is_wrong_is_said_at_once():
    weights = released()
    del weights["predictions.bias"]
    with pytest.raises(ValueError, match=r"predictions.bias missing; x unexpected\. Build Albert\(\.\.\.\)"):
        tiny().load_released({**weights, "x": torch.zeros(1)})


def test_names_on_which_nothing_depends_may_be_there():
    extra = {"albert.pooler.weight": torch.ones(8, 8), "albert.pooler.bias": torch.ones(8)}
    model = tiny().load_released({**released(), **extra})
    assert set(released()) == {name_of(name) for name, _ in model.named_parameters()}


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="tokens must be at most 9 in a row, got 10"):
        tiny()(torch.ones(1, 10, dtype=torch.long))


@pytest.mark.parametrize("name", ["vocabulary", "dim", "embedding", "positions"])
def test_sizes_are_checked(name):
    sizes = {"vocabulary": 11, "dim": 8, "embedding": 6, "positions": 9, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Embedding(**sizes)
