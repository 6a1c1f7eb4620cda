"""Copy and reverse: Universal Transformers against a plain one, trained on 10 symbols, tested on 40.

In: options. Out: a folder with `report.html`, `results.json`, and a run for each net and seed that goes on after a
kill. All nets are encoder-decoders of the same blocks; the plain one has as many unshared blocks as the others take
steps. Answers are generated, token by token. Deliberately elsewhere: strings (`loopaware.tasks.strings`), the model
(`loopaware.models.universal`).

References: M. Dehghani et al., "Universal Transformers", 2018, arXiv 1807.03819.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loopaware import body, files, halt, observe, train
from loopaware.checks import bounded
from loopaware.models import UniversalDecoder, UniversalEncoder, UniversalTransformer
from loopaware.models.universal import Coordinates, Step, tied_block
from loopaware.nn import Block, Pre, Sinusoidal
from loopaware.observe import Report, Tape
from loopaware.observe.figures import figure
from loopaware.recipes.shared import adam, curve, show, spread
from loopaware.tasks import strings
from loopaware.train import objectives
from loopaware.train.fit import Objective
from loopaware.train.progress import Progress, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIXED, ACT, PLAIN, STILL = "Universal, fixed steps", "Universal, ACT", "plain, unshared", "Universal, no offsets"
NETS = (FIXED, ACT, PLAIN, STILL)


class Plan(NamedTuple):
    """How nets are made and trained."""

    longest: int
    steps: int
    batch: int
    dim: int
    heads: int
    loops: int
    rate: float
    shift: int
    price: float


class Score(NamedTuple):
    """One net on strings of one length: tokens and whole strings right, loops of a token in encoder and decoder."""

    tokens: float
    whole: float
    copied: float
    reversed: float
    loops: float
    flops: float


Scores = dict[str, dict[int, Score]]


def run(
    folder: Path = Path("runs/copy-reverse"),
    *,
    longest: int = 10,
    tests: tuple[int, ...] = (5, 10, 12, 15, 20, 30, 40),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 1500,
    batch: int = 64,
    dim: int = 64,
    heads: int = 4,
    loops: int = 4,
    rate: float = 1e-3,
    shift: int = 40,
    price: float = 1e-3,
    count: int = 100,
    threads: int = 1,
) -> None:
    """Train Universal Transformers and a plain one to copy and reverse short strings, test on long ones, and report.

    Args:
        folder: where runs, results.json and report.html go; started again, the command goes on where it was killed.
        longest: symbols of the longest strings in training.
        tests: lengths of the strings that nets are tested on.
        seeds: one net of each kind is trained with each seed.
        steps: training steps of each net.
        batch: strings in a training step.
        dim: features of a token's state.
        heads: attention heads; must divide dim.
        loops: steps of the shared blocks, and unshared blocks of the plain net, in encoder and decoder each.
        rate: learning rate, a fifth of it in the last 30 % of the steps.
        shift: in training, positions begin at a random place up to this, for all nets but one.
        price: what ACT pays for a step, growing from zero until half of training.
        count: test strings of each length.
        threads: processor threads that PyTorch may use; nets this small gain little from more than one.
    """
    bounded("seeds", len(seeds), "Name at least one seed.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    plan = Plan(longest, steps, batch, dim, heads, loops, rate, bounded("shift", shift, "0 is none.", least=0), price)
    held_out = {length: strings.held_out(count, length) for length in tests}
    results: dict[int, Scores] = {}
    sizes = {name: sum(weight.numel() for weight in made(plan, name).parameters()) for name in NETS}
    pairs = [(seed, name) for seed in seeds for name in NETS]
    for seed, name in within(Progress(len(pairs), done=0, wanted=True), pairs):
        print(f"seed {seed}: {name}", flush=True)
        net = trained(plan, name, seed, folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}-{seed}")
        results.setdefault(seed, {})[name] = {length: tested(net, batch) for length, batch in held_out.items()}
    plain = {
        str(seed): {name: {k: s._asdict() for k, s in by.items()} for name, by in r.items()}
        for seed, r in results.items()
    }
    files.write(
        folder / "results.json", json.dumps({"plan": plan._asdict(), "parameters": sizes, "results": plain}, indent=1)
    )
    show("share of whole strings right", *table(results, sizes))
    print(f"report: {report(results, sizes, plan).write(folder / 'report.html')}")


def made(plan: Plan, name: str) -> UniversalTransformer:
    """The net of one kind; a plain transformer is one step of a stack of blocks that share nothing.

    The plain one has its norms before the sub-layers and none at the end: in this budget it learned nothing with the
    shared blocks' norms behind them, and little with a last norm.
    """
    plain = name == PLAIN

    def block(decoder: bool) -> nn.Module:
        def one() -> nn.Module:
            if plain:
                return Block(plan.dim, plan.heads, placement=Pre(), causal=decoder, cross=decoder)
            return tied_block(plan.dim, plan.heads, decoder=decoder)

        return body.Stack(*(one() for _ in range(plan.loops))) if plain else one()

    def parts() -> dict[str, Any]:
        times = None if plain else Sinusoidal(plan.dim)
        return {
            "signal": Coordinates(Sinusoidal(plan.dim), times, shift=0 if name == STILL else plan.shift),
            "halt": halt.ACT(halt.Linear(plan.dim, bias=-3.0)) if name == ACT else None,
        }

    most = {PLAIN: 1, ACT: 2 * plan.loops}.get(name, plan.loops)
    encoder = UniversalEncoder(block(decoder=False), most, **parts())
    decoder = UniversalDecoder(block(decoder=True), most, **parts())
    return UniversalTransformer(encoder, decoder, plan.dim, strings.VOCABULARY)


def trained(plan: Plan, name: str, seed: int, folder: Path) -> UniversalTransformer:
    """A net, trained or read from its finished run."""
    torch.manual_seed(seed)
    net = made(plan, name)
    train.fit(
        net,
        cast(Objective, loss_of(plan, plan.price if name == ACT else 0.0)),
        drawn(plan),
        adam(net, plan.rate),
        steps=plan.steps,
        schedule=train.Warmup(min(100, plan.steps), then=train.Drop(at=0.7, factor=0.2)),
        journal=train.Journal(folder, log_every=20, save_every=100, about=plan._asdict()),
        seed=seed,
    )
    return net.eval()


def drawn(plan: Plan) -> Callable[[int, torch.Generator], strings.Strings]:
    def batches(step: int, generator: torch.Generator) -> strings.Strings:  # noqa: ARG001 - all steps are alike
        return strings.sample(plan.batch, (1, plan.longest), generator=generator)

    return batches


Loss = Callable[[UniversalTransformer, strings.Strings, int], tuple[Tensor, dict[str, Tensor]]]


def loss_of(plan: Plan, price: float) -> Loss:
    """The cross-entropy of every token of the answer, and a price on the ponder cost of encoder and decoder."""

    def loss(net: UniversalTransformer, batch: strings.Strings, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with observe.record(net) as tape:
            logits = net(batch.source, batch.given, batch.mask, batch.mask).value
        total = cross_entropy(logits[batch.mask], batch.target[batch.mask])
        if price:
            cost = sum(objectives.mean(objectives.ponder_cost(path), path) for path in both(tape))
            total = total + price * min(1.0, step / (0.5 * plan.steps)) * cost
        right = strings.right(logits.detach().argmax(-1), batch).all(-1).float().mean()
        steps = [objectives.mean(path.steps.float(), path) for path in both(tape)]
        return total, {"accuracy": right, "steps": torch.stack(steps).mean()}

    return loss


def both(tape: Tape) -> tuple[Any, Any]:
    """The trajectories of encoder and decoder."""
    return tape["encoder.loop"][-1], tape["decoder.loop"][-1]


@torch.no_grad()
def tested(net: UniversalTransformer, batch: strings.Strings) -> Score:
    """Generate the answers. Operations are those of one pass over answers that are known."""
    said = answers(net, batch)
    right = strings.right(said, batch)
    whole = right.all(-1).float()
    with observe.record(net) as tape:
        net(batch.source, batch.given, batch.mask, batch.mask)
    paths = both(tape)
    loops = sum(objectives.mean(path.steps.float(), path) for path in paths) / 2
    return Score(
        tokens=right[batch.mask].float().mean().item(),
        whole=whole.mean().item(),
        copied=whole[batch.task == strings.COPY].mean().item(),
        reversed=whole[batch.task == strings.REVERSE].mean().item(),
        loops=float(loops) * blocks(net),
        flops=operations(net, batch, [path.steps for path in paths]),
    )


def blocks(net: UniversalTransformer) -> int:
    """Blocks of a step: one, or those of the plain net's stack."""
    return len(getattr(cast(Step, net.encoder.loop.body).block, "bodies", [0]))


def operations(net: UniversalTransformer, batch: strings.Strings, steps: list[Tensor]) -> float:
    """Operations for a string, if tokens cost nothing after they have stopped."""
    x, memory = net.tokens(batch.given), net.tokens(batch.source)
    contexts = (
        {"x": memory, "mask": batch.mask},
        {"x": x, "mask": batch.mask, "memory": memory, "memory_mask": batch.mask},
    )
    loops = (net.encoder.loop, net.decoder.loop)
    costs = [observe.cost(loop, context, batch.mask) for loop, context in zip(loops, contexts, strict=True)]
    return sum(cost.executed(taken) for cost, taken in zip(costs, steps, strict=True)) / len(batch.task)


def answers(net: UniversalTransformer, batch: strings.Strings) -> Tensor:
    """The likeliest tokens, one after the other; what follows END is END. Shapes: -> (B, n) long."""
    said = torch.empty_like(batch.target)
    for task in (strings.COPY, strings.REVERSE):
        rows = batch.task == task
        if rows.any():
            said[rows] = net.generate(
                batch.source[rows], batch.target.shape[1], begin=task, end=strings.END, mask=batch.mask[rows]
            )
    return said


def table(results: dict[int, Scores], sizes: dict[str, int]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each net: whole strings right by length, then what it takes."""
    lengths = list(next(iter(results.values()))[FIXED])
    last = lengths[-1]
    rows = []
    for name in NETS:
        each = [scores[name] for scores in results.values()]
        whole = [spread([score[length].whole for score in each]) for length in lengths]
        loops = spread([score[last].loops for score in each], 1)
        rows.append(
            [
                name,
                *whole,
                spread([s[last].tokens for s in each]),
                loops,
                f"{each[0][last].flops / 1e6:.0f}",
                f"{sizes[name]:,}",
            ]
        )
    columns = ["net", *(f"{length} symbols" for length in lengths)]
    return [*columns, f"tokens, {last}", f"loops, {last}", f"Mop, {last}", "parameters"], rows


def report(results: dict[int, Scores], sizes: dict[str, int], plan: Plan) -> Report:
    page = Report("Copy and reverse: one shared block against unshared ones", seeds=tuple(results))
    page.text(
        f"Strings of 1 to {plan.longest} digits, to be said again forwards or backwards, for {plan.steps} steps of "
        f"{plan.batch}; tested on longer ones, answers generated token by token, a string right if every token is. "
        f"Shared blocks take {plan.loops} steps in encoder and decoder (ACT at most {2 * plan.loops}); the plain net "
        f"has {plan.loops} unshared blocks in each. In training positions begin at a random place up to {plan.shift}, "
        "so that those of long strings have been seen; one net goes without."
    )
    page.table(*table(results, sizes), caption=CAPTION)
    page.heading("Whole strings right, against length")
    page.figure(curves(results, plan), alt="Share of strings copied and reversed, against their length.")
    return page


CAPTION = """Share of whole strings right, then of tokens, loops of a token (blocks, for the plain net) and million \
operations for a string of the longest kind, if stopped tokens cost nothing. The mean over seeds, and the smallest and \
largest where they differ."""


def curves(results: dict[int, Scores], plan: Plan) -> Figure:
    made = figure(9, 4, columns=2)
    lengths = list(next(iter(results.values()))[FIXED])
    for axes, task in zip(made.axes, ("copied", "reversed"), strict=True):
        for name in NETS:
            series = [[getattr(scores[name][length], task) for length in lengths] for scores in results.values()]
            curve(axes, lengths, series, name)
        axes.axvline(plan.longest, color="black", lw=0.8, ls=":", marker="")
        axes.set(
            title=task, xlabel="symbols (dotted: the longest of training)", ylabel="strings right", ylim=(-0.03, 1.03)
        )
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return made
