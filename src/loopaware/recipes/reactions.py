"""A pretrained looped ALBERT reads real reactions: accuracy by loops, and what each training-free halting rule saves.

In: reactions as SMILES, from a file or the few that ship with the released weights. Out: a folder with `report.html`
and `results.json`, and a table. Nothing is trained. Deliberately elsewhere: the model (`loopaware.models.albert`),
weights and data (`loopaware.tasks.reactions`), tables and figures (`loopaware.recipes.reactions_report`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loopaware import Loop, files, halt, observe
from loopaware.checks import bounded
from loopaware.models.albert import Albert
from loopaware.protocols import Halt, Output
from loopaware.recipes.reactions_report import report, show
from loopaware.recipes.reactions_results import LOOKS, QUESTION, SEQUENCE, TOKEN, Outcome, Results, Tally, Trial
from loopaware.tasks import reactions as data

BATCH = 32
CHANGE = 0.1
"""The relative change of the state below which it would count as being at rest."""


class Case(NamedTuple):
    """A batch with the states of its uniform run, and where its hidden tokens are.

    Shapes: states loops + 1 times (B, T, D), the first before any loop; places, labels, valid (B, A), A the most hidden
    tokens of a reaction; residuals (loops, B).
    """

    batch: data.Masked
    states: tuple[Tensor, ...]
    residuals: Tensor
    places: Tensor
    labels: Tensor
    valid: Tensor


def run(
    folder: Path = Path("runs/reactions"),
    *,
    reactions: Path | None = None,
    count: int = 256,
    longest: int = 104,
    share: float = 0.15,
    seeds: tuple[int, ...] = (0, 1, 2),
    loops: int = 32,
    kl: tuple[float, ...] = (0.3, 0.1, 0.03),
    entropy: tuple[float, ...] = (0.3, 0.03),
    confidence: tuple[float, ...] = (0.9, 0.99),
    patience: int = 2,
    cache: Path | None = None,
) -> Path:
    """Measure accuracy by loops and every training-free halting rule on the released ALBERT.

    Args:
        folder: where results.json and report.html go.
        reactions: a csv file with a column "rxn", or one SMILES per line; without it, the three real reactions that
            ship with the weights, under many different masks.
        count: how many reactions are read, from the top of the file.
        longest: reactions with more tokens than this are left out; at most 512.
        share: part of each reaction's tokens that is hidden.
        seeds: of the choice of hidden tokens; every seed hides others.
        loops: how far uniform depth is followed, and how far rules may run when left alone.
        kl: thresholds, in nats, below which the KL divergence of successive predictions stops a row.
        entropy: thresholds, in nats, below which the entropy of the prediction stops a row.
        confidence: thresholds from which on the largest probability stops a row.
        patience: how many times in a row a KL rule must fire in the rules with patience.
        cache: folder of the weights; the user's cache by default.
    """
    if not data.cached(cache):
        print(f"fetching {data.PACKAGE} with pip, 3 MB, once", flush=True)
    released = data.released(cache)
    model = built(released)
    bounded("seeds", len(seeds), "Name at least one seed.")
    bounded("loops", loops, "It is compared with the released depth.", least=model.loop.max_steps)
    texts = list(released.reactions) if reactions is None else data.read(reactions)
    encoded, distinct = chosen(texts, released.vocabulary, count, min(longest, released.sizes.positions))
    trials = plan(model, kl, entropy, confidence, patience, loops)
    hidden = [data.hide(encoded, released.vocabulary, share, seed) for seed in seeds]
    results = measure(model, hidden, trials, loops, distinct)
    story = told(model, hidden[0], released.vocabulary)
    files.write(folder / "results.json", json.dumps(results.summary(), indent=2))
    show(results)
    return report(results, story, seeds, longest=longest, shipped=reactions is None).write(folder / "report.html")


def built(released: data.Released) -> Albert:
    """The model with its released weights."""
    sizes = released.sizes
    model = Albert(
        sizes.vocabulary,
        sizes.dim,
        sizes.heads,
        hidden=sizes.hidden,
        embedding=sizes.embedding,
        positions=sizes.positions,
        max_steps=sizes.max_steps,
    )
    return model.load_released(released.weights).eval().requires_grad_(False)


def chosen(texts: list[str], vocabulary: data.Vocabulary, count: int, longest: int) -> tuple[list[list[int]], int]:
    """The first `count` reactions that are not too long, as ids, and how many they are before few ones are repeated."""
    bounded("count", count, "Read at least one reaction.")
    encoded = [ids for ids in map(vocabulary.encode, texts) if len(ids) <= longest][:count]
    if not encoded:
        raise ValueError(
            f"longest must leave a reaction, got {longest} for {len(texts)} longer ones. Take up to 512 tokens."
        )
    return encoded * (count // len(encoded)), len(encoded)


def plan(
    model: Albert,
    kl: tuple[float, ...],
    entropy: tuple[float, ...],
    confidence: tuple[float, ...],
    patience: int,
    loops: int,
) -> list[Trial]:
    """Every rule at every level with the released depth as the cap; rules on hidden tokens also left alone."""
    head, depth = model.head, model.loop.max_steps
    rules: list[tuple[str, str, Halt]] = [("KL", f"KL < {bound:g}", halt.KL(head, bound)) for bound in kl]
    rules += [
        ("KL, patience", f"KL < {bound:g}, {patience} times", halt.Patience(halt.KL(head, bound), patience))
        for bound in kl
    ]
    rules += [("entropy", f"entropy < {bound:g}", halt.Entropy(head, bound)) for bound in entropy]
    rules += [("confidence", f"confidence ≥ {bound:g}", halt.Confidence(head, bound)) for bound in confidence]
    rules += [("state change", f"state change < {CHANGE:g}", halt.Converged(rtol=CHANGE))]
    levels = [(QUESTION, by_question, depth), (SEQUENCE, by_sequence, depth), (TOKEN, by_token, depth)]
    levels += [(QUESTION, by_question, loops)] if loops > depth else []
    return [Trial(family, name, level, how, rule, cap) for level, how, cap in levels for family, name, rule in rules]


@torch.no_grad()
def measure(model: Albert, hidden: list[data.Masked], trials: list[Trial], loops: int, distinct: int) -> Results:
    """Uniform depth, and rules on hidden tokens, for every choice of hidden tokens; other rules for the first one."""
    from loopaware.train.progress import Progress

    split = [data.batches(masked, BATCH) for masked in hidden]
    results = Results.empty(model.loop.max_steps, len(hidden), loops, distinct, head_share(model, split[0][0][1]))
    results.tallies += [Tally.empty(trial, len(hidden), distinct) for trial in trials]
    repeated = sum(tally.trial.how is by_question for tally in results.tallies)
    steps = len(split[0]) * (len(trials) + (len(hidden) - 1) * repeated)
    with Progress(steps, done=0, wanted=True) as bar:
        for seed, (rows, batch) in ((seed, pair) for seed, part in enumerate(split) for pair in part):
            case = uniform(model, batch, loops)
            reaction = rows % distinct
            results.add(seed, reaction, right_by_loop(model, case), batch.asked.sum(-1), case.residuals)
            for tally in results.tallies:
                if seed == 0 or tally.trial.how is by_question:
                    outcome = tally.trial.how(model, tally.trial, case)
                    tally.add(seed, reaction, outcome, batch.mask, batch.asked)
                    bar.advance()
    return results


def uniform(model: Albert, batch: data.Masked, loops: int) -> Case:
    """Run a batch at uniform depth and keep every state."""
    context = model.context(batch.tokens, batch.mask)
    with observe.record(model.loop, states=True) as tape:
        model.loop(context, mask=batch.mask, max_steps=loops)
    most = int(batch.asked.sum(-1).max())
    places = batch.asked.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
    states = (model.loop.init(context), *(tape.only.states or ()))
    labels, valid = batch.labels.gather(1, places), batch.asked.gather(1, places)
    return Case(batch, states, tape.only.residuals, places, labels, valid)


def right_by_loop(model: Albert, case: Case) -> Tensor:
    """How many hidden tokens are told right after each loop. Shapes: -> (loops, B)."""
    return torch.stack([right(model, case, at(state, case.places)) for state in case.states[1:]])


def right(model: Albert, case: Case, states: Tensor) -> Tensor:
    """Shapes: states at the hidden tokens (B, A, D) -> (B,)."""
    return ((model.head(states).argmax(-1) == case.labels) & case.valid).sum(-1)


def at(states: Tensor, places: Tensor) -> Tensor:
    """Shapes: states (B, T, D), places (B, A) -> (B, A, D)."""
    return states[torch.arange(len(places))[:, None], places]


def by_question(model: Albert, trial: Trial, case: Case) -> Outcome:
    """A sequence stops when the rule is content with all its hidden tokens."""
    states = tuple(at(state, case.places) for state in case.states[: trial.cap + 1])
    out = replay(states, trial.rule, case.valid, trial.cap)
    return Outcome(right(model, case, out.value), *spread(out, case))


def by_sequence(model: Albert, trial: Trial, case: Case) -> Outcome:
    """A sequence stops when the rule is content with all its tokens."""
    out = replay(case.states, trial.rule, case.batch.mask, trial.cap)
    return Outcome(right(model, case, at(out.value, case.places)), *spread(out, case))


def by_token(model: Albert, trial: Trial, case: Case) -> Outcome:
    """A token stops when the rule is content with it; others still attend to its last state."""
    loop = model.loop.replace(rows=2, halt=trial.rule)
    out = loop(model.context(case.batch.tokens, case.batch.mask), mask=case.batch.mask, max_steps=trial.cap)
    return Outcome(right(model, case, at(out.value, case.places)), out.steps, out.halted)


def replay(states: tuple[Tensor, ...], rule: Halt, mask: Tensor, cap: int) -> Output:
    """A loop over recorded states.

    Sequences never look at one another, so halting changes none of them before it stops: steps and answer are those of
    the model's loop, without running its body again for each rule.
    """
    return Loop(lambda _state, _context, index: states[index + 1], cap, halt=rule)(states[0], mask=mask)


def spread(out: Output, case: Case) -> Iterator[Tensor]:
    """Steps and stops of sequences, for each of their tokens."""
    return (value[:, None].expand_as(case.batch.mask) for value in (out.steps, out.halted))


def head_share(model: Albert, batch: data.Masked) -> float:
    """What a look of the head at all tokens costs, as a share of one loop of the body."""
    context = model.context(batch.tokens, batch.mask)
    cost = observe.cost(model.loop.replace(halt=halt.Entropy(model.head)), context, batch.mask)
    return cost.halt / cost.body


@torch.no_grad()
def told(model: Albert, masked: data.Masked, vocabulary: data.Vocabulary) -> tuple[str, list[list[str]]]:
    """The first reaction, and for each of its hidden tokens: place, token, what is read after each of `LOOKS` loops."""
    asked, labels = masked.asked[:1], masked.labels[:1]
    words = [[str(place), vocabulary.tokens[int(labels[0, place])]] for place in asked[0].nonzero()[:, 0].tolist()]
    for loops in LOOKS:
        out = model(masked.tokens[:1], masked.mask[:1], max_steps=loops)
        for line, token in zip(words, out.value[asked].argmax(-1).tolist(), strict=True):
            line.append(vocabulary.tokens[token])
    return vocabulary.decode(labels[0].tolist()), words
