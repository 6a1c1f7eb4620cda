"""ALBERT: Z. Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", 2019, arXiv
1909.11942. A pretrained transformer that is a loop.

In: token ids (B, T) and a mask of the real ones. Out: logits over the vocabulary for each position. One layer is
applied N times; embeddings are narrower than the state and shared with the head. The paper's sentence-order head, which
masked language modelling does not use, is left out. Deliberately elsewhere: tokenizers and where released weights come
from (`loopaware.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loopaware import tree
from loopaware.checks import bounded
from loopaware.loop import Loop
from loopaware.nn import Block, FeedForward, LayerNorm, Post
from loopaware.protocols import Context, Output

__all__ = ["Albert", "Embedding", "Head"]

SEGMENTS = 2

MODULES = {
    "loop.body.attention.query": "albert_layers.0.attention.query",
    "loop.body.attention.key": "albert_layers.0.attention.key",
    "loop.body.attention.value": "albert_layers.0.attention.value",
    "loop.body.attention.out": "albert_layers.0.attention.dense",
    "loop.body.around_attention.norms.0": "albert_layers.0.attention.LayerNorm",
    "loop.body.feedforward.widen": "albert_layers.0.ffn",
    "loop.body.feedforward.narrow": "albert_layers.0.ffn_output",
    "loop.body.around_feedforward.norms.0": "albert_layers.0.full_layer_layer_norm",
    "loop.init.tokens": "albert.embeddings.word_embeddings",
    "loop.init.positions": "albert.embeddings.position_embeddings",
    "loop.init.segments": "albert.embeddings.token_type_embeddings",
    "loop.init.norm": "albert.embeddings.LayerNorm",
    "loop.init.widen": "albert.encoder.embedding_hidden_mapping_in",
    "head.narrow": "predictions.dense",
    "head.norm": "predictions.LayerNorm",
    "head": "predictions",
}
"""Our modules, and what released weights call them."""

COPIES = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}
"""Released names that must hold the same numbers as another one, if they are there at all."""

UNUSED = (
    "albert.pooler.weight",
    "albert.pooler.bias",
    "albert.embeddings.position_ids",
    # One number for all keys of a query, which softmax cancels: `nn.Attention` has none.
    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.key.bias",
)
"""Released names that no prediction depends on."""


class Albert(nn.Module):
    """A masked language model whose layers are one layer, in a loop.

    h_0 = W norm(token + position + segment);  h_n = layer(h_{n-1});  logits = E norm(gelu(W' h_N)) + b

    Use it with released weights (`load_released`) or train it. `loop` and `head` are ordinary parts: another halting
    rule is `model.loop.replace(halt=halt.KL(model.head))`, called with `model.context(tokens, mask)`.

    Args:
        vocabulary: how many tokens there are.
        dim: features of the state.
        heads: of the attention; divides dim.
        hidden: width of the feed-forward; None takes 4 dim.
        embedding: features of the embeddings.
        positions: the longest sequence.
        max_steps: how often the layer is applied.
        activation: of feed-forward and head; None takes the exact GELU. Google's checkpoints want
            `torch.nn.GELU("tanh")`.

    Shapes: tokens (B, T) long, mask (B, T) bool, True = real -> value (B, T, vocabulary).

    Raises:
        ValueError: a size is below 1, heads do not divide dim, or a sequence is longer than `positions`.

    References: Z. Lan et al., as above.

    >>> model = Albert(vocabulary=11, dim=8, heads=2)
    >>> out = model(torch.tensor([[1, 2, 3]]))
    >>> out.value.shape, out.steps
    (torch.Size([1, 3, 11]), tensor([12]))
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        heads: int,
        *,
        hidden: int | None = None,
        embedding: int = 128,
        positions: int = 512,
        max_steps: int = 12,
        activation: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        activation = nn.GELU() if activation is None else activation
        norm = partial(LayerNorm, eps=1e-12)
        start = Embedding(vocabulary, dim, embedding, positions)
        layer = Block(
            dim, heads, placement=Post(), norm=norm, feedforward=FeedForward(dim, hidden, activation=activation)
        )
        self.loop = Loop(layer, max_steps, init=start)
        self.head = Head(start.tokens, dim, activation)
        self.apply(small)

    def context(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor | None]:
        """What the loop is called with; pass `mask` to the loop too. Shapes: tokens, mask (B, T)."""
        return {"x": tokens, "mask": mask}

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, max_steps: int | None = None) -> Output:
        out = self.loop(self.context(tokens, mask), mask=mask, max_steps=max_steps)
        return out._replace(value=self.head(out.value))

    def load_released(self, weights: Mapping[str, Tensor]) -> Albert:
        """Take over weights under the names of transformers' `AlbertForMaskedLM`, all of them or none.

        Raises:
            ValueError: a name is missing or unknown, a shape differs, a copy differs from its original, or a number
                is not finite; names them all.
        """
        own = {released(name): parameter for name, parameter in self.named_parameters()}
        found = wrong(own, weights)
        if found:
            raise ValueError(
                f"released weights must be those of an ALBERT of this size, got {'; '.join(found)}. "
                "Build Albert(...) with the sizes of the released configuration."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        return self


class Embedding(nn.Module):
    """Where the loop starts: h_0 = W norm(token + position + segment).

    The narrow embedding keeps a large vocabulary cheap. A context without "segments" is all of the first segment.

    Args:
        vocabulary: how many tokens there are.
        dim: features of the state.
        embedding: features of the embeddings.
        positions: the longest sequence.

    Shapes: context["x"], and if given context["segments"], (B, T) long -> (B, T, dim).

    Raises:
        ValueError: a size is below 1, or a sequence is longer than `positions`.

    >>> Embedding(11, dim=8, embedding=4, positions=5)({"x": torch.tensor([[1, 2, 3]])}).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, vocabulary: int, dim: int, embedding: int, positions: int):
        super().__init__()
        remedy = "Give the sizes of the model."
        width = bounded("embedding", embedding, remedy)
        self.tokens = nn.Embedding(bounded("vocabulary", vocabulary, remedy), width)
        self.positions = nn.Embedding(bounded("positions", positions, remedy), width)
        self.segments = nn.Embedding(SEGMENTS, width)
        self.norm = LayerNorm(width, eps=1e-12)
        self.widen = nn.Linear(width, bounded("dim", dim, remedy))

    def forward(self, context: Context) -> Tensor:
        tokens = tree.content(context)
        length, longest = tokens.shape[-1], self.positions.num_embeddings
        if length > longest:
            raise ValueError(f"tokens must be at most {longest} in a row, got {length}. Cut or leave out longer ones.")
        segments = context.get("segments") if isinstance(context, Mapping) else None
        segments = torch.zeros_like(tokens) if segments is None else segments
        places = torch.arange(length, device=tokens.device)
        return self.widen(self.norm(self.tokens(tokens) + self.positions(places) + self.segments(segments)))


class Head(nn.Module):
    """What the state says of each token: logits = E norm(gelu(W h)) + b, E the token embeddings themselves.

    Serves halting rules as their head: `halt.KL(model.head)`.

    Args:
        tokens: the model's token embeddings, shared.
        dim: features of the state.
        activation: f.

    Shapes: state (..., dim) -> (..., vocabulary).

    >>> Head(nn.Embedding(11, 4), dim=8, activation=nn.GELU())(torch.ones(1, 3, 8)).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, tokens: nn.Embedding, dim: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.narrow = nn.Linear(dim, tokens.embedding_dim)
        self.activation = activation
        self.norm = LayerNorm(tokens.embedding_dim, eps=1e-12)
        self.tokens = tokens
        self.bias = nn.Parameter(torch.zeros(tokens.num_embeddings))

    def forward(self, state: Tensor) -> Tensor:
        return linear(self.norm(self.activation(self.narrow(state))), self.tokens.weight, self.bias)


def small(module: nn.Module) -> None:
    """The usual start: matrices N(0, 0.02^2), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def released(name: str) -> str:
    """The released name of one of our parameters.

    >>> released("loop.init.norm.bias"), released("head.bias")
    ('albert.embeddings.LayerNorm.bias', 'predictions.bias')
    """
    module, _, leaf = name.rpartition(".")
    theirs = MODULES[module]
    prefix = "albert.encoder.albert_layer_groups.0." if theirs.startswith("albert_layers") else ""
    return f"{prefix}{theirs}.{leaf}"


def wrong(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from being taken over, in words; empty if nothing does."""
    known = {*own, *COPIES, *UNUSED}
    found = [f"{name} missing" for name in own if name not in weights]
    found += [f"{name} unexpected" for name in weights if name not in known]
    for name, parameter in own.items():
        tensor = weights.get(name)
        if tensor is not None and tensor.shape != parameter.shape:
            found.append(f"{name} of shape {tuple(tensor.shape)} for {tuple(parameter.shape)}")
        elif tensor is not None and not torch.isfinite(tensor).all():
            found.append(f"{name} with nan or inf")
    for copy, name in COPIES.items():
        if copy in weights and name in weights and not torch.equal(weights[copy], weights[name]):
            found.append(f"{copy} other than {name}")
    return found
