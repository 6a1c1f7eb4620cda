"""Sudoku: puzzles have one solution, files are read, and the recipe runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loopaware.recipes import sudoku as recipe
from loopaware.recipes.sudoku_report import DEEP, GENERATED, LEARNED, PLAIN, REAL
from loopaware.tasks import sudoku

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "sudoku"
TINY = {"steps": 6, "seeds": (0, 1), "batch": 4, "dim": 8, "count": 9, "layers": 2, "deep": 5, "supervision": 3}
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Few puzzles are dug, which takes seconds, but where the recipe's own settings are asked for."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(sudoku, "DUG", {6: 40, 9: 9})
    yield
    torch.set_num_threads(before)


def fits(grid: list[int], size: int) -> bool:
    """Whether every row, column and block holds every digit, by counting."""
    high, wide = {6: (2, 3), 9: (3, 3)}[size]
    rows = [grid[size * row : size * row + size] for row in range(size)]
    blocks = [
        [rows[top + i][left + j] for i in range(high) for j in range(wide)]
        for top in range(0, size, high)
        for left in range(0, size, wide)
    ]
    every = list(range(1, size + 1))
    return all(sorted(unit) == every for unit in [*rows, *zip(*rows, strict=True), *blocks])


def naive(grid: list[int], size: int) -> int:
    """How many solutions, by trying every digit in the first blank and looking at whole units; slow."""
    high, wide = {6: (2, 3), 9: (3, 3)}[size]
    if 0 not in grid:
        return 1
    cell = grid.index(0)
    row, column = divmod(cell, size)
    seen = {
        digit
        for at, digit in enumerate(grid)
        if at // size == row
        or at % size == column
        or (at // size // high == row // high and at % size // wide == column // wide)
    }
    return sum(
        naive([*grid[:cell], digit, *grid[cell + 1 :]], size) for digit in range(1, size + 1) if digit not in seen
    )


@pytest.mark.parametrize(("size", "holes"), [(6, (1, 36)), (9, (1, 81))])
def test_every_puzzle_has_the_one_solution_that_is_given(size, holes):
    generator = torch.Generator().manual_seed(0)
    for batch in (sudoku.sample(31, size, holes, generator=generator), sudoku.held_out(31, size, holes)):
        assert batch.size == size and batch.givens.shape == (31, size * size)
        for givens, solution in zip(batch.givens.tolist(), batch.solution.tolist(), strict=True):
            assert fits(solution, size) and sudoku.solve(givens, size) == [solution]
            assert all(given in (0, digit) for given, digit in zip(givens, solution, strict=True))


def test_search_counts_as_plain_recursion_does():
    batch = sudoku.sample(12, 6, (20, 26), generator=torch.Generator().manual_seed(0))
    for givens in batch.givens.tolist():
        assert naive(givens, 6) == 1
        freed = [0 if cell % 5 == 0 else digit for cell, digit in enumerate(givens)]
        assert len(sudoku.solve(freed, 6, limit=10_000)) == naive(freed, 6)
    assert sudoku.solve([1, 1, *[0] * 34], 6) == [] and len(sudoku.solve([0] * 81, 9, limit=5)) == 5


def test_no_given_of_a_dug_puzzle_can_be_taken_away():
    pool = sudoku.pool(6, 9, 0)
    for givens in pool.givens.tolist():
        for cell in (cell for cell, digit in enumerate(givens) if digit):
            assert len(sudoku.solve([*givens[:cell], 0, *givens[cell + 1 :]], 6)) == 2


@pytest.mark.parametrize("size", [6, 9])
def test_symmetries_keep_puzzles_what_they_are(size):
    some = sudoku.pool(size, 9, 0)
    moved = sudoku.symmetric(some, torch.Generator().manual_seed(0))
    assert torch.equal(moved.holes, some.holes) and not torch.equal(moved.solution, some.solution)
    assert all(fits(solution, size) for solution in moved.solution.tolist())
    assert torch.equal(moved.givens, moved.solution * (moved.givens > 0))


@pytest.mark.parametrize("size", [6, 9])
def test_solutions_of_tests_are_kept_out_of_training(size):
    generator = torch.Generator().manual_seed(0)
    batch, tests = sudoku.sample(999, size, (5, 20), generator=generator), sudoku.held_out(99, size, (5, 20))
    assert not sudoku.reserved(batch.solution).any() and sudoku.reserved(tests.solution).all()
    names = torch.cat([torch.zeros(1).long(), torch.randperm(size) + 1])
    assert sudoku.reserved(names[tests.solution]).all(), "other names for the digits change nothing"
    assert torch.equal(tests.givens, sudoku.held_out(99, size, (5, 20)).givens), "always the same"
    assert not torch.equal(tests.givens, sudoku.held_out(99, size, (5, 20), seed=1).givens)


def test_blanks_are_as_many_as_asked_for():
    batch = sudoku.sample(999, 6, (8, 17), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(batch.holes, minlength=18)
    assert counts[8:].min() > 60 and counts[:8].sum() == 0 and len(counts) == 18


def test_a_grid_is_right_if_every_cell_is():
    puzzles = sudoku.held_out(2, 6, (8, 20))
    logits = torch.nn.functional.one_hot(puzzles.solution - 1, 6).float()
    logits[1, 35] = -logits[1, 35]
    assert sudoku.right(torch.stack([logits, logits]), puzzles).tolist() == [[True, False]] * 2
    assert sudoku.right(sudoku.digits(logits), puzzles).tolist() == [True, False]


def test_files_are_read(tmp_path):
    file = tmp_path / "puzzles.txt"
    zeros = EASY.replace(".", "0")
    file.write_text(f"# a comment\n{EASY}\n\n{zeros},{SOLVED}\n{EASY} {SOLVED}\n")
    puzzles = sudoku.read(file)
    assert puzzles.givens.shape == (3, 81) and puzzles.size == 9 and puzzles.holes.tolist() == [51] * 3
    assert ["".join(map(str, row)) for row in puzzles.solution.tolist()] == [SOLVED] * 3
    assert torch.equal(puzzles.givens[0], puzzles.givens[1])
    assert len(sudoku.read(file, count=2).givens) == 2 and len(sudoku.read([EASY]).givens) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([EASY, EASY[:-1]], r"line 2 must be 81 characters, digits with . or 0 for a blank.*got '53..7"),
        ([EASY.replace("9", "x")], "line 1 must be 81 characters"),
        ([f"{EASY},{SOLVED[:-1]}"], "line 1 must be 81 characters"),
        ([f"{EASY},{SOLVED},{SOLVED}"], "line 1 must be 81 characters"),
        (["7" + "." * 35], "line 1 must be 81 characters"),
        ([EASY, "." * 36], "All lines of a file have the same length; remove this one"),
        (["5" + EASY[1:].replace("3", "5", 1)], "line 1 must be a puzzle with exactly one solution, got none for"),
        (["." * 81], "line 1 must be a puzzle with exactly one solution, got several for"),
        ([f"{EASY},{SOLVED[::-1]}"], "got another solution than the one beside it for .* Remove the line"),
        (["", "# nothing"], "a file of puzzles must hold at least one, got none. Put one on each line"),
    ],
)
def test_bad_lines_are_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        sudoku.read(lines)


@pytest.mark.skipif(not DATA.exists(), reason=f"the real puzzles of {DATA} are not part of the project")
@pytest.mark.parametrize("name", ["hardest.txt", "sudokus_17.txt", "sudokus_hard.txt", "sudoku10k.txt"])
def test_real_puzzles_are_read(name):
    puzzles = sudoku.read(DATA / name, count=5)
    assert puzzles.givens.shape == (5, 81) and all(fits(solution, 9) for solution in puzzles.solution.tolist())
    if name == "sudokus_17.txt":
        assert puzzles.holes.tolist() == [64] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda g: sudoku.sample(1, 4, (1, 2), generator=g),
            "size must be 6 or 9, got 4. Blocks are of 2 x 3 or 3 x 3",
        ),
        (
            lambda g: sudoku.sample(0, 6, (1, 2), generator=g),
            "count must be at least 1, got 0. Draw at least one puzzle",
        ),
        (lambda g: sudoku.sample(1, 6, (0, 2), generator=g), "holes must be a range within 1 and 36, got 0 to 2"),
        (lambda g: sudoku.sample(1, 6, (9, 2), generator=g), "got 9 to 2. Take blanks that fit"),
        (lambda g: sudoku.sample(1, 9, (9, 82), generator=g), "holes must be a range within 1 and 81, got 9 to 82"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.Generator())


def test_heads_see_rows_columns_blocks_and_everything():
    seen = recipe.Units(torch.nn.Identity(), 6).sight[0]
    cell = 6 * 3 + 4
    expected = [
        {18, 19, 20, 21, 22, 23},
        {4, 10, 16, 22, 28, 34},
        {15, 16, 17, 21, 22, 23},
        set(range(36)),
    ]
    assert recipe.Units(torch.nn.Identity(), 6, geometry=False).sight is None
    assert [set(head[cell].nonzero().flatten().tolist()) for head in seen] == expected


@pytest.mark.parametrize("geometry", [True, False])
@pytest.mark.parametrize("kind", ["recursive", "layered"])
def test_every_weight_of_both_nets_is_taught(kind, geometry):
    torch.manual_seed(0)
    plan = recipe.Plan(6, (8, 20), 9, 4, 8, 2, 2, 2, 2, 2e-3, 5, 0.9, geometry)
    net = getattr(recipe, kind)(plan)
    loss = recipe.recursive_loss(plan) if kind == "recursive" else recipe.plain_loss
    value, metrics = loss(net, recipe.drawn(plan, torch.Generator().manual_seed(0)), 0)
    value.backward()
    dead = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert not dead and "accuracy" in metrics


def test_the_recipe_end_to_end_and_again(tmp_path, capsys, monkeypatch):
    (tmp_path / "real.txt").write_text("\n".join(lines_of(sudoku.held_out(4, 6, (8, 9)))))
    options = {**TINY, "puzzles": tmp_path / "real.txt", "puzzle_count": 3}
    recipe.run(tmp_path, **options)
    said = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in said and "learned halt" in said
    first = (tmp_path / "results.json").read_bytes()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") + page.count("data:image/png") >= 3 and "The rule stops here." in page
    for result in json.loads(first)["results"]:
        assert set(result["sweeps"]) == {GENERATED, REAL} and result["seconds"].keys() == {LEARNED, PLAIN}
        sweep = result["sweeps"][GENERATED]
        assert len(sweep["by_step"]) == 5 and len(sweep["steps"]) == len(sweep["holes"]) == 9
        assert len(result["sweeps"][REAL]["steps"]) == 3 and result["updates"][LEARNED] == 6

    monkeypatch.setattr(recipe.sudoku, "sample", None)  # a finished run draws nothing to train on
    recipe.run(tmp_path, **options)
    assert (tmp_path / "results.json").read_bytes() == first
    with pytest.raises(ValueError, match=r"must hold a run with the settings \{'inner': 5\}, got \{'inner': 2\}"):
        recipe.run(tmp_path, **options, inner=5)


def test_seconds_of_a_resumed_run_are_those_of_the_whole(tmp_path):
    file = tmp_path / "seconds.json"
    assert recipe.lasted(file, spent=10.0, taken=5, steps=20) == 40.0, "a kill lost three quarters of the steps"
    assert recipe.lasted(file, spent=0.1, taken=0, steps=20) == 40.0, "a finished run is read"


def lines_of(puzzles: sudoku.Puzzles) -> list[str]:
    return ["".join(map(str, row)) for row in puzzles.givens.tolist()]


def test_the_recipe_of_nine(tmp_path):
    recipe.run(tmp_path, **{**TINY, "seeds": (0,), "steps": 2, "outer": 2}, size=9)
    assert json.loads((tmp_path / "results.json").read_text())["plan"]["holes"] == [30, 54]


def test_what_the_recipe_cannot_do_is_refused(tmp_path):
    (tmp_path / "real.txt").write_text(EASY)
    for options, message in [
        ({"seeds": ()}, "seeds must be at least 1, got 0. Name at least one seed"),
        ({"size": 5}, "size must be 6 or 9, got 5"),
        ({"puzzles": tmp_path / "real.txt"}, "must be of the size trained on, 6, got 9. Add --size 9"),
        ({"dim": 6}, "dim must be a positive multiple of heads, got 6 and 4"),
        ({"threshold": 1.5}, "threshold must be above 0.0 and at most 0.99"),
        ({"supervision": 0}, "max_steps must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe.run(tmp_path / "run", **{**TINY, **options})


@pytest.mark.slow
def test_recursion_shows_what_it_promises(tmp_path):
    """The claims of the recipe, with its own settings: one seed."""
    recipe.run(tmp_path, seeds=(0,))
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    accuracy = result["sweeps"][GENERATED]["accuracy"]
    assert accuracy[DEEP] >= 0.85 and abs(accuracy[LEARNED] - accuracy[DEEP]) <= 0.03
    assert accuracy[PLAIN] <= accuracy[LEARNED] - 0.1
    assert result["seconds"][LEARNED] < 90
    assert sum(result["sweeps"][GENERATED]["steps"]) / 500 < 8, "the halt saves more than half"
