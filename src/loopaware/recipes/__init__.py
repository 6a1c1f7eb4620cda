"""Runs as plain Python functions: what `loopaware run NAME` starts.

In: typed arguments. Out: a folder with a table, a report and results. `RECIPES` names each function without importing
it. Deliberately elsewhere: the parts they are made of; a recipe only puts library parts together.
"""

from __future__ import annotations

from typing import NamedTuple


class Recipe(NamedTuple):
    """A run: where its function is ("module:function"), what it shows, how long it takes on two cores."""

    function: str
    shows: str
    takes: str


RECIPES = {
    "distances": Recipe(
        "loopaware.recipes.distances:run",
        "Graph distances learned on 16 nodes and solved on 100: learned halting makes depth follow the problem; "
        "the same net at a fixed large depth, and an unshared stack, fail.",
        "4 minutes",
    ),
    "chase": Recipe(
        "loopaware.recipes.chase:run",
        "Pointer chasing learned on 6 hops and followed for 16, a loop for each hop, with a halt that was taught.",
        "12 minutes",
    ),
    "prefix-sums": Recipe(
        "loopaware.recipes.prefix_sums:run",
        "Running parities learned on 16 bits and right on 512, with stopping rules fixed beforehand.",
        "8 minutes",
    ),
    "halting-rules": Recipe(
        "loopaware.recipes.halting_rules:run",
        "Eleven ways to halt on one task at equal training: accuracy, loops, operations, spread over seeds.",
        "40 minutes",
    ),
    "estimators": Recipe(
        "loopaware.recipes.estimators:run",
        "Bias and variance of REINFORCE, straight-through and Gumbel halting against the exact gradient.",
        "10 seconds",
    ),
    "parity": Recipe(
        "loopaware.recipes.parity:run",
        "Parity of sparse vectors: a Repeat-RNN, ACT and PonderNet on one cell, with one budget of training.",
        "5 minutes",
    ),
    "copy-reverse": Recipe(
        "loopaware.recipes.copy_reverse:run",
        "Strings of up to 10 symbols learned, of 40 generated: Universal Transformers against a plain one.",
        "30 minutes",
    ),
    "poisson": Recipe(
        "loopaware.recipes.poisson:run",
        "Poisson's equation: a solver of 36 numbers, learned on small grids, against Jacobi, SOR, conjugate gradients "
        "and multigrid on large ones, every solution to a tolerance that halting guarantees.",
        "2 minutes",
    ),
    "fixed-point": Recipe(
        "loopaware.recipes.fixed_point:run",
        "Implicit gradients against 1,500 steps of backpropagation: error, memory and time, by rate of contraction.",
        "1 minute",
    ),
    "sudoku": Recipe(
        "loopaware.recipes.sudoku:run",
        "Sudoku of 6 x 6: one small layer that recurs on its answer, its heads told rows, columns and blocks, solves "
        "nineteen of twenty, plain layers of equal CPU time three of four; each puzzle stops by itself, in tests too.",
        "7 minutes",
    ),
    "text": Recipe(
        "loopaware.recipes.text:run",
        "A small language model with a loop against plain ones of equal parameters and of equal operations; loops "
        "swept beyond those of training, and bytes that leave early.",
        "4 minutes",
    ),
    "retrofit": Recipe(
        "loopaware.recipes.retrofit:run",
        "A small pretrained Llama is given a loop and healed: loss against loops, beside the original fine-tuned for "
        "as long, and beside its layers tied with and without LoRA.",
        "6 minutes",
    ),
    "reactions": Recipe(
        "loopaware.recipes.reactions:run",
        "A pretrained looped ALBERT reads real chemical reactions: accuracy by loops, and what each training-free "
        "halting rule saves.",
        "2 minutes, and a download of 3 MB",
    ),
}

BENCHMARKS = {
    "gradients": Recipe(
        "loopaware.recipes.gradients:run",
        "Every gradient rule against backpropagation through all steps: parity, peak memory by steps, time.",
        "2 minutes",
    ),
    "quantized": Recipe(
        "loopaware.recipes.quantized:run",
        "The error of states that are kept in few bits between steps, by bits and steps, against float32.",
        "20 seconds",
    ),
    "execution": Recipe(
        "loopaware.recipes.execution:run",
        "Leaving out tokens that have stopped, against masking them and a fixed depth: time next to operations.",
        "4 minutes",
    ),
    "overhead": Recipe(
        "loopaware.recipes.overhead:run",
        "A block against its matrix products alone, and a loop against the same steps in bare Python.",
        "1 minute",
    ),
    "batching": Recipe(
        "loopaware.recipes.batching:run",
        "Requests of mixed difficulty in batches: in order, by length, by predicted and by true depth, masked, "
        "selective and continuous, in sequences per second.",
        "4 minutes",
    ),
    "speculative": Recipe(
        "loopaware.recipes.speculative:run",
        "Drafts by few steps of a looped language model, verified by all, against plain decoding: what is kept, time.",
        "4 minutes",
    ),
    "compiled": Recipe(
        "loopaware.recipes.compiled:run",
        "Compiling the step of a loop, or all of it: time by width and batch, and the runs that pay compiling back.",
        "6 minutes",
    ),
}
