"""`loopaware bench speculative`: drafts by few steps of the loop, verified by all, against plain decoding.

In: options. Out: a folder with `report.html`, `results.json` and a figure: for each number of draft steps and tokens
ahead, greedy and sampled, how many drafts are kept, how many passes through the loop a token takes one after the other,
and the time as a ratio of medians to plain decoding in the same run. A small looped model is trained first, every exit
taught, on the help texts that come with Python. Nothing is reported if greedy tokens are not those of plain decoding.
Deliberately elsewhere: that sampled tokens keep their distribution, which is a test.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopaware import files
from loopaware.checks import bounded
from loopaware.observe import Report
from loopaware.observe.figures import figure
from loopaware.recipes.shared import adam, show
from loopaware.train.progress import Progress, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loopaware.lm.speculative import Speculated, Speculative
    from loopaware.models.looped_lm import LoopedForCausalLM

GREEDY, SAMPLED = "greedy", "sampled"


class Line(NamedTuple):
    """One way to draft: shares and counts over all prompts, the median time of a token and that of plain decoding."""

    how: str
    draft_steps: int
    tokens_ahead: int
    accepted: float
    passes: float
    steps: float
    seconds: float
    plain: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.plain


def run(
    folder: Path = Path("runs/bench-speculative"),
    *,
    draft_steps: tuple[int, ...] = (1, 2, 4),
    ahead: tuple[int, ...] = (2, 4, 8),
    steps: int = 8,
    dim: int = 128,
    heads: int = 4,
    batches: int = 300,
    batch: int = 8,
    context: int = 64,
    new: int = 64,
    repeats: int = 9,
    threads: int = 1,
) -> None:
    """Train a small looped model, and time drafts by few steps against plain decoding; a table and a figure.

    Args:
        folder: where results.json, report.html and the figure go.
        draft_steps: steps of the loop that drafts take.
        ahead: how many tokens are drafted at once.
        steps: of the loop, in training and in plain decoding.
        dim: features of a token's state.
        heads: attention heads; must divide dim.
        batches: of training.
        batch: texts at once in training; decoding has one.
        context: bytes of a text in training; a prompt has half as many.
        new: bytes that are generated for each prompt.
        repeats: prompts, and so timed runs of each way, in turns; medians count.
        threads: processor threads that PyTorch may use.
    """
    from loopaware.lm.speculative import Speculative

    bounded("repeats", repeats, "Medians need at least one run.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    train, held, symbols = text()
    model, loss = trained(train, symbols, steps, dim, heads, batches, batch, context)
    prompts = drawn(held, repeats, context // 2, torch.Generator().manual_seed(1)).split(1)
    ways = [Speculative(few, far) for few in draft_steps for far in ahead]
    lines = [line for how in (GREEDY, SAMPLED) for line in measured(model, prompts, ways, how, new)]
    exits = exit_losses(model, drawn(held, 8, context, torch.Generator().manual_seed(2)))
    plan = {"steps": steps, "dim": dim, "batches": batches, "new": new, "repeats": repeats, "threads": threads}
    told = [{**line._asdict(), "ratio": line.ratio} for line in lines]
    plain = {"plan": plan, "loss": loss, "exits": exits, "lines": told}
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show(f"against {steps} steps for every token", *table(lines))
    print(f"report: {report(lines, plan, exits).write(folder / 'report.html')}")


def text() -> tuple[Tensor, Tensor, int]:
    """Python's help texts as numbers of bytes: the first nine tenths, the rest, how many different bytes there are."""
    from pydoc_data.topics import topics

    raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    known = {byte: number for number, byte in enumerate(sorted(set(raw)))}
    numbers = torch.tensor([known[byte] for byte in raw])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(known)


def drawn(numbers: Tensor, count: int, length: int, random: torch.Generator) -> Tensor:
    """Pieces from anywhere. Shapes: (all) -> (count, length)."""
    starts = torch.randint(len(numbers) - length, (count, 1), generator=random)
    return numbers[starts + torch.arange(length)]


def trained(
    numbers: Tensor, symbols: int, steps: int, dim: int, heads: int, batches: int, batch: int, context: int
) -> tuple[LoopedForCausalLM, float]:
    """A model with one layer before the loop, two in it and one behind, all of whose exits are taught."""
    from loopaware.models.looped_lm import LoopedConfig, LoopedForCausalLM

    torch.manual_seed(0)
    base = {
        "model_type": "llama",
        "vocab_size": symbols,
        "hidden_size": dim,
        "intermediate_size": 3 * dim,
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    options: dict[str, Any] = {"prelude": 1, "core": 2, "coda": 1, "injection": "add", "exits": "every"}
    model = LoopedForCausalLM(LoopedConfig(base=base, steps=steps, **options))
    optimizer, random, loss = adam(model, 2e-3), torch.Generator().manual_seed(0), torch.zeros(())
    for number in within(Progress(batches, done=0, wanted=True), range(batches)):
        for group in optimizer.param_groups:  # up in a tenth of the run, and down to nothing
            group["lr"] = 2e-3 * min(1.0, 10 * (number + 1) / batches, 1.2 * (1 - number / batches))
        pieces = drawn(numbers, batch, context, random)
        loss = model(pieces, labels=pieces).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), float(loss.detach())


@torch.no_grad()
def exit_losses(model: LoopedForCausalLM, pieces: Tensor) -> list[float]:
    """The loss of each exit on text that was not trained on, in nats for a byte."""
    return model(pieces, labels=pieces).exits.tolist()


def measured(
    model: LoopedForCausalLM, prompts: tuple[Tensor, ...], ways: list[Speculative], how: str, new: int
) -> list[Line]:
    """Every way on every prompt, in turns, so that a noisy moment meets all."""
    from loopaware.lm.speculative import Speculative

    did: list[list[Speculated]] = [[] for _ in ways]
    reported = [Speculative(way.draft_steps, way.tokens_ahead, did[place].append) for place, way in enumerate(ways)]
    times: list[list[float]] = [[] for _ in (None, *ways)]
    generated(model, prompts[0], reported[0], how, new)
    did[0].clear()
    for prompt in within(Progress(len(prompts), done=0, wanted=True), prompts):
        found = []
        for place, rule in enumerate((None, *reported)):
            begun = time.perf_counter()
            found.append(generated(model, prompt, rule, how, new))
            times[place].append(time.perf_counter() - begun)
        wrong = [rule for rule, own in zip(reported, found[1:], strict=True) if not torch.equal(own, found[0])]
        if how == GREEDY and wrong:
            raise ValueError(
                f"greedy tokens must be those of plain decoding, got others with {wrong[0]}. Nothing is reported: mend "
                "loopaware.lm.speculative."
            )
    plain = statistics.median(times[0]) / new
    lines = []
    for way, counts, taken in zip(ways, did, times[1:], strict=True):
        tokens, drafts, kept, passes, ran = (
            sum(getattr(each, name) for each in counts) for name in ("tokens", "drafted", "accepted", "passes", "ran")
        )
        seconds = statistics.median(taken) / new
        shares = (kept / drafts, passes / tokens, ran / tokens)
        lines.append(Line(how, way.draft_steps, way.tokens_ahead, *shares, seconds, plain))
    return lines


def generated(model: LoopedForCausalLM, prompt: Tensor, rule: Speculative | None, how: str, new: int) -> Tensor:
    torch.manual_seed(0)
    more = {"do_sample": True, "top_k": 0} if how == SAMPLED else {"do_sample": False}
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue] - its protocol asks for too much
    return generate(prompt, custom_generate=rule, max_new_tokens=new, pad_token_id=0, **more)


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for each way."""
    columns = ["tokens", "draft steps", "ahead", "accepted", "passes", "steps", "tokens/s", "plain", "time"]
    rows = [
        [
            line.how,
            str(line.draft_steps),
            str(line.tokens_ahead),
            f"{line.accepted:.2f}",
            f"{line.passes:.2f}",
            f"{line.steps:.2f}",
            f"{1 / line.seconds:.0f}",
            f"{1 / line.plain:.0f}",
            f"{line.ratio:.2f}",
        ]
        for line in lines
    ]
    return columns, rows


def report(lines: list[Line], plan: dict[str, Any], exits: list[float]) -> Report:
    page = Report("Drafts by few steps of the loop", seeds=(0,))
    losses = ", ".join(f"{loss:.2f}" for loss in exits)
    page.text(
        f"A looped model of {plan['dim']} features (one layer before the loop, two in it, one behind), trained for "
        f"{plan['batches']} batches on bytes of Python's help texts with the loss of all {plan['steps']} exits. On "
        f"text that was not trained on, exits 1 to {plan['steps']} lose {losses} nats for each byte. It drafts with "
        "few steps and verifies with all; each token that is run takes each step once, drafts are gone on from."
    )
    page.table(*table(lines), caption=CAPTION.format(**plan))
    page.figure(bars(lines, plan["steps"]), alt="Time and passes of each way to draft, as shares of plain decoding.")
    page.text(
        "Greedy tokens are those of plain decoding, or nothing is reported. Sampled tokens are others, of the same "
        "distribution. Greedy text of a small model repeats itself, so that its drafts are often kept; sampled text "
        "says more about how well few steps do."
    )
    return page


CAPTION = """One prompt at a time, {new} new bytes, medians over {repeats} prompts in turns, {threads} thread(s). \
Passes: runs of the loop's body one after the other, for each token; plain decoding takes {steps}. Steps: those of \
tokens, refused drafts among them; plain decoding takes {steps}. Time: over that of plain decoding."""


def bars(lines: list[Line], steps: int) -> Figure:
    made = figure(9, 4, columns=2)
    for axes, how in zip(made.axes, (GREEDY, SAMPLED), strict=True):
        chosen = [line for line in lines if line.how == how]
        series = {"passes": [line.passes / steps for line in chosen], "time": [line.ratio for line in chosen]}
        for offset, (name, heights) in enumerate(series.items()):
            axes.bar([place + 0.4 * (offset - 0.5) for place in range(len(chosen))], heights, 0.38, label=name)
        axes.axhline(1.0, color="black", lw=0.8, marker="")
        axes.set_xticks(range(len(chosen)), [f"{line.draft_steps}\n{line.tokens_ahead}" for line in chosen])
        axes.set(title=how, ylabel="share of plain decoding", xlabel="draft steps (above), tokens ahead (below)")
    made.legend(*made.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return made
