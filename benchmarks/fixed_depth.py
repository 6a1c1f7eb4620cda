"""One block, twelve times: x-transformers against `Loop`, and what stopping row by row saves.

In: shapes. Out: lines for the table. x-transformers repeats a block with `Encoder(depth=1)` and `repeat_blocks=(0, 12)`
in the call; its weights are copied into a `Block`, whose further biases are zero. Deliberately elsewhere: its looped
language model, of which only the exit is asked for, and only whether it takes two sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from x_transformers import Encoder, TransformerWrapper

from loopaware import Loop, execute
from loopaware.nn import Block
from loopaware.recipes.execution import Written, drawn
from loopaware.recipes.overhead import forward, in_turns, often
from loopaware.recipes.shared import apart

RIVAL, LOOP, SEQUENCES, TOKENS = "x-transformers", "Loop", "sequences stop", "tokens stop"
FORWARD, TRAINING = "forward", "forward and backward"

EQUAL = 1e-3
"""The relative error of values and gradients above which nothing is reported (float32)."""


class Depth(NamedTuple):
    """Seconds of each way at one width; the error is that of `Loop` against x-transformers."""

    dim: int
    passes: str
    seconds: dict[str, float]
    error: float


class Looped(nn.Module):
    """A loop, and the norm that ends a stack with norms before its sub-layers."""

    def __init__(self, loop: Loop, norm: nn.Module):
        super().__init__()
        self.loop, self.norm = loop, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.loop(x).value)


def fixed_depth(dims: list[int], batch: int, tokens: int, heads: int, steps: int, repeats: int) -> list[Depth]:
    return [line for dim in dims for line in measured(dim, batch, tokens, heads, steps, repeats)]


def measured(dim: int, batch: int, tokens: int, heads: int, steps: int, repeats: int) -> list[Depth]:
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, dim)
    encoder = Encoder(dim=dim, depth=1, heads=heads, attn_dim_head=dim // heads, attn_flash=True)
    plain = Looped(Loop(Block(dim, heads), steps), nn.LayerNorm(dim))
    pairs = copied(encoder, plain)

    def rival(x: Tensor) -> Tensor:
        return encoder(x, repeat_blocks=(0, steps))

    own = passed(plain, x, [pair[0] for pair in pairs])
    expected = passed(rival, x, [pair[1] for pair in pairs])
    error = max(apart(own[0], expected[0]), apart(*(torch.cat([g.flatten() for g in e[1:]]) for e in (own, expected))))
    if error > EQUAL:
        raise ValueError(f"Loop must be within {EQUAL} of x-transformers, got {error:.1e}. Compare their weights.")
    nets = {LOOP: plain, SEQUENCES: stopping(plain, batch, 1, steps), TOKENS: stopping(plain, batch, tokens, steps)}
    lines = []
    for passes in (FORWARD, TRAINING):
        if passes == FORWARD:
            ways = {name: lambda net=net: forward(net, x) for name, net in nets.items()}
            ways[RIVAL] = lambda: forward(rival, x)
        else:
            ways = {name: lambda net=net: passed(net, x, list(net.parameters())) for name, net in nets.items()}
            ways[RIVAL] = lambda: passed(rival, x, list(encoder.parameters()))
        lines.append(Depth(dim, passes, in_turns(ways, often(repeats, x)), error))
    return lines


def stopping(plain: Looped, batch: int, tokens: int, steps: int) -> Looped:
    """The same weights, rows that stop after three steps on average, and `execute.Compacted`."""
    ends = drawn(batch, tokens, steps, min(3.0, steps))
    rule, rows = (Written(ends[:, 0]), 1) if tokens == 1 else (Written(ends), 2)
    return Looped(plain.loop.replace(halt=rule, rows=rows, execute=execute.Compacted()), plain.norm)


def copied(encoder: Any, plain: Any) -> list[tuple[Tensor, Tensor]]:
    """Copy the encoder's weights into the block. Returns pairs of ours and theirs."""
    (attend_norms, attend, _), (feed_norms, feed, _) = encoder.layers
    block = plain.loop.body
    for weight in plain.parameters():
        nn.init.zeros_(weight)  # x-transformers has no biases in attention and norms
    norms = [
        (block.around_attention.norms[0], attend_norms[0]),
        (block.around_feedforward.norms[0], feed_norms[0]),
        (plain.norm, encoder.final_norm),
    ]
    maps = [
        (block.attention.query.weight, attend.to_q.weight),
        (block.attention.key.weight, attend.to_k.weight),
        (block.attention.value.weight, attend.to_v.weight),
        (block.attention.out.weight, attend.to_out.weight),
        (block.feedforward.widen.weight, feed.ff[0][0].weight),
        (block.feedforward.widen.bias, feed.ff[0][0].bias),
        (block.feedforward.narrow.weight, feed.ff[2].weight),
        (block.feedforward.narrow.bias, feed.ff[2].bias),
    ]
    with torch.no_grad():
        for own, theirs in maps:
            own.copy_(theirs)
        for own, theirs in norms:
            own.weight.copy_(theirs.gamma + float(theirs.unit_offset))
    return [*maps, *((own.weight, theirs.gamma) for own, theirs in norms)]


def passed(function: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Forward and backward: the value, and the gradients of the weights."""
    value = function(x)
    direction = torch.linspace(-1, 1, value.numel()).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * direction).mean(), weights)]


def exit_of_two_sequences() -> str:
    """What x-transformers' looped model says when two sequences are to stop by themselves."""
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8, pre_and_post_norm=True)
    model = TransformerWrapper(num_tokens=5, max_seq_len=8, attn_layers=layers, looped=True).eval()
    try:
        model(torch.zeros(2, 8, dtype=torch.long), looped_inference=True)
    except AssertionError as error:
        return str(error)
    return "no error"
