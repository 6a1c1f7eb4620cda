"""A transformer block with a linear solver in place of attention: python examples/solver_in_a_block.py, some seconds.

Each sequence holds points (u, y) of a linear function of its own, with noise, and a last u whose y is asked for. The
sub-layer solves a ridge regression over the tokens before it, (K^T K + ridge) X = K^T V, and reads X with its queries:
what attention can only learn to imitate, a solver does. It is a loop of conjugate gradients that stops sequence by
sequence at a relative residual of 1e-4, and its gradient is that of the solution (`grad.Implicit`), however many steps
were taken. A block with attention in the solver's place is trained beside it.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn

from loopaware import Loop, body, grad, halt, solve
from loopaware.body import Iterate
from loopaware.body.operators import Dense
from loopaware.nn import Attention, FeedForward

POINTS, FEATURES, WIDTH, DIM, BATCH = 16, 4, 8, 32, 64


def bounded_step(residual: Tensor, context: dict[str, Tensor]) -> Tensor:
    """A plain step that contracts for every positive definite matrix: no row sum is below its largest eigenvalue."""
    return residual / context["matrix"].abs().sum(-1).amax(-1, keepdim=True)


class Regression(nn.Module):
    """y_t = W_o X^T q_t with (K^T K + ridge) X = K^T V over a sequence's tokens. Shapes: (B, T, D) -> the same."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.keys, self.queries, self.values = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, dim)
        self.ridge = nn.Parameter(torch.zeros(()))
        fast = body.ConjugateGradient(Dense())
        self.loop = Loop(
            body.Surrogate(fast, body.Corrected(Dense(), bounded_step)),
            max_steps=50,
            init=fast.start,
            halt=halt.Below(Iterate.relative, 1e-4),
            grad=grad.Implicit(solve.Anderson(tolerance=1e-3, memory=2 * width)),
        )
        self.steps, self.halted = torch.zeros(0), torch.zeros(0)

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Shapes: known (B, T) bool, the tokens that are looked at."""
        keys, values = (layer(tokens) * known[..., None] for layer in (self.keys, self.values))
        matrix = keys.mT @ keys + self.ridge.exp() * torch.eye(keys.shape[-1])
        # Every feature of the values is a right-hand side of its own: (B, W, W) for a matrix (B, 1, W, W).
        out = self.loop({"x": (keys.mT @ values).mT, "matrix": matrix[:, None]})
        self.steps, self.halted = out.steps, out.halted
        return self.out(self.queries(tokens) @ out.value.x.mT)


class Attended(nn.Module):
    """Attention in the solver's place."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention = Attention(dim, heads=4)

    def forward(self, tokens: Tensor, known: Tensor) -> Tensor:
        return self.attention(tokens, mask=known)


class Model(nn.Module):
    """Embedding, one block, head."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.embedding = nn.Linear(FEATURES + 2, DIM)
        self.mixer, self.feedforward = mixer, FeedForward(DIM)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.head = nn.Linear(DIM, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        known = tokens[..., -1] == 0
        h = self.embedding(tokens)
        h = h + self.mixer(self.norms[0](h), known)
        h = h + self.feedforward(self.norms[1](h))
        return self.head(h)[:, -1, 0]


def drawn(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (u, y, asked), the last y hidden, and that y. Shapes: -> (count, POINTS + 1, FEATURES + 2), (count)."""
    u = torch.randn(count, POINTS + 1, FEATURES, generator=generator)
    slope = torch.randn(count, FEATURES, 1, generator=generator)
    y = u @ slope + 0.1 * torch.randn(count, POINTS + 1, 1, generator=generator)
    asked = torch.zeros_like(y)
    asked[:, -1] = 1.0
    return torch.cat([u, y * (1 - asked), asked], -1), y[:, -1, 0]


def trained(mixer: nn.Module, steps: int) -> float:
    """The squared error on new sequences after training; without any skill it is FEATURES."""
    generator = torch.Generator().manual_seed(0)
    model = Model(mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, target = drawn(BATCH, generator)
        loss = (model(tokens) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        tokens, target = drawn(1000, torch.Generator().manual_seed(1))
        return (model(tokens) - target).square().mean().item()


def main(steps: int = 300) -> None:
    torch.manual_seed(0)
    for name, mixer in (("solver", Regression(DIM, WIDTH)), ("attention", Attended(DIM))):
        begun = time.perf_counter()
        error = trained(mixer, steps)
        print(f"{name:>9}: squared error {error:.3f} after {steps} training steps, {time.perf_counter() - begun:.1f} s")
        if isinstance(mixer, Regression):
            counts = torch.bincount(mixer.steps)
            taken = ", ".join(f"{steps} steps: {int(n)}" for steps, n in enumerate(counts) if n)
            print(f"           {int(mixer.halted.sum())} of {len(mixer.halted)} sequences solved to 1e-4 ({taken})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
