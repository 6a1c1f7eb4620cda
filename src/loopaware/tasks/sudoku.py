"""Sudoku: grids of 6 x 6 and 9 x 9 whose blanks can be filled in one way only.

In: how many, how large, how many blanks, a generator; or a file of real puzzles. Out: a batch of `Puzzles`. A few
hundred puzzles are dug out of solved grids once, by exact search, until no digit more can be taken away; batches are
drawn from them by the symmetries of the game and by putting digits back, for all puzzles at once. Solutions of test
puzzles are kept out of training by a rule that looks at the solution alone (`reserved`). Deliberately elsewhere: nets
and losses (`loopaware.recipes.sudoku`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loopaware.checks import bounded

BLOCKS = {6: (2, 3), 9: (3, 3)}
"""Rows and columns of a block, for each size of a grid."""

DUG = {6: 500, 9: 60}
"""How many puzzles are dug by search, for each size; they take seconds."""

SHARE = 8
"""One solution in so many is reserved for tests."""


class Puzzles(NamedTuple):
    """A batch of puzzles, row after row of the grid. Shapes: givens (B, n * n) long, 0 = blank; solution the same."""

    givens: Tensor
    solution: Tensor

    @property
    def size(self) -> int:
        """Digits of the grid."""
        return math.isqrt(self.givens.shape[-1])

    @property
    def holes(self) -> Tensor:
        """Blanks of each puzzle. Shapes: -> (B,) long."""
        return (self.givens == 0).sum(-1)


def sample(count: int, size: int, holes: tuple[int, int], *, generator: torch.Generator) -> Puzzles:
    """Draw puzzles to train on; none of their solutions is a test puzzle's, however its digits are named.

    Args:
        count: how many puzzles.
        size: 6 or 9.
        holes: the fewest and the most blanks, both included, drawn evenly; a puzzle that would no longer have one
            solution alone gets fewer, which happens from about 22 blanks on in 6 x 6 and 52 in 9 x 9.
        generator: where random numbers come from; on the CPU.

    Raises:
        ValueError: a size other than 6 or 9, or a range of blanks that is none.

    >>> batch = sample(3, 6, (8, 20), generator=torch.Generator().manual_seed(0))
    >>> batch.givens.shape, bool(((batch.givens == 0) | (batch.givens == batch.solution)).all())
    (torch.Size([3, 36]), True)
    """
    return drawn(count, size, holes, generator, seed=0, tests=False)


def held_out(count: int, size: int, holes: tuple[int, int], *, seed: int = 0) -> Puzzles:
    """Test puzzles, from grids that were dug for tests and by a generator of their own.

    >>> bool(reserved(held_out(50, 6, (8, 20)).solution).all())
    True
    """
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + size)
    return drawn(count, size, holes, generator, seed=seed + 1, tests=True)


def right(answer: Tensor, puzzles: Puzzles) -> Tensor:
    """The measure: whether every cell of a grid is right. Shapes: answer (..., B, n * n, n) logits of the digits from 1
    on, or (..., B, n * n) digits -> (..., B) bool.

    >>> puzzles = held_out(2, 6, (8, 20))
    >>> right(puzzles.solution, puzzles)
    tensor([True, True])
    """
    return (digits(answer) == puzzles.solution).all(-1)


def digits(answer: Tensor) -> Tensor:
    """The digits of logits; digits as they are."""
    return answer.argmax(-1) + 1 if answer.is_floating_point() else answer


def read(source: str | Path | Iterable[str], count: int | None = None) -> Puzzles:
    """Real puzzles: one a line, 81 characters (or 36) from 1 on, `.` or `0` for a blank, and perhaps its solution.

    A solution follows behind a comma or a space; where it is missing the puzzle is solved, which takes a tenth of a
    second where it is hard. Empty lines, and lines that begin with `#`, are passed over.

    Args:
        source: a file, or its lines.
        count: read the first so many; None reads all.

    Raises:
        ValueError: a line holds no puzzle, or not exactly one solution fits it; names the line.

    References: P. Norvig, "Solving Every Sudoku Puzzle", 2006, https://norvig.com/sudoku.html (the format of lines).

    >>> read(["6.45.2..5.635.2.41.1.6..2...3..412.."]).holes
    tensor([18])
    """
    lines = Path(source).read_text().splitlines() if isinstance(source, str | Path) else source
    found: list[tuple[list[int], list[int]]] = []
    for number, line in enumerate(lines, start=1):
        if count is not None and len(found) == count:
            break
        if line.strip() and not line.startswith("#"):
            found.append(parsed(line, number, len(found[0][0]) if found else None))
    if not found:
        raise ValueError("a file of puzzles must hold at least one, got none. Put one on each line.")
    givens, solutions = zip(*found, strict=True)
    return Puzzles(torch.tensor(givens), torch.tensor(solutions))


def parsed(line: str, number: int, cells: int | None) -> tuple[list[int], list[int]]:
    """The puzzle on a line, and its solution."""
    size = {36: 6, 81: 9}
    words = line.replace(",", " ").split()
    grids = [[0 if mark == "." else int(mark) for mark in word if mark in ".0123456789"] for word in words]
    whole = all(len(grid) == len(word) and len(grid) in size for grid, word in zip(grids, words, strict=True))
    alike = whole and len({len(grid) for grid in grids} | ({cells} if cells else set())) == 1
    if not (1 <= len(grids) <= 2 and alike and max(map(max, grids)) <= size[len(grids[0])]):
        raise ValueError(
            f"line {number} must be 81 characters, digits with . or 0 for a blank, and perhaps a comma and as many of "
            f"the solution, got {line[:90]!r}. All lines of a file have the same length; remove this one."
        )
    found = solve(grids[0], size[len(grids[0])])
    if len(found) != 1 or (len(grids) == 2 and grids[1] != found[0]):
        told = (
            "another solution than the one beside it" if len(found) == 1 else f"{('none', '', 'several')[len(found)]}"
        )
        raise ValueError(
            f"line {number} must be a puzzle with exactly one solution, got {told} for {line[:90]!r}. Remove the line."
        )
    return grids[0], found[0]


def solve(cells: Sequence[int], size: int, limit: int = 2, order: Sequence[int] | None = None) -> list[list[int]]:
    """The solutions of a grid, up to `limit` of them: exact search that goes on at the cell with the fewest choices.

    Args:
        cells: row after row, 0 = blank.
        size: 6 or 9.
        limit: two tell whether there is one alone.
        order: the digits in the order in which they are tried; None counts up.

    >>> len(solve([0] * 36, 6, limit=3))
    3
    """
    search = Search(cells, size, limit, range(1, size + 1) if order is None else order)
    if search.possible:
        search.go_on()
    return search.found


class Search:
    """Backtracking, with the digits that each row, column and block has used as the bits of a number."""

    def __init__(self, cells: Sequence[int], size: int, limit: int, order: Iterable[int]):
        self.units = list(zip(*places(size), strict=True))
        self.grid = list(cells)
        self.blanks = [cell for cell, digit in enumerate(cells) if not digit]
        self.used = [0] * (3 * size)
        self.every = (2 << size) - 2
        self.limit, self.order = limit, [(digit, 1 << digit) for digit in order]
        self.found: list[list[int]] = []
        self.possible = all(self.put(cell, 1 << digit) for cell, digit in enumerate(cells) if digit)

    def put(self, cell: int, bit: int) -> bool:
        """Use a digit in the units of a cell, if none of them has it."""
        units, used = self.units[cell], self.used
        free = not any(used[unit] & bit for unit in units)
        for unit in units:
            used[unit] |= bit
        return free

    def narrowest(self) -> tuple[int, int]:
        """Where in `blanks` the cell with the fewest choices stands, and its choices; 0 if some cell has none."""
        fewest, place, free, used = 99, 0, 0, self.used
        for at, cell in enumerate(self.blanks):
            row, column, block = self.units[cell]
            choices = self.every & ~(used[row] | used[column] | used[block])
            many = choices.bit_count()
            if many < fewest:
                fewest, place, free = many, at, choices
                if many < 2:
                    break
        return place, free

    def go_on(self) -> None:
        """Fill the blanks that are left, in every way until the limit is reached."""
        if not self.blanks:
            self.found.append(self.grid.copy())
            return
        place, free = self.narrowest()
        if not free:
            return
        cell, used = self.blanks.pop(place), self.used
        row, column, block = self.units[cell]
        for digit, bit in self.order:
            if free & bit and len(self.found) < self.limit:
                self.grid[cell] = digit
                used[row] ^= bit
                used[column] ^= bit
                used[block] ^= bit
                self.go_on()
                used[row] ^= bit
                used[column] ^= bit
                used[block] ^= bit
        self.grid[cell] = 0
        self.blanks.insert(place, cell)


@lru_cache
def places(size: int) -> tuple[list[int], list[int], list[int]]:
    """The row, column and block of each cell, as numbers of 3 n units."""
    high, wide = shape(size)
    cells = [divmod(cell, size) for cell in range(size * size)]
    blocks = [2 * size + row // high * (size // wide) + column // wide for row, column in cells]
    return [row for row, _ in cells], [size + column for _, column in cells], blocks


def shape(size: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    if size not in BLOCKS:
        raise ValueError(f"size must be 6 or 9, got {size}. Blocks are of 2 x 3 or 3 x 3 cells.")
    return BLOCKS[size]


@lru_cache
def pool(size: int, count: int, seed: int) -> Puzzles:
    """Puzzles of which no given can be taken away, dug out of random grids; made once for the same arguments."""
    chance = random.Random(1_000_003 * seed + size)
    made = [dug(size, chance) for _ in range(count)]
    givens, solutions = zip(*made, strict=True)
    return Puzzles(torch.tensor(givens), torch.tensor(solutions))


def dug(size: int, chance: random.Random) -> tuple[list[int], list[int]]:
    """A random solution, and what is left of it when every cell that the others decide is blank."""
    order = list(range(1, size + 1))
    chance.shuffle(order)
    first = order + [0] * (size * size - size)  # a first row, so that search begins at a random place
    chance.shuffle(order)
    solution = solve(first, size, 1, order)[0]
    grid, cells = solution.copy(), list(range(size * size))
    chance.shuffle(cells)
    for cell in cells:
        digit, grid[cell] = grid[cell], 0
        if any(another(grid, cell, other, size) for other in range(1, size + 1) if other != digit):
            grid[cell] = digit
    return grid, solution


def another(grid: list[int], cell: int, digit: int, size: int) -> bool:
    """Whether a solution has this digit in the cell."""
    grid[cell] = digit
    found = solve(grid, size, limit=1)
    grid[cell] = 0
    return bool(found)


def drawn(count: int, size: int, holes: tuple[int, int], generator: torch.Generator, seed: int, tests: bool) -> Puzzles:
    """Puzzles from the pool of the seed, moved by symmetries, on the side of tests or of training."""
    bounded("count", count, "Draw at least one puzzle.")
    shape(size)
    low, high = holes
    if not 1 <= low <= high <= size * size:
        raise ValueError(
            f"holes must be a range within 1 and {size * size}, got {low} to {high}. Take blanks that fit."
        )
    dug_out = pool(size, DUG[size], seed)
    found: list[Puzzles] = []
    missing = count
    while missing > 0:
        draws = missing * (2 * SHARE if tests else 2)
        chosen = torch.randint(len(dug_out.givens), (draws,), generator=generator)
        moved = symmetric(Puzzles(*(field[chosen] for field in dug_out)), generator)
        side = reserved(moved.solution) == tests
        found.append(Puzzles(*(field[side][:missing] for field in moved)))
        missing -= len(found[-1].givens)
    givens, solution = (torch.cat(fields) for fields in zip(*found, strict=True))
    many = torch.randint(low, high + 1, (count, 1), generator=generator)
    noise = torch.rand(givens.shape, generator=generator).masked_fill(givens > 0, 1.0)
    blank = (noise.argsort(-1).argsort(-1) < many) & (givens == 0)
    return Puzzles(solution.masked_fill(blank, 0), solution)


def symmetric(puzzles: Puzzles, generator: torch.Generator) -> Puzzles:
    """Each puzzle as another of its kind: digits renamed, bands and their rows moved, columns likewise, perhaps turned.

    A grid is mirrored at its diagonal with chance 1/2 if its blocks are square.
    """
    size, count = puzzles.size, len(puzzles.givens)
    high, wide = shape(size)
    rows, columns = lines(count, size, high, generator), lines(count, size, wide, generator)
    cells = (rows[:, :, None] * size + columns[:, None]).flatten(1)
    if high == wide:
        turned = cells.unflatten(1, (size, size)).mT.flatten(1)
        cells = torch.where(torch.rand(count, 1, generator=generator) < 0.5, turned, cells)
    names = torch.cat([torch.zeros(count, 1).long(), 1 + torch.rand(count, size, generator=generator).argsort(-1)], 1)
    return Puzzles(*(names.gather(1, field.gather(1, cells)) for field in puzzles))


def lines(count: int, size: int, thick: int, generator: torch.Generator) -> Tensor:
    """Orders of rows (or columns): bands of `thick` among each other, and the rows within each. Shapes: -> (B, n)."""
    bands = torch.rand(count, size // thick, 1, generator=generator).argsort(1)
    within = torch.rand(count, size // thick, thick, generator=generator).argsort(-1)
    return (bands * thick + within).flatten(1)


def reserved(solution: Tensor) -> Tensor:
    """Whether a solution is for tests; renaming its digits changes nothing. Shapes: (B, n * n) long -> (B,) bool."""
    size = math.isqrt(solution.shape[-1])
    named = solution[:, :size].argsort(-1).gather(1, solution - 1)  # the first row becomes 0, 1, 2, ...
    factors = torch.randint(1 << 30, solution.shape[-1:], generator=torch.Generator().manual_seed(size))
    return (named * factors).sum(-1) % 1009 % SHARE == 0
