"""`loopaware convert SOURCE TARGET`: a dense model's folder becomes prelude, loop and coda."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from loopaware.convert import Split

app = App(name="convert", help="Put a loop into a dense model's folder: prelude, a group of layers that repeats, coda.")

COMPARED = (4, 128)
"""Windows and tokens of each on which layers are compared."""


def option(text: str) -> Parameter:
    return Parameter(help=text)


@Parameter(name="*", group="Which layers")
@dataclass(frozen=True)
class Places:
    """Which layers stand where."""

    prelude: Annotated[int | None, option("Layers before the loop; without it and coda the core is chosen.")] = None
    core: Annotated[int | None, option("Layers in the loop; a third of all where nothing is said.")] = None
    coda: Annotated[int | None, option("Layers behind the loop.")] = None
    choose: Annotated[
        Literal["similarity", "repetition"],
        option("Choose the core whose state turns least, or whose second run changes the prediction least."),
    ] = "similarity"
    drop: Annotated[
        tuple[int, ...], option("Numbers of layers that are left out first; the original is then no longer met.")
    ] = ()
    tie: Annotated[
        bool, option("The loop takes the place of all layers between prelude and coda, in groups of the core's size.")
    ] = False
    lora: Annotated[int, option("Rank of what each step keeps of its own where layers are tied; 0 is nothing.")] = 0


@Parameter(name="*", group="Healing")
@dataclass(frozen=True)
class Healing:
    """How the model learns to loop."""

    text: Annotated[Path | None, option("A text file to heal with and to compare layers on.")] = None
    heal: Annotated[int, option("Training steps on the text, from one loop up to `steps` loops, deep ones later.")] = 0
    batch: Annotated[int, option("Windows of text in a training step.")] = 8
    length: Annotated[int, option("Tokens in a window.")] = 128
    rate: Annotated[float, option("Learning rate of AdamW after its warm-up.")] = 3e-4
    seed: Annotated[int, option("Seed of training and of random tokens.")] = 0


@app.default
def convert(
    source: Path,
    target: Path,
    *,
    steps: int | None = None,
    injection: Literal["none", "add", "concat", "gated", "diagonal"] = "none",
    places: Places = Places(),
    healing: Healing = Healing(),
) -> None:
    """Convert a dense Llama, Qwen, GPT-2, OLMo or BERT to a model with a loop; at one loop it equals the original.

    Args:
        source: folder of the dense model as transformers saves it, or a .gguf file.
        target: new folder for the looped model; the Auto classes load it once loopaware is imported.
        steps: loops that the model is set to, 4 where nothing is said; others can be asked for later.
        injection: how the loop's input enters every step.
    """
    checked(places, healing, steps, injection)
    from loopaware import convert as converting

    converting.free(target)
    dense = converting.read(source)
    tokens = None
    if healing.text is not None:
        tokens = converting.tokenized(converting.tokenizer(source), converting.content(healing.text))
    if places.tie:
        model: Any = tied(dense, places)
    else:
        split = placed(dense, places, sampled(dense, tokens, healing.seed))
        print(f"prelude {spelled(split.prelude)}, core {spelled(split.core)}, coda {spelled(split.coda)}")
        model = converting.looped(dense, split, 4 if steps is None else steps, injection)
    loops = model.config.steps if places.tie else 1
    gap = converting.apart(dense, model, loops)
    print(f"at {loops} loop{'s' * (loops > 1)} logits differ from the original's by {gap:.1e}")
    if healing.heal and tokens is not None:
        healed(model, tokens, target, healing)
    print(f"written: {converting.write(model, target, source)}")


def checked(places: Places, healing: Healing, steps: int | None, injection: str) -> None:
    """Refuse options that exclude each other, before anything is loaded."""
    if healing.heal and healing.text is None:
        raise ValueError("text must be given to heal, got none. Name a text file: --text FILE.")
    if places.lora and not places.tie:
        raise ValueError(f"lora must be 0 where layers are not tied, got {places.lora}. Add --tie.")
    sizes = (places.prelude, places.core, places.coda)
    if places.tie and (None in sizes or places.drop or steps is not None or injection != "none"):
        raise ValueError(
            "prelude, core and coda must be given where layers are tied, and no drop, steps or injection: the layers "
            f"between are the loop, got {', '.join(map(str, sizes))}. Name all three, for example --prelude 1 --core 2 "
            "--coda 1."
        )
    if (places.prelude is None) != (places.coda is None):
        raise ValueError("prelude and coda must be given together, got one. Leave out both to have the core chosen.")


def tied(dense: Any, places: Places) -> Any:
    """All layers between prelude and coda as one group that repeats."""
    from loopaware import convert as converting

    prelude, core, coda = places.prelude or 0, places.core or 0, places.coda or 0
    model = converting.tied(dense, prelude, core, coda, rank=places.lora)
    loops = model.config.steps
    print(f"prelude {prelude}, core {core} x {loops} loops, coda {coda}, differences of rank {places.lora}")
    return model


def placed(dense: Any, places: Places, tokens: Tensor) -> Split:
    """Where each layer stands, as said or as measured."""
    from loopaware import convert as converting

    kept = [number for number in range(dense.config.num_hidden_layers) if number not in places.drop]
    core = max(1, len(kept) // 3) if places.core is None else places.core
    if places.prelude is not None and places.coda is not None:
        core = len(kept) - places.prelude - places.coda if places.core is None else core
        return converting.Split.of(kept, places.prelude, core, places.coda)
    found = converting.groups(dense, tokens, core)
    best = converting.least(found, places.choose)
    table(found, best)
    before = sum(number < best.first for number in kept)
    inside = sum(number in best.layers for number in kept)
    return converting.Split.of(kept, before, inside, len(kept) - before - inside)


def table(found: list[Any], best: Any) -> None:
    """What was measured of each group, the chosen one marked."""
    from loopaware.recipes.shared import show

    rows = [
        [
            f"{spelled(group.layers)}{' *' if group is best else ''}",
            *(f"{number:.4f}" for number in (group.angle, group.influence, group.divergence)),
        ]
        for group in found
    ]
    show("groups of layers", ["layers", "angle (half turns)", "block influence", "KL of twice from once"], rows)


def sampled(dense: Any, tokens: Tensor | None, seed: int) -> Tensor:
    """Windows of the text at equal distances, or random tokens."""
    import torch

    count, length = COMPARED
    length = min(length, getattr(dense.config, "max_position_embeddings", length))
    if tokens is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(dense.config.vocab_size, (count, length), generator=generator)
    first = torch.linspace(0, max(len(tokens) - length, 0), count).long()
    return torch.stack([tokens[start : start + length] for start in first.tolist()])


def healed(model: Any, tokens: Tensor, target: Path, healing: Healing) -> None:
    """Train the model in place; the run is in the target's folder `healing` and goes on where it was killed."""
    from loopaware import convert as converting
    from loopaware import train
    from loopaware.halt.depths import Uniform

    curriculum = converting.Curriculum(Uniform(1, model.config.steps))
    names = ("prelude", "core", "coda", "steps", "injection", "rank")
    about = {name: getattr(model.config, name, 0) for name in names}
    about |= {"batch": healing.batch, "length": healing.length}
    lines = converting.heal(
        model,
        tokens,
        curriculum,
        steps=healing.heal,
        batch=healing.batch,
        length=healing.length,
        rate=healing.rate,
        journal=train.Journal(target / "healing", about=about),
        seed=healing.seed,
    )
    print(f"healed for {healing.heal} steps: loss {lines[0]['loss']:.3f} at first, {lines[-1]['loss']:.3f} at last")


def spelled(layers: Any) -> str:
    """Numbers as few words."""
    numbers = list(layers)
    whole = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}–{numbers[-1]}" if whole else " ".join(map(str, numbers)) or "–"
