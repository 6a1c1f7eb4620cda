"""A step that can be undone: two halves of a state, each moved by what the other says.

In: a state of two halves. Out: a proposal of two halves, and, from it, the state again. Deliberately elsewhere: the
backward pass that makes use of it (`grad.Reversible`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.body.combine import Called
from loopaware.protocols import Body, Context, State

__all__ = ["Coupled"]


class Coupled(nn.Module):
    """Move one half by the other, in turn: y1 = x1 + F(x2), y2 = x2 + G(y1); back: x2 = y2 - G(y1), x1 = y1 - F(x2).

    Use it with `grad.Reversible` for loops of many steps whose states do not fit into memory. F and G should be what
    stands in a residual (a norm and attention, a norm and a feed-forward), not whole residual blocks. In training each
    of them draws from a seed of its own, so that dropout comes again when the step is undone.

    Args:
        first: F, a body.
        second: G, a body.

    Shapes: state a tuple of two, each as F and G ask (`init.Halves` splits one into two).

    References: A. Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations", 2017,
    arXiv 1707.04585.

    >>> step = Coupled(Called(torch.tanh), Called(torch.sin))
    >>> state = torch.zeros(1, 2), torch.ones(1, 2)
    >>> [half.tolist() for half in step.inverse(step(state, None, 0), None, 0)]
    [[[0.0, 0.0]], [[1.0, 1.0]]]
    """

    def __init__(self, first: Body, second: Body):
        super().__init__()
        self.first = first if isinstance(first, nn.Module) else Called(first, whole=True)
        self.second = second if isinstance(second, nn.Module) else Called(second, whole=True)

    def forward(self, state: tuple[Tensor, Tensor], context: Context, index: int) -> State:
        seeds = self.seeds(halves(state)[0])
        with seeded(seeds, 0):
            one = state[0] + self.first(state[1], context, index)
        with seeded(seeds, 1):
            return one, state[1] + self.second(one, context, index)

    def inverse(self, proposal: tuple[Tensor, Tensor], context: Context, index: int) -> State:
        """The state that was moved to `proposal`, given the random state of that step."""
        seeds = self.seeds(halves(proposal)[0])
        with seeded(seeds, 1):
            two = proposal[1] - self.second(proposal[0], context, index)
        with seeded(seeds, 0):
            return proposal[0] - self.first(two, context, index), two

    def seeds(self, like: Tensor) -> tuple[list[int], torch.device] | None:
        """A seed for each half, drawn from the CPU's generator, which a replay winds back; none in evaluation."""
        return (torch.randint(2**62, (2,)).tolist(), like.device) if self.training else None


@contextmanager
def seeded(seeds: tuple[list[int], torch.device] | None, which: int) -> Iterator[None]:
    """Let all generators begin with a seed, and be afterwards as they were."""
    if seeds is None:
        yield
        return
    device = seeds[1]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0][which])
        yield


def halves(state: State) -> tuple[Tensor, Tensor]:
    """The two halves, or one clear error."""
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(half, Tensor) for half in state)):
        raise TypeError(
            f"the state of body.Coupled must be a tuple of two tensors, got {tree.describe(state)}. "
            "Start the loop with init.Halves()."
        )
    return state[0], state[1]
