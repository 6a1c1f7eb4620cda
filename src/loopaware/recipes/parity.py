"""Parity of sparse vectors: a Repeat-RNN, ACT and PonderNet on one GRU cell, with one budget of training.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each net and seed that goes on after a
kill. All nets are `models.PonderNet` with another rule and loss, and see the same vectors: few non-zeros first, then
more, never as many as in the hardest tests. Deliberately elsewhere: vectors (`loopaware.tasks.bits`).

References: A. Graves, "Adaptive Computation Time for Recurrent Neural Networks", 2016, arXiv 1603.08983; A. Banino et
al., "PonderNet: Learning to Ponder", 2021, arXiv 2107.05407. Both take vectors of 64 entries, and hours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from loopaware import files, halt, observe, train
from loopaware.checks import bounded
from loopaware.models import PonderNet
from loopaware.observe import Report, Trajectory
from loopaware.observe.figures import figure
from loopaware.protocols import Halt
from loopaware.recipes.shared import curve, show, spread
from loopaware.tasks import bits
from loopaware.train import objectives
from loopaware.train.fit import Objective
from loopaware.train.progress import Progress, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPEAT, ACT, PONDER = "Repeat-RNN", "ACT", "PonderNet"
DRAWN = "PonderNet, drawn"


class Plan(NamedTuple):
    """How nets are made and trained."""

    width: int
    nonzeros: int
    steps: int
    batch: int
    dim: int
    rate: float
    repetitions: int
    max_steps: int
    price: float
    prior: float
    beta: float


class Score(NamedTuple):
    """One net on vectors of one number of non-zeros: accuracy, mean steps, operations of a vector, and p_n."""

    accuracy: float
    steps: float
    flops: float
    weights: list[float]


Scores = dict[str, dict[int, Score]]


def run(
    folder: Path = Path("runs/parity"),
    *,
    width: int = 16,
    nonzeros: int = 12,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 3000,
    batch: int = 128,
    dim: int = 64,
    rate: float = 1e-3,
    repetitions: int = 6,
    max_steps: int = 12,
    price: float = 1e-3,
    prior: float = 0.3,
    beta: float = 0.01,
    count: int = 1000,
    threads: int = 1,
) -> None:
    """Train a Repeat-RNN, ACT and PonderNet on parity with a curriculum, test with more non-zeros, and write a report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        width: entries of a vector; the papers' 64 takes hours.
        nonzeros: the most non-zero entries in training; tests go on to the width.
        seeds: one net of each kind is trained with each seed.
        steps: training steps of each net.
        batch: vectors in a training step.
        dim: features of the state.
        rate: learning rate of Adam.
        repetitions: steps that the Repeat-RNN always takes.
        max_steps: the most steps of ACT and PonderNet.
        price: what ACT pays for a step, growing from zero until half of training.
        prior: PonderNet's prior chance to stop at a step.
        beta: weight of PonderNet's divergence from its prior.
        count: test vectors for each number of non-zeros.
        threads: processor threads that PyTorch may use; nets this small gain nothing from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    if not 2 <= nonzeros <= width:
        raise ValueError(f"nonzeros must be from 2 to the width {width}, got {nonzeros}. Take a wider vector.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(width, nonzeros, steps, batch, dim, rate, repetitions, max_steps, price, prior, beta)
    results: dict[int, Scores] = {}
    pairs = [(seed, name) for seed in seeds for name in (REPEAT, ACT, PONDER)]
    for seed, name in within(Progress(len(pairs), done=0, wanted=True), pairs):
        print(f"seed {seed}: {name}", flush=True)
        net = trained(plan, name, seed, folder / f"{name.lower()}-{seed}")
        results.setdefault(seed, {}).update(tested(net, name, plan, count, seed))
    plain = {
        str(seed): {name: {k: s._asdict() for k, s in by.items()} for name, by in r.items()}
        for seed, r in results.items()
    }
    files.write(folder / "results.json", json.dumps({"plan": plan._asdict(), "results": plain}, indent=1))
    show(f"parity of {width} entries, trained on up to {nonzeros} non-zeros", *table(results, plan))
    print(f"report: {report(results, plan).write(folder / 'report.html')}")


def made(plan: Plan, name: str) -> PonderNet:
    """The net of one kind. PonderNet's chance to stop begins at about its prior, ACT's near 1/20."""
    rules: dict[str, Callable[[], Halt | None]] = {
        REPEAT: halt.Never,
        ACT: lambda: halt.ACT(halt.Linear(plan.dim, bias=-3.0)),
        PONDER: lambda: halt.Ponder(halt.Linear(plan.dim, bias=-1.0), seed=None),
    }
    return PonderNet(plan.width, plan.dim, 2, plan.repetitions if name == REPEAT else plan.max_steps, rules[name]())


def trained(plan: Plan, name: str, seed: int, folder: Path) -> PonderNet:
    """A net, trained or read from its finished run."""
    torch.manual_seed(seed)
    net = made(plan, name)
    train.fit(
        net,
        cast(
            Objective,
            {REPEAT: answer_loss(plan, 0.0), ACT: answer_loss(plan, plan.price), PONDER: ponder_loss(plan)}[name],
        ),
        drawn(plan),
        Adam(net.parameters(), lr=plan.rate),
        steps=plan.steps,
        journal=train.Journal(folder, log_every=20, save_every=200, about=plan._asdict()),
        seed=seed,
    )
    return net.eval()


def drawn(plan: Plan) -> Callable[[int, torch.Generator], bits.Vectors]:
    """Vectors of one or two non-zeros at first, of up to `nonzeros` from 60 % of the steps on."""

    def batches(step: int, generator: torch.Generator) -> bits.Vectors:
        most = min(plan.nonzeros, 2 + int((plan.nonzeros - 2) * step / (0.6 * plan.steps)))
        return bits.parity(plan.batch, plan.width, (1, most), generator=generator)

    return batches


Loss = Callable[[PonderNet, bits.Vectors, int], tuple[Tensor, dict[str, Tensor]]]


def answer_loss(plan: Plan, price: float) -> Loss:
    """The cross-entropy of the one answer, and a price on ACT's ponder cost."""

    def loss(net: PonderNet, batch: bits.Vectors, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with observe.record(net) as tape:
            logits = net(batch.x)
        path = tape.only
        total = cross_entropy(logits, batch.label)
        if price:
            cost = objectives.mean(objectives.ponder_cost(path), path)
            total = total + price * min(1.0, step / (0.5 * plan.steps)) * cost
        right = (logits.detach().argmax(-1) == batch.label).float().mean()
        return total, {"accuracy": right, "steps": path.steps.float().mean()}

    return loss


def ponder_loss(plan: Plan) -> Loss:
    """PonderNet's loss, on the answers of all steps."""

    def loss(net: PonderNet, batch: bits.Vectors, _: int) -> tuple[Tensor, dict[str, Tensor]]:
        path, logits = pondered(net, batch.x)
        labels = batch.label.expand(logits.shape[:-1])
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        total = objectives.mean(objectives.pondernet(path, losses, plan.prior, plan.beta), path)
        right = objectives.expected(path, (logits.detach().argmax(-1) == labels).float())
        return total, {"accuracy": right.mean(), "steps": objectives.expected_steps(path).mean()}

    return loss


def pondered(net: PonderNet, x: Tensor) -> tuple[Trajectory, Tensor]:
    """The trajectory, and the logits of every step. Shapes: -> (T, B, 2)."""
    with observe.record(net, states=True) as tape:
        net(x)
    return tape.only, net.head(torch.stack(tape.only.states or ()))


@torch.no_grad()
def tested(net: PonderNet, name: str, plan: Plan, count: int, seed: int) -> Scores:
    """Scores for every number of non-zeros; PonderNet in exact expectation, and drawn."""
    torch.manual_seed(seed)
    scores: Scores = {name: {}, **({DRAWN: {}} if name == PONDER else {})}
    for many in range(1, plan.width + 1):
        batch = bits.parity(count, plan.width, (many, many), generator=torch.Generator().manual_seed(9000 + many))
        cost = observe.cost(net.loop, net.embedding(batch.x))
        with observe.record(net) as tape:
            logits = net(batch.x)
        path = tape.only
        right = (logits.argmax(-1) == batch.label).float()
        flops = cost.executed(path.steps) / cost.rows
        plain = Score(right.mean().item(), path.steps.float().mean().item(), flops, path.weights.mean(1).tolist())
        scores[DRAWN if name == PONDER else name][many] = plain
        if name == PONDER:
            path, logits = pondered(net.train(), batch.x)
            net.eval()
            right = objectives.expected(path, (logits.argmax(-1) == batch.label).float())
            steps = objectives.expected_steps(path)
            flops = cost.executed(steps) / cost.rows
            scores[name][many] = Score(right.mean().item(), steps.mean().item(), flops, path.weights.mean(1).tolist())
    return scores


def table(results: dict[int, Scores], plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each net: accuracy and steps within the training range and beyond it."""
    names = list(next(iter(results.values())))
    parts = [(f"1 to {plan.nonzeros}", range(1, plan.nonzeros + 1))]
    if plan.width > plan.nonzeros:
        parts.append((f"{plan.nonzeros + 1} to {plan.width}", range(plan.nonzeros + 1, plan.width + 1)))

    def mean(name: str, field: str, where: range) -> list[float]:
        return [sum(getattr(scores[name][k], field) for k in where) / len(where) for scores in results.values()]

    rows = []
    for name in names:
        right = [spread(mean(name, "accuracy", where)) for _, where in parts]
        steps = [spread(mean(name, "steps", where), 1) for _, where in parts]
        rows.append([name, *right, *steps, spread([f / 1e3 for f in mean(name, "flops", parts[0][1])], 0)])
    ranges = [label for label, _ in parts]
    return ["net", *(f"right, {r}" for r in ranges), *(f"steps, {r}" for r in ranges), "kop"], rows


def report(results: dict[int, Scores], plan: Plan) -> Report:
    page = Report("Parity: one cell, three ways to ponder", seeds=tuple(results))
    page.text(
        f"Vectors of {plan.width} entries, the first k of them 1 or -1, the others 0; is the number of ones odd? One "
        f"GRU cell of {plan.dim} features sees the vector at every step. Trained for {plan.steps} steps of "
        f"{plan.batch} vectors with 1 to at most {plan.nonzeros} non-zeros, few first; tested on more. The Repeat-RNN "
        f"always takes {plan.repetitions} steps, the others at most {plan.max_steps}. Chance is .5."
    )
    page.table(*table(results, plan), caption=CAPTION)
    page.heading("Accuracy against non-zeros")
    page.figure(curves(results, plan, "accuracy"), alt="Accuracy of each net against the number of non-zeros.")
    page.heading("Steps against non-zeros")
    page.figure(curves(results, plan, "steps"), alt="Mean steps of each net against the number of non-zeros.")
    page.heading("When they stop")
    page.figure(stops(results, plan), alt="Mean halting weights of ACT and PonderNet at each step.")
    page.text(
        "PonderNet is scored in exact expectation, sum_n p_n [answer n is right], and drawn as its authors do. ACT's "
        "weights are shares of one mixed state, PonderNet's are chances to stop."
    )
    return page


CAPTION = """Share of vectors right and mean steps, over the numbers of non-zeros within the range of training and \
beyond it; kop: thousand operations for a vector within the range, if stopped vectors cost nothing. The mean over \
seeds, and the smallest and largest where they differ."""


def curves(results: dict[int, Scores], plan: Plan, field: str) -> Figure:
    made = figure(7, 3.6)
    (axes,) = made.axes
    counts = list(range(1, plan.width + 1))
    for name in next(iter(results.values())):
        curve(axes, counts, [[getattr(scores[name][k], field) for k in counts] for scores in results.values()], name)
    axes.axvline(plan.nonzeros, color="black", lw=0.8, ls=":", marker="")
    axes.set(xlabel="non-zeros (dotted: the most of training)", ylabel=field, xticks=counts)
    axes.legend(fontsize="small")
    return made


def stops(results: dict[int, Scores], plan: Plan) -> Figure:
    made = figure(9, 3.4, columns=2)
    for axes, name in zip(made.axes, (ACT, PONDER), strict=True):
        for many in (1, plan.nonzeros, plan.width):
            each = [scores[name][many].weights for scores in results.values()]
            padded = [weights + [0.0] * (plan.max_steps - len(weights)) for weights in each]
            curve(axes, list(range(1, plan.max_steps + 1)), padded, f"{many} non-zeros")
        axes.set(title=name, xlabel="step", ylabel="mean weight")
        axes.legend(fontsize="small")
    return made
