"""`loopaware bench overhead`: what a step costs beside its matrix products, and a loop beside its steps.

In: options. Out: a folder with `report.html`, `results.json` and a figure. First the body: the time of a block's matrix
products, run alone with their results preallocated, as a share of the block's; and what the rest of its time is. Then
the driver: a `Loop` that never halts against the same steps in bare Python, which must give the same numbers, or
nothing is reported. Deliberately elsewhere: what leaving out stopped rows costs (`loopaware.recipes.execution`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loopaware import Loop, execute, files, halt
from loopaware.checks import bounded
from loopaware.nn import Block, Post
from loopaware.recipes.overhead_report import report, table_of_bodies, table_of_drivers, table_of_kinds
from loopaware.recipes.shared import in_turns, show

PRODUCTS, ATTENTION, NORMS, CURVE, REST = "matrix products", "attention", "norms", "GELU", "sums and copies"
KINDS = (PRODUCTS, ATTENTION, NORMS, CURVE, REST)
BODY, BOTH, WATCHED = "body", "products and attention", "watched"
BARE, LOOP = "bare steps", "loop"
FORWARD, TRAINING = "forward", "forward and backward"

SIDE = 2048
"""Of the square product that tells what this machine makes of large ones."""


class Body(NamedTuple):
    """A block at one width: seconds of each way, operations of its products, seconds of each kind of kernel in it."""

    dim: int
    passes: str
    seconds: dict[str, float]
    operations: int
    kinds: dict[str, float]

    @property
    def share(self) -> float:
        """The products' time over the body's."""
        return self.seconds[PRODUCTS] / self.seconds[BODY]

    @property
    def both(self) -> float:
        """Likewise of products and attention."""
        return self.seconds[BOTH] / self.seconds[BODY]


class Driver(NamedTuple):
    """A loop of one shape: seconds of the bare steps and of the loop."""

    dim: int
    batch: int
    tokens: int
    passes: str
    seconds: dict[str, float]
    steps: int

    @property
    def ratio(self) -> float:
        return self.seconds[LOOP] / self.seconds[BARE]

    @property
    def each(self) -> float:
        """Microseconds that the driver adds to a step."""
        return 1e6 * (self.seconds[LOOP] - self.seconds[BARE]) / self.steps


def run(
    folder: Path = Path("runs/bench-overhead"),
    *,
    dims: tuple[int, ...] = (64, 256, 512),
    batch: int = 16,
    tokens: int = 128,
    heads: int = 8,
    loops: tuple[tuple[int, int, int], ...] = ((256, 16, 128), (256, 1, 128), (256, 1, 32), (64, 1, 32)),
    steps: int = 12,
    repeats: int = 7,
    threads: int = 1,
) -> None:
    """Time a block against its matrix products, and a loop against bare steps; tables and a figure.

    Args:
        folder: where results.json, report.html and the figure go.
        dims: features of a token's state, for each block.
        batch: sequences at once, for the blocks.
        tokens: how many tokens their sequences have.
        heads: attention heads; must divide every width.
        loops: features, sequences and tokens of each loop.
        steps: of a loop.
        repeats: timed runs of each way, in turns; medians count. What takes milliseconds is run ten times as often.
        threads: processor threads that PyTorch may use.
    """
    bounded("repeats", repeats, "Medians need at least one run.")
    bounded("dims", len(dims), "Name at least one width.")
    bounded("loops", len(loops), "Name at least one loop as features, sequences, tokens.")
    torch.set_num_threads(bounded("threads", threads, "Use at least one thread."))
    bodies = [line for dim in dims for line in measured_body(dim, batch, tokens, heads, repeats)]
    drivers = [line for shape in loops for line in measured_driver(*shape, heads, steps, repeats)]
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "steps": steps, "repeats": repeats, "threads": threads}
    plan = {**sizes, "square": square(repeats)}
    plain = {
        "plan": plan,
        "bodies": [{**line._asdict(), "share": line.share, "with_attention": line.both} for line in bodies],
        "drivers": [{**line._asdict(), "ratio": line.ratio, "microseconds": line.each} for line in drivers],
    }
    files.write(folder / "results.json", json.dumps(plain, indent=1))
    show("a block's matrix products alone, over the block", *table_of_bodies(bodies))
    show("where a block's time goes", *table_of_kinds(bodies))
    show("a loop over the same steps in bare Python", *table_of_drivers(drivers))
    print(f"report: {report(bodies, drivers, plan).write(folder / 'report.html')}")


def measured_body(dim: int, batch: int, tokens: int, heads: int, repeats: int) -> list[Body]:
    """Both passes of one width: the block, its products alone, and with its attention."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, dim)
    block = Block(dim, heads, placement=Post())
    weights = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
    lines = []
    for passes, times, body in ((FORWARD, 1, lambda: forward(block, x)), (TRAINING, 3, lambda: passed(block, x))):
        operations = 2 * batch * tokens * weights * times  # backward: once for the input, once for the weights
        kernels = watched(body)
        if kernels.operations != operations:
            raise ValueError(
                f"the products that are run alone must be those of the linear maps, {operations} operations, got "
                f"{kernels.operations} at dim {dim}. Nothing is reported: mend what Kernels takes for a product."
            )
        seen: list[dict[str, float]] = []
        ways: dict[str, Callable[[], Any]] = {
            BODY: body,
            PRODUCTS: kernels.alone(PRODUCTS),
            BOTH: kernels.alone(PRODUCTS, ATTENTION),
            WATCHED: lambda body=body, seen=seen: seen.append(watched(body, keeps=False).seconds),
        }
        seconds = medians(ways, often(repeats, x))
        kinds = {name: statistics.median(each[name] for each in seen) for name in KINDS}
        lines.append(Body(dim, passes, seconds, operations, kinds))
    return lines


def measured_driver(dim: int, batch: int, tokens: int, heads: int, steps: int, repeats: int) -> list[Driver]:
    """Both passes of one shape, once it is sure that both ways compute the same."""
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, dim)
    block = Block(dim, heads, placement=Post())
    loop = Loop(block, steps, halt=halt.Never(), execute=execute.Eager())

    def bare(x: Tensor) -> Tensor:
        state = x
        for index in range(steps):
            state = block(state, x, index)
        return state

    def looped(x: Tensor) -> Tensor:
        return loop(x).value

    for own, expected in zip(passed(looped, x, block), passed(bare, x, block), strict=True):
        if not torch.equal(own, expected):
            raise ValueError(
                f"values and gradients of the loop must be those of its bare steps, got a difference of "
                f"{float((own - expected).abs().max()):.1e} at dim {dim}. Nothing is reported: mend the driver."
            )
    lines = []
    for passes in (FORWARD, TRAINING):
        if passes == FORWARD:
            ways = {BARE: lambda: forward(bare, x), LOOP: lambda: forward(looped, x)}
        else:
            ways = {BARE: lambda: passed(bare, x, block), LOOP: lambda: passed(looped, x, block)}
        lines.append(Driver(dim, batch, tokens, passes, medians(ways, often(repeats, x)), steps))
    return lines


@torch.no_grad()
def square(repeats: int) -> dict[str, float]:
    """GFLOP/s of a large square product: as PyTorch runs it, and by oneDNN, which it takes for such only when asked."""
    side, out = torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    ways = {"PyTorch": lambda: torch.mm(side, side, out=out)}
    if torch.backends.mkldnn.is_available():
        other = side.to_mkldnn()
        ways["oneDNN"] = lambda: torch.nn.functional.linear(other, other)
    return {name: 2e-9 * SIDE**3 / seconds for name, seconds in medians(ways, repeats).items()}


def often(repeats: int, x: Tensor) -> int:
    """How often to run each way: what takes milliseconds, ten times as often."""
    return repeats * (10 if x.numel() < 2**19 else 1)


def clock() -> float:
    """Seconds: of the processor where one thread is used, so that other work on a shared machine is not counted."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each way, after one run that is not timed."""
    for function in ways.values():
        function()
    return {name: statistics.median(each) for name, each in in_turns(ways, repeats, clock=clock).items()}


def forward(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        function(x)


def passed(function: Callable[[Tensor], Tensor], x: Tensor, net: nn.Module | None = None) -> list[Tensor]:
    """Forward and backward: the value, and the gradients of the input and of all weights."""
    net = function if net is None and isinstance(function, nn.Module) else net
    assert net is not None
    x = x.detach().requires_grad_()
    value = function(x)
    return [value.detach(), *torch.autograd.grad(value, [x, *net.parameters()], torch.ones_like(value))]


class Kernels(TorchDispatchMode):
    """Times what is run while it is entered, by kind, and keeps products and attention with their operands.

    Args:
        keeps: whether it does; without, memory is used again as it is when nobody looks.
    """

    def __init__(self, keeps: bool = True):
        super().__init__()
        self.keeps = keeps
        self.calls: list[tuple[str, Callable[[], Any]]] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options, name = options or {}, kind(operation.name())
        begun = clock()
        result = operation(*arguments, **options)
        self.seconds[name] += clock() - begun
        if self.keeps and name == PRODUCTS:
            out, function = torch.empty_like(result), operation.overloadpacket
            self.operations += 2 * result.numel() * arguments[-1].shape[0]
            self.calls.append((name, lambda: function(*arguments, **options, out=out)))
        elif self.keeps and name == ATTENTION:
            self.calls.append((name, lambda: operation(*arguments, **options)))
        return result

    def alone(self, *kinds: str) -> Callable[[], None]:
        """The calls of these kinds, again, and nothing else."""
        chosen = [call for name, call in self.calls if name in kinds]

        def again() -> None:
            with torch.no_grad():
                for call in chosen:
                    call()

        return again


def kind(name: str) -> str:
    """Of which kind a kernel is.

    >>> kind("aten::addmm"), kind("aten::native_layer_norm_backward")
    ('matrix products', 'norms')
    """
    words = {"scaled_dot_product": ATTENTION, "mm": PRODUCTS, "norm": NORMS, "gelu": CURVE}
    return next((found for word, found in words.items() if word in name), REST)


def watched(function: Callable[[], Any], keeps: bool = True) -> Kernels:
    with Kernels(keeps) as kernels:
        function()
    return kernels
