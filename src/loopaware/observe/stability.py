"""Whether a loop is stable: gradients step by step, contraction along a trajectory, the spectral radius at a state.

In: a recorded `Trajectory`, or a loop with a carry. Out: numbers for each row, and verdicts as data. The residuals
themselves are in the trajectory: `distances`, absolute, and `residuals`, relative. Deliberately elsewhere: what makes a
loop stable (`loopaware.train.stability`, `loopaware.nn.spectral_norm`, `loopaware.update`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from loopaware import noise, tree
from loopaware.checks import bounded
from loopaware.jacobian import pull, real, step
from loopaware.loop import Loop
from loopaware.observe.record import Trajectory
from loopaware.protocols import Carry, Context

__all__ = ["Health", "contraction", "gradients", "spectral_radius"]


class Health(NamedTuple):
    """How gradients fare on their way back through the steps of a loop.

    Shapes: norms (T, *rows), |dL/dh_t|, zero at steps that a row did not take; growth (*rows), the factor by which the
    norm grows with each step back, nan for rows with fewer than two steps or no gradient at all; vanishing, exploding
    (*rows) bool, neither for such rows.
    """

    norms: Tensor
    growth: Tensor
    vanishing: Tensor
    exploding: Tensor

    def describe(self) -> str:
        """The verdicts in words, for people."""
        known = self.growth[~self.growth.isnan()]
        said = [f"gradients of {self.growth.numel()} rows over {len(self.norms)} steps"]
        if known.numel():
            said.append(f"times {float(known.min()):.3g} to {float(known.max()):.3g} with each step back")
        said.append(f"vanishing in {int(self.vanishing.sum())} rows, exploding in {int(self.exploding.sum())}")
        if known.numel() < self.growth.numel():
            said.append(f"unknown in {self.growth.numel() - known.numel()}")
        return "; ".join(said)


def gradients(
    path: Trajectory, loss: Tensor, gradient: Tensor | None = None, *, low: float = 1e-3, high: float = 1e3
) -> Health:
    """|dL/dh_t| at every step of every row, and whether it vanishes or explodes on the way back.

    growth = exp(-slope of log |dL/dh_t| over t), a least-squares line; a linear map with factor a and a loss on the
    last state have growth a. Over a row's n steps gradients vanish if growth^(n - 1) < low, and explode if > high.

    Take it before `loss.backward()`; the graph is kept. It is an observation and costs a backward pass.

    Args:
        path: recorded with `states=True` under a rule that differentiates every step.
        loss: any tensor that comes from the loop's value.
        gradient: dL/d`loss`; needed where `loss` is not one number.
        low: ratio of the first step's gradient to the last one's below which it is called vanishing.
        high: the ratio above which it is called exploding.

    Raises:
        ValueError: states were not recorded, the steps are not all differentiated, or not 0 < low < high.

    References: R. Pascanu et al., "On the difficulty of training recurrent neural networks", 2012, arXiv 1211.5063.

    >>> from loopaware import Loop, observe
    >>> with observe.record(loop := Loop(lambda state, context, index: state / 4, max_steps=9), states=True) as tape:
    ...     value = loop(torch.ones(1, 2, requires_grad=True)).value
    >>> observe.gradients(tape.only, value.sum()).describe()
    'gradients of 1 rows over 9 steps; times 0.25 to 0.25 with each step back; vanishing in 1 rows, exploding in 0'
    """
    if not 0.0 < low < high:
        raise ValueError(f"low must be above 0 and below high, got {low} and {high}. Ratios around one are healthy.")
    if path.states is None:
        raise ValueError(
            "the states of a trajectory must be recorded, got None. Take observe.record(model, states=True)."
        )
    norms = torch.stack(reached(path, loss, gradient)) * path.alive if len(path.alive) else path.residuals
    some = norms.amax(0) > 0 if len(norms) else path.halted & False
    logs = norms.clamp(min=torch.finfo(norms.dtype).tiny).log()
    growth = torch.where(some, torch.exp(-fitted(logs, path.alive)), math.nan)
    ratio = growth ** (path.alive.sum(0) - 1)
    return Health(norms, growth, ratio < low, ratio > high)


def reached(path: Trajectory, loss: Tensor, gradient: Tensor | None) -> list[Tensor]:
    """The norms of dL/dh_t of each row, step by step. Shapes: T times (*rows)."""
    states = [tree.leaves(state) for state in path.states or ()]
    wanted = [leaf for leaves in states for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(loss, wanted, gradient, retain_graph=True, allow_unused=True) if wanted else ()
    by_leaf = {id(leaf): slope for leaf, slope in zip(wanted, found, strict=True) if slope is not None}
    slopes = [[by_leaf.get(id(leaf)) for leaf in leaves] for leaves in states]
    known = [any(slope is not None for slope in each) for each in slopes]
    cut = [index + 1 for index, reach in enumerate(known) if not reach and (any(known[index:]) or not any(known))]
    if cut:
        raise ValueError(
            f"every step must be differentiated for its gradient to be seen, got none at steps {cut}. "
            "Record with grad.Full(), gradients enabled and something trainable, and give the loss of that very run."
        )
    axes = path.steps.ndim
    return [
        torch.stack([squared(leaf if slope is None else slope, axes) * (slope is not None) for leaf, slope in pairs])
        .sum(0)
        .sqrt()
        for pairs in (zip(leaves, each, strict=True) for leaves, each in zip(states, slopes, strict=True))
    ]


def contraction(path: Trajectory, floor: float = 1e-6) -> Tensor:
    """By which factor a row's steps shrink, step after step: exp(slope of log max |h_t - h_{t-1}| over t).

    A least-squares line through the recorded `distances`. Below one the loop was coming to rest, and is about
    d factor / (1 - factor) away from there if its last step had length d; an estimate along one path, no bound.

    Args:
        floor: steps with a smaller relative residual are left out: rounding, not contraction. For float64 give less.

    Shapes: -> (*rows), nan for rows with fewer than two such steps.

    >>> from loopaware import Loop, observe
    >>> with observe.record(loop := Loop(lambda state, context, index: state / 4 + 1, max_steps=9)) as tape:
    ...     _ = loop(torch.ones(1, 2))
    >>> observe.contraction(tape.only)
    tensor([0.2500])
    """
    logs = path.distances.clamp(min=torch.finfo(path.distances.dtype).tiny).log()
    return fitted(logs, path.alive & (path.residuals > floor)).exp()


@torch.no_grad()
def spectral_radius(
    loop: Loop, carry: Carry, context: Context, *, iterations: int = 100, memory: bool = False, seed: int = 0
) -> Tensor:
    """The largest |eigenvalue| of the Jacobian of one step at the state of `carry`, sequence by sequence.

    v <- J^T v again and again;  radius = exp(slope of log |J^T...J^T v| over the second half of the iterations)

    Below one the loop comes to rest from nearby, at that factor per step in the end. The fitted growth of norms is a
    geometric mean, which a pair of complex eigenvalues leaves in peace where a Rayleigh quotient would swing; the error
    fades with the square of the iterations for such pairs, geometrically where one eigenvalue leads, and slowly where
    several are nearly as large. It may be somewhat low. One forward pass, and `iterations` backward passes through it.

    Args:
        carry: `loop(context).carry`, or with another state `carry._replace(state=state)`.
        iterations: products with the Jacobian.
        memory: let the update's memory move too, without which `update.Momentum` and `update.LSTM` are no map of their
            own; for `update.Dropout` in training leave it: its mask stays as it is, an eigenvalue of one.
        seed: of the first v, which is the same for every sequence.

    Shapes: -> (batch); tokens that halt by themselves belong to the one map of their sequence; near zero for padding.

    Raises:
        ValueError: fewer than four iterations.

    References: R. von Mises, H. Pollaczek-Geiringer, "Praktische Verfahren der Gleichungsauflösung", 1929,
    doi 10.1002/zamm.19290090206 (power iteration).

    >>> from loopaware import Loop
    >>> turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])       # eigenvalues 0.9 (0.6 ± 0.8 i)
    >>> loop = Loop(lambda state, context, index: state @ turn, max_steps=3)
    >>> spectral_radius(loop, loop(x := torch.ones(1, 2)).carry, x)
    tensor([0.9000])
    """
    bounded("iterations", iterations, "The second half of them is fitted.", least=4)
    taken = step(loop, carry, context, memory)
    inside = [real(leaf, taken.rows) for leaf in taken.here]
    vectors = [
        started(leaf, seed + place) * mask for place, (leaf, mask) in enumerate(zip(taken.here, inside, strict=True))
    ]
    growths = []
    for _ in range(iterations):
        size = torch.stack([squared(vector, 1) for vector in vectors]).sum(0).sqrt()
        size = size.clamp(min=torch.finfo(size.dtype).tiny)
        growths.append(size.log())
        vectors = [(vector / tree.expand(size, vector)).to(vector.dtype) for vector in vectors]
        vectors = [vector * mask for vector, mask in zip(pull(taken, vectors), inside, strict=True)]
    lengths = torch.stack(growths).cumsum(0)[iterations // 2 :]
    return fitted(lengths, torch.ones_like(lengths, dtype=torch.bool)).exp()


def started(leaf: Tensor, seed: int) -> Tensor:
    """A first vector that is a function of the place alone: the same for every sequence, whatever its neighbours."""
    one = leaf[0]
    places = torch.arange(one.numel(), device=leaf.device)
    return noise.normal(places, seed).view(one.shape).to(leaf.dtype).expand_as(leaf)


def squared(leaf: Tensor, axes: int) -> Tensor:
    """The sum of squares behind the first axes, in at least float32. Shapes: (*rows, ...) -> (*rows)."""
    leaf = leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)).square()
    return leaf.flatten(axes).sum(-1) if leaf.ndim > axes else leaf


def fitted(values: Tensor, counted: Tensor) -> Tensor:
    """The slope of the least-squares line through the counted values of each row; nan through fewer than two.

    Shapes: values, counted (T, *rows) -> (*rows).
    """
    weights = counted.to(values.dtype)
    times = torch.arange(len(values), device=values.device, dtype=values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    centred = (times - (weights * times).sum(0) / weights.sum(0)) * weights
    slope = torch.where(counted, centred * values, 0.0).sum(0) / (centred * times).sum(0)
    return torch.where(counted.sum(0) > 1, slope, math.nan)
