"""How a proposal becomes the next state.

In: the state, the body's proposal, and the update's memory. Out: the next state and the memory.
Deliberately elsewhere: which rows take it (the driver keeps the others as they are). States that are trees are updated
leaf by leaf; updates with parameters share them among leaves of the same features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopaware import tree
from loopaware.checks import between, bounded, shown
from loopaware.protocols import Memory, State, Update

__all__ = ["GRU", "LSTM", "Damped", "Dropout", "Gated", "Momentum", "Quantized", "Replace", "Residual"]


@dataclass(frozen=True)
class Replace:
    """Take the proposal: h' = p.

    The default; right for blocks with residual connections of their own.

    >>> Replace()(torch.zeros(1), torch.ones(1), None)
    (tensor([1.]), None)
    """

    keeps_fixed_points = True
    takes_proposal = True  # so that a body with an inverse can be undone: `grad.Reversible`

    def start(self, state: State) -> None: ...
    def __call__(self, state: State, proposal: State, memory: None) -> tuple[State, None]:
        return proposal, None


class Residual(nn.Module):
    """Move towards the proposal by a learned gain for each feature: h' = h + g * (p - h).

    Use it to begin as (nearly) the identity and learn how much each feature moves, as in ReZero and LayerScale.

    Args:
        dim: features of the state.
        gain: of every feature before training; 0 is the identity.

    Shapes: h, p (*rows, ..., dim).

    References: T. Bachlechner et al., "ReZero is All You Need", 2020, arXiv 2003.04887.

    >>> Residual(1, gain=0.5)(torch.zeros(1), torch.ones(1), None)[0].item()
    0.5
    """

    keeps_fixed_points = True

    def __init__(self, dim: int, gain: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.full((bounded("dim", dim, "Give the state's features."),), float(gain)))

    def start(self, state: State) -> None: ...
    def forward(self, state: State, proposal: State, memory: None) -> tuple[State, None]:
        return tree.map(lambda h, p: h + self.gain * (p - h), state, proposal), None

    def extra_repr(self) -> str:
        return f"dim={self.gain.numel()}"


@dataclass(frozen=True)
class Damped:
    """Move a fixed part of the way to the proposal: h' = (1 - r) h + r p.

    Use it to calm a loop that oscillates, or with r = 1/N to keep the size of N residual steps that of one. Below one
    it only slows a loop that converges by itself.

    Args:
        rate: r, above 0 and at most 1.

    Raises:
        ValueError: the rate is out of range.

    >>> Damped(0.8)(torch.zeros(1), torch.ones(1), None)
    (tensor([0.8000]), None)
    """

    keeps_fixed_points = True
    rate: float = 0.5

    def __post_init__(self):
        between("rate", self.rate, 0.0, 1.0, "1 takes the whole proposal.")

    def start(self, state: State) -> None: ...
    def __call__(self, state: State, proposal: State, memory: None) -> tuple[State, None]:
        return tree.map(lambda h, p: torch.lerp(h, p, self.rate), state, proposal), None


class Gated(nn.Module):
    """Keep or take, by a gate that reads both: c = sigmoid(W [h; p] + b), h' = c * h + (1 - c) * p.

    Use it where some features must be carried unchanged over many steps.

    Args:
        dim: features of the state.
        chrono: steps that memories should be able to span; None leaves the gate's bias at zero.

    Shapes: h, p (*rows, ..., dim).

    References: R. Csordas et al., "The Neural Data Router", 2021, arXiv 2110.07732. C. Tallec, Y. Ollivier, "Can
    recurrent neural networks warp time?", 2018, arXiv 1804.11188 (chrono).

    >>> h = torch.ones(2, 4)
    >>> torch.equal(Gated(4)(h, h, None)[0], h)
    True
    """

    keeps_fixed_points = True

    def __init__(self, dim: int, chrono: int | None = None):
        super().__init__()
        self.gate = nn.Linear(2 * bounded("dim", dim, "Give the state's features."), dim)
        with torch.no_grad():
            self.gate.bias.copy_(torch.zeros(dim) if chrono is None else chrono_bias(dim, chrono))

    def start(self, state: State) -> None: ...
    def forward(self, state: State, proposal: State, memory: None) -> tuple[State, None]:
        def step(h: Tensor, p: Tensor) -> Tensor:
            return torch.lerp(h, p, 1 - torch.sigmoid(self.gate(torch.cat([h, p], -1))))

        return tree.map(step, state, proposal), None


class GRU(nn.Module):
    """The gated recurrent unit with the proposal as its input: h' = (1 - z) * n + z * h.

    r = sigmoid(W_r p + U_r h), z = sigmoid(W_z p + U_z h), n = tanh(W_n p + r * U_n h), biases left out. The standard
    cell, as slot attention uses it: the state stays within (-1, 1) and a fixed point of the body is none of the loop.

    Args:
        dim: features of the state.
        chrono: steps that memories should be able to span; None keeps PyTorch's initialisation.

    Shapes: h, p (*rows, ..., dim).

    References: K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, arXiv 1406.1078.

    >>> GRU(4)(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), None)[0].shape
    torch.Size([2, 3, 4])
    """

    keeps_fixed_points = False

    def __init__(self, dim: int, chrono: int | None = None):
        super().__init__()
        self.cell = nn.GRUCell(bounded("dim", dim, "Give the state's features."), dim)
        if chrono is not None:
            with torch.no_grad():  # gates in PyTorch's order r, z, n; the two biases add up
                self.cell.bias_ih[dim : 2 * dim] = chrono_bias(dim, chrono)
                self.cell.bias_hh[dim : 2 * dim] = 0.0

    def start(self, state: State) -> None: ...
    def forward(self, state: State, proposal: State, memory: None) -> tuple[State, None]:
        def step(h: Tensor, p: Tensor) -> Tensor:
            return self.cell(p.reshape(-1, p.shape[-1]), h.reshape(-1, h.shape[-1])).view_as(h)

        return tree.map(step, state, proposal), None


class LSTM(nn.Module):
    """The long short-term memory cell with the proposal as its input: c' = f * c + i * g, h' = o * tanh(c').

    i, f, o = sigmoid(W p + U h), g = tanh(W_g p + U_g h), biases left out; c starts at zero and is the update's memory.
    Use it for loops of hundreds of steps that must not forget; a fixed point of the body is none of the loop.

    Args:
        dim: features of the state.
        chrono: steps that memories should be able to span; None keeps PyTorch's initialisation.

    Shapes: h, p, c (*rows, ..., dim).

    References: S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", 1997, doi 10.1162/neco.1997.9.8.1735.

    >>> cell = LSTM(4)
    >>> h = torch.zeros(2, 4)
    >>> cell(h, torch.ones(2, 4), cell.start(h))[1].shape
    torch.Size([2, 4])
    """

    keeps_fixed_points = False

    def __init__(self, dim: int, chrono: int | None = None):
        super().__init__()
        self.cell = nn.LSTMCell(bounded("dim", dim, "Give the state's features."), dim)
        if chrono is not None:
            with torch.no_grad():  # gates in PyTorch's order i, f, g, o; the two biases add up
                forget = chrono_bias(dim, chrono)
                self.cell.bias_ih[: 2 * dim] = torch.cat([-forget, forget])
                self.cell.bias_hh[: 2 * dim] = 0.0

    def start(self, state: State) -> Memory:
        return tree.map(torch.zeros_like, state)

    def forward(self, state: State, proposal: State, memory: Memory) -> tuple[State, Memory]:
        def step(h: Tensor, p: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            flat = [leaf.reshape(-1, leaf.shape[-1]) for leaf in (p, h, c)]
            new, cell = self.cell(flat[0], (flat[1], flat[2]))
            return new.view_as(h), cell.view_as(c)

        both = tree.map(step, state, proposal, memory)
        return tree.map(lambda _, pair: pair[0], state, both), tree.map(lambda _, pair: pair[1], state, both)


@dataclass(frozen=True)
class Momentum:
    """Let changes gather speed: v' = m v + (p - h), h' = h + r v'.

    The heavy-ball step. Use it where a loop creeps to its fixed point along few directions; it may overshoot. Its
    memory is the velocity v, zero at the start.

    Args:
        momentum: m, from 0 to below 1.
        rate: r, above 0 and at most 1.

    Raises:
        ValueError: a number is out of range.

    References: B. T. Polyak, "Some methods of speeding up the convergence of iteration methods", 1964,
    doi 10.1016/0041-5553(64)90137-5.

    >>> Momentum(0.5)(torch.zeros(1), torch.ones(1), torch.ones(1))
    (tensor([1.5000]), tensor([1.5000]))
    """

    keeps_fixed_points = True
    momentum: float = 0.9
    rate: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be from 0 to below 1, got {self.momentum}. At 1 changes would never fade.")
        between("rate", self.rate, 0.0, 1.0, "1 takes the whole velocity.")

    def start(self, state: State) -> Memory:
        return tree.map(torch.zeros_like, state)

    def __call__(self, state: State, proposal: State, memory: Memory) -> tuple[State, Memory]:
        velocity = tree.map(lambda h, p, v: self.momentum * v + (p - h), state, proposal, memory)
        return tree.map(lambda h, v: h + self.rate * v, state, velocity), velocity


class Dropout(nn.Module):
    """Hide the same features of the proposal at every step of a run: h' = inner(h, m * p).

    m is drawn once, in `start`, from {0, 1 / (1 - rate)}, 1 / (1 - rate) with chance 1 - rate; it is the update's
    memory next to the inner one, so that it travels in the carry. A map that is masked the same way at every step still
    has fixed points, which fresh masks destroy. In evaluation there is no mask. Take a body whose proposal keeps its
    size (`nn.Post`): where the proposal is the state plus something (`nn.Pre`), what is kept grows by 1 / (1 - rate)
    with every step.

    Args:
        inner: the update that is given what is left of the proposal, for example `Replace()`.
        rate: the share that is hidden in training, above 0 and below 1.
        shared: one mask for all positions of a sequence, as in the paper; else each position has its own.

    Shapes: h, p, m (*rows, ..., d).

    Raises:
        ValueError: the rate is out of range.

    References: Y. Gal, Z. Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks",
    2015, arXiv 1512.05287 (there time is the time of the sequence, here that of the loop).

    >>> drop = Dropout(Replace(), rate=0.5)
    >>> mask, _ = drop.start(h := torch.ones(1, 4))
    >>> torch.equal(drop(h, h, (mask, None))[0], mask * h)
    True
    """

    def __init__(self, inner: Update, rate: float, shared: bool = False):
        super().__init__()
        if not 0.0 < rate < 1.0:
            raise ValueError(f"rate must be above 0 and below 1, got {rate}. Take the inner update alone for none.")
        self.inner = inner
        self.rate = rate
        self.shared = shared

    @property
    def keeps_fixed_points(self) -> bool:
        return self.inner.keeps_fixed_points and not self.training

    def start(self, state: State) -> Memory:
        return tree.map(self.mask, state) if self.training else None, self.inner.start(state)

    def forward(self, state: State, proposal: State, memory: Memory) -> tuple[State, Memory]:
        mask, inner = memory
        if mask is not None:  # by the carry and not by the mode: a run keeps its mask to its end
            proposal = tree.map(torch.mul, proposal, mask)
        state, inner = self.inner(state, proposal, inner)
        return state, (mask, inner)

    def mask(self, leaf: Tensor) -> Tensor:
        """The mask of one tensor of the state. Shapes: (*rows, ...) -> the same."""
        positions = leaf.ndim - 2 if self.shared else 0
        shape = (leaf.shape[0], *[1] * positions, leaf.shape[-1]) if positions > 0 else leaf.shape
        kept = torch.rand(shape, device=leaf.device) >= self.rate
        return (kept.to(leaf.dtype) / (1 - self.rate)).expand_as(leaf)

    def extra_repr(self) -> str:
        inner = "" if isinstance(self.inner, nn.Module) else f"{shown(self.inner)}, "
        return f"{inner}rate={self.rate}, shared={self.shared}"


class Quantized(nn.Module):
    """Keep the state in few bits between steps: h' = Q(inner(h, p)), dQ/dh := 1 (straight through).

    Integers of b bits share a scale for each position: Q(h) = s round(h / s), s = max |h| / (2^(b-1) - 1) over the
    features. Half precisions round each number. The state is rounded in place, so that errors are those of a stored
    one; bytes are saved by whoever stores it so (`observe.cost` counts the state as it is held). Where the loop
    contracts, errors stay within a few roundings' size; elsewhere they grow (`loopaware bench quantized`).

    Args:
        inner: the update whose result is rounded, for example `Replace()`.
        kind: b, from 2 to 16, or a floating-point type such as `torch.bfloat16`.

    Shapes: h, p (*rows, ..., d).

    Raises:
        ValueError, TypeError: the number of bits is out of range, or the type is no floating-point type.

    References: M. Nagel et al., "A White Paper on Neural Network Quantization", 2021, arXiv 2106.08295.

    >>> Quantized(Replace(), 4)(torch.zeros(1, 3), torch.tensor([[0.0, 0.3, 0.7]]), None)[0]
    tensor([[0.0000, 0.3000, 0.7000]])
    """

    keeps_fixed_points = False

    def __init__(self, inner: Update, kind: int | torch.dtype):
        super().__init__()
        if isinstance(kind, torch.dtype):
            if not kind.is_floating_point:
                raise TypeError(f"kind must be a floating-point type, got {kind}. For integers give the bits.")
        elif bounded("kind", kind, "Four and eight bits are usual.", least=2) > 16:
            raise ValueError(f"kind must be at most 16 bits, got {kind}. Take torch.float32 for more.")
        self.inner = inner
        self.kind = kind

    def start(self, state: State) -> Memory:
        return self.inner.start(state)

    def forward(self, state: State, proposal: State, memory: Memory) -> tuple[State, Memory]:
        new, memory = self.inner(state, proposal, memory)
        return tree.map(lambda h: h + (self.rounded(h.detach()) - h.detach()), new), memory

    def rounded(self, h: Tensor) -> Tensor:
        """The nearest number that can be stored. Shapes: (*rows, ..., d) -> the same."""
        if isinstance(self.kind, torch.dtype):
            return h.to(self.kind).to(h.dtype)
        most = 2 ** (self.kind - 1) - 1
        scale = h.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny) / most
        return (h / scale).round() * scale

    def extra_repr(self) -> str:
        inner = "" if isinstance(self.inner, nn.Module) else f"{shown(self.inner)}, "
        return f"{inner}kind={self.kind}"


def chrono_bias(dim: int, steps: int) -> Tensor:
    """Biases log(u), u ~ U(1, steps - 1), of gates that keep: memories then span 1 to `steps` steps."""
    bounded("chrono", steps, "Give the number of steps to remember, or None.", least=3)
    return torch.empty(dim).uniform_(1, steps - 1).log()
