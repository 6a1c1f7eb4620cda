"""Which keys and values should serve tokens that take more steps? python examples/keys_of_stopped_tokens.py, 70 s.

A character model of 0.2 million weights is taught the source of two packages of Python at every exit, eight steps deep.
Then source it has not seen is read token by token; a token leaves when its prediction has come to rest. Under each
policy: the loss, how far predictions are from those of the exact law, the steps that were taken and those that were
run, and the bytes of a token in the cache. `Last`, whose answer depends on the pieces, is read at once too.
"""

from __future__ import annotations

import asyncio
import email
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from loopaware import execute, halt, lm
from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM

LENGTH, BATCH, UPDATES = 96, 16, 300
BASE = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
}


def text() -> torch.Tensor:
    """The characters of asyncio and email. Shapes: -> (N) long."""
    files = [file for package in (asyncio, email) for file in sorted(Path(package.__file__).parent.rglob("*.py"))]
    return torch.tensor([min(ord(sign), 127) for file in files for sign in file.read_text()])


def taught(characters: torch.Tensor) -> LoopedForCausalLM:
    """A model trained on all but the last tenth."""
    config = LoopedConfig(base=BASE, prelude=1, core=1, coda=1, steps=8, injection="diagonal", exits="every")
    model = LoopedForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(UPDATES):
        places = torch.randint(len(characters) * 9 // 10 - LENGTH, (BATCH,))
        tokens = torch.stack([characters[place : place + LENGTH] for place in places])
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def read(model: LoopedForCausalLM, tokens: torch.Tensor, policy: lm.policies.Policy, at_once: bool = False) -> tuple:
    """Logits, and the cache. Shapes: tokens (B, T) -> (B, T, V)."""
    cache = lm.LoopCache(policy)
    pieces = [tokens] if at_once else tokens.split(1, 1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1), cache


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    started, characters = time.process_time(), text()
    model = taught(characters)
    held = characters[len(characters) * 9 // 10 :]
    tokens = held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH)[::40][:BATCH]
    rule = halt.KL(model.predict, 2e-3)
    model.loop = model.loop.replace(halt=rule, execute=execute.Compacted(break_even=0))
    exact = read(model, tokens, lm.Exact())[0].log_softmax(-1)
    print("policy             loss   KL to exact   steps   run   bytes of a token")
    for policy, at_once in [(lm.Exact(), False), (lm.Latest(), False), (lm.Last(), False), (lm.Last(), True)]:
        logits, cache = read(model, tokens, policy, at_once)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        apart = (exact.exp() * (exact - logits.log_softmax(-1))).sum(-1).mean()
        name = f"{type(policy).__name__}{', at once' if at_once else ''}"
        print(
            f"{name:16}  {loss:.4f}   {apart:.2e}     {cache.steps.float().mean():.2f}   "
            f"{cache.ran / tokens.numel():.2f}   {cache.bytes_per_token}"
        )
    print(f"{time.process_time() - started:.0f} s CPU")


if __name__ == "__main__":
    main()
