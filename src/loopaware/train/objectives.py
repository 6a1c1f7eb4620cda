"""What a loop is taught, as functions of its recorded trajectory: how long to run, and which steps must be right.

In: a `Trajectory` of `loopaware.observe.record`, whose scores are the logits z of a learned rule, h = sigmoid(z), and
whose weights p_t of a row sum to one; losses of single steps, where one is asked for. Out: one number for each row,
zero for padding; `mean` averages it over the real rows. A loop in a loop is recorded once for each call:
`sum(ponder_cost(call.among(outer.alive[k])) for k, call in enumerate(tape["inner"]))`. A language model has a loss for
each token, some without a label: `path.among(labels != -100)` counts the others, whether tokens halt by themselves or
whole sequences do.
Deliberately elsewhere: the losses of single steps (PyTorch), weights that grow in training (`train.Warmup`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from loopaware import tree
from loopaware.checks import between
from loopaware.protocols import Rows

if TYPE_CHECKING:
    from loopaware.observe import Trajectory


def mean(values: Tensor, path: Trajectory) -> Tensor:
    """The mean over the real rows. Shapes: (*rows) -> ()."""
    real = path.alive[0] if len(path.alive) else torch.zeros_like(path.halted)
    return (values * real).sum() / real.sum().clamp(min=1)


def ponder_cost(path: Trajectory) -> Tensor:
    """ACT's cost: N + R, the steps of a row and the weight of its last one.

    N has no gradient, so dcost/dh_n = -1 for n < N, and 0 for n = N. Add tau times it to the loss of the answer; tau is
    the price of a step. Let it grow from zero (`tau * train.Warmup(500)(step, steps)`): a price from the beginning
    teaches to stop before there is an answer.

    References: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983.
    """
    return path.steps + (path.weights * path.last).sum(0)


def expected_steps(path: Trajectory) -> Tensor:
    """E[n] = sum_t t p_t: exact for Ponder and StickBreaking, the drawn stop for StraightThrough and Gumbel."""
    return (path.weights * path.numbers).sum(0)


def expected(path: Trajectory, losses: Tensor) -> Tensor:
    """sum_t p_t loss_t. Shapes: losses (T, *rows), the loss of each row's answer after each step."""
    return (path.weights * fitting(losses, path)).sum(0)


def geometric_kl(path: Trajectory, rate: float) -> Tensor:
    """KL(p || g) with g_t = rate (1 - rate)^(t-1) and the rest at the row's last step: zero where every h is `rate`.

    The forward divergence of PonderNet: it asks for 1 / rate steps on average and for chances to explore.

    Args:
        rate: above 0 and below 1.

    Raises:
        ValueError: the rate is out of range.
    """
    between("rate", rate, 0.0, 1 - 1e-9, "It is the chance to stop at a step, one over the expected steps.")
    stay, stop = torch.tensor([1 - rate, rate], dtype=path.weights.dtype, device=path.weights.device).log()
    prior = (path.numbers - 1) * stay + torch.where(path.last, torch.zeros_like(stop), stop)
    weights = path.weights
    return (weights * (weights.clamp(min=torch.finfo(weights.dtype).tiny).log() - prior) * path.alive).sum(0)


def pondernet(path: Trajectory, losses: Tensor, rate: float = 0.2, beta: float = 0.01) -> Tensor:
    """PonderNet's loss: sum_t p_t loss_t + beta KL(p || g), for `halt.Ponder` in training.

    Each row's losses are weighted by its own p; to reduce the loss to one number first would weigh rows by strangers.

    Args:
        losses: of each step and row.
        rate: the prior expects 1 / rate steps.
        beta: weight of the prior.

    Shapes: losses (T, *rows).

    Raises:
        ValueError: losses are not one for each step and row, or the rate is out of range.

    References: A. Banino et al., "PonderNet: Learning to Ponder", 2021, arXiv 2107.05407.
    """
    return expected(path, losses) + beta * geometric_kl(path, rate)


def exit_entropy(path: Trajectory) -> Tensor:
    """H(p) = -sum_t p_t log p_t in nats: how open it is where a row stops. KL(p || uniform over T) = log T - H(p)."""
    weights = path.weights
    return -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(0)


def ouro(path: Trajectory, losses: Tensor, beta: float = 0.1) -> Tensor:
    """Ouro's loss of the first stage: sum_t p_t loss_t - beta H(p).

    A uniform prior where PonderNet has a geometric one: no depth is favoured, and late steps go on being taught. For
    `halt.Ponder` in training, with an epsilon near zero so that every row takes all steps; `halt.Ponder(rule,
    epsilon=1 - q, sampled=False)` then stops where the chance of having stopped reaches q, as Ouro does.

    Args:
        losses: of each step and row.
        beta: weight of the entropy, 0.1 at first and 0.05 later in the paper.

    Shapes: losses (T, *rows).

    Raises:
        ValueError: losses are not one for each step and row.

    References: R.-J. Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025, arXiv 2510.25741.
    """
    return expected(path, losses) - beta * exit_entropy(path)


def improvement(path: Trajectory, losses: Tensor, threshold: float = 0.005, sharpness: float = 50.0) -> Tensor:
    """Ouro's loss of the second stage: binary cross-entropy of h_t against "did step t no longer help?".

    target_t = 1 - sigmoid(sharpness (max(0, loss_{t-1} - loss_t) - threshold)), t = 2, 3, ...; mean over those steps

    It teaches the rule alone, on losses of a model that stays as it is; the targets have no gradient.

    Args:
        losses: of each step and row.
        threshold: what a step must save to be worth it, in the unit of the losses.
        sharpness: of the target around the threshold.

    Shapes: losses (T, *rows).

    Raises:
        ValueError: losses are not one for each step and row.

    References: R.-J. Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025, arXiv 2510.25741.
    """
    saved = -fitting(losses, path).detach().diff(dim=0).clamp(max=0)
    target = torch.sigmoid(sharpness * (threshold - saved)).to(path.scores.dtype)
    return over_steps(binary_cross_entropy_with_logits(path.scores[1:], target, reduction="none"), path.alive[1:])


def halting(path: Trajectory, right: Tensor) -> Tensor:
    """Binary cross-entropy of h against "is the answer right now?", mean over the steps a row took.

    The plainest way to teach `halt.Residual` or `halt.Linear`, under `halt.Watched`, which lets every step run.

    Shapes: right (T, *rows), bool or numbers in [0, 1].
    """
    target = fitting(right, path).to(path.scores.dtype)
    return over_steps(binary_cross_entropy_with_logits(path.scores, target, reduction="none"), path.alive)


def multi_exit(path: Trajectory, losses: Tensor, weight: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The mean loss of the steps a row took: sum_t w_t loss_t / sum_t w_t.

    Every exit learns to answer. Later exits count more with `weight=lambda step: step` (CALM), only those behind the
    fourth with `lambda step: step > 4`, geometrically with `lambda step: 1.2 ** step`.

    Args:
        weight: of step t = 1, 2, ..., before normalisation; None weighs all alike.

    Shapes: losses (T, *rows); weight (T, 1, ...) -> the same.

    References: T. Schuster et al., "Confident Adaptive Language Modeling", 2022, arXiv 2207.07061.
    """
    weights = path.alive if weight is None else weight(path.numbers) * path.alive
    return over_steps(fitting(losses, path), weights)


def confidence(path: Trajectory) -> Tensor:
    """How unsure the rule is: the entropy of h in nats, mean over the steps a row took; add it to sharpen decisions.

    It pulls against the exploration that PonderNet's prior asks for: never use both.
    """
    return over_steps(softplus(path.scores) - path.scores * torch.sigmoid(path.scores), path.alive)


def step_variance(path: Trajectory) -> Tensor:
    """How far a row's expected steps are from those of the others: (E[n] - mean E[n])^2; its mean is the variance.

    For even latencies. It works against adaptivity, which is why it is an option and no default.
    """
    steps = expected_steps(path)
    return (steps - mean(steps, path)).square() * (path.steps > 0)


def log_probability(path: Trajectory) -> Tensor:
    """The log-probability of a drawn stop: sum_{n<N} log(1 - h_n) + log h_N; the last is log(1 - h_N) at the bound."""
    stopped = path.last & path.halted
    return (torch.where(stopped, logsigmoid(path.scores), logsigmoid(-path.scores)) * path.alive).sum(0)


def reinforce(paths: Sequence[Trajectory], costs: Tensor) -> Tensor:
    """An unbiased gradient of the expected cost from K runs of the same rows under `halt.Sampled`.

    value = mean_k c_k;  gradient = mean_k [(c_k - b_k) grad log pi_k + grad c_k],  b_k = mean_{j != k} c_j

    The second term is the gradient through the answer itself, which is often forgotten. For a price of steps add
    tau * steps to the costs.

    Args:
        paths: the K recordings.
        costs: of each run, with gradients.

    Shapes: costs (K, *rows) -> (*rows).

    Raises:
        ValueError: fewer than two runs, or another number of costs.

    References: R. Williams, "Simple Statistical Gradient-Following Algorithms", Machine Learning 8, 1992; W. Kool et
    al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.
    """
    count = len(paths)
    if count < 2 or len(costs) != count:
        raise ValueError(
            f"reinforce must be given at least two runs and a cost for each, got {count} and {len(costs)}. "
            "Each run's baseline is the mean cost of the others."
        )
    detached = costs.detach()
    advantage = detached - (detached.sum(0) - detached) / (count - 1)
    chances = torch.stack([log_probability(path) for path in paths])
    return (costs + advantage * (chances - chances.detach())).mean(0)


def norm_stabiliser(path: Trajectory, mask: Tensor | None = None) -> Tensor:
    """(|h_t| - |h_{t-1}|)^2: the state keeps its size, whichever way it turns; the mean over the steps of a row.

    This and the next two read recorded states (`states=True`), h_1 on, so a row's second step is the first that is
    counted; norms are over features, means over a row's real positions, then over the tensors of a state. A loop that
    comes to rest needs none of them; `train.stability.jacobian` is about the map, these are about one path.

    Args:
        mask: of real positions, as it was given to the loop; without it padding inside a row counts.

    References: D. Krueger, R. Memisevic, "Regularizing RNNs by Stabilizing Activations", 2015, arXiv 1511.08400.
    """
    growths = [torch.linalg.vector_norm(leaf, dim=-1, keepdim=True).diff(dim=0).square() for leaf in recorded(path)]
    return over_steps(over_positions(growths, path, mask), path.alive[1:])


def temporal_activation(path: Trajectory, mask: Tensor | None = None) -> Tensor:
    """(h_t - h_{t-1})^2, the mean over features, positions and the steps of a row: small steps (TAR).

    References: S. Merity et al., "Revisiting Activation Regularization for Language RNNs", 2017, arXiv 1708.01009.
    """
    return over_steps(
        over_positions([leaf.diff(dim=0).square() for leaf in recorded(path)], path, mask), path.alive[1:]
    )


def activation(path: Trajectory, mask: Tensor | None = None) -> Tensor:
    """h_t^2, the mean over features, positions and the steps of a row: small states (AR, in the same paper)."""
    return over_steps(over_positions([leaf.square() for leaf in recorded(path)], path, mask), path.alive)


def recorded(path: Trajectory) -> list[Tensor]:
    """The tensors of the recorded states, steps first, in at least float32. Shapes: -> (T, *rows, ..., d) each."""
    if path.states is None:
        raise ValueError(
            "the states of a trajectory must be recorded, got None. Take observe.record(model, states=True)."
        )
    steps = zip(*(tree.leaves(state) for state in path.states), strict=True)
    stacked = [
        torch.stack([leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in each]) for each in steps
    ]
    return [leaf if leaf.ndim > path.alive.ndim else leaf[..., None] for leaf in stacked]


def over_positions(leaves: list[Tensor], path: Trajectory, mask: Tensor | None) -> Tensor:
    """The mean of each row and step over features, real positions and leaves. Shapes: (T, *rows, ...) -> (T, *rows)."""
    if not leaves:
        return path.residuals
    real = None if mask is None else mask.expand(len(leaves[0]), *mask.shape)
    return torch.stack([Rows(path.alive.ndim, real).mean(leaf).mean(-1) for leaf in leaves]).mean(0)


def over_steps(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over steps under weights that need not sum to one. Shapes: (T, *rows) -> (*rows)."""
    total = weights.sum(0)
    return (values * weights).sum(0) / torch.where(total > 0, total, torch.ones_like(total))


def fitting(values: Tensor, path: Trajectory) -> Tensor:
    """Values of each step and row, or one clear error."""
    if values.shape != path.alive.shape:
        raise ValueError(
            f"there must be one number for each step and row, shape {tuple(path.alive.shape)}, got "
            f"{tuple(values.shape)}. Take losses with reduction='none' and average what lies behind the row axes, or "
            "count positions as rows: path.among(mask)."
        )
    return values
