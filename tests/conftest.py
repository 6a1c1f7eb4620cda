"""What every test shares: the same random numbers on every run. Tolerances live in `loopaware.testing.assert_close`."""

from __future__ import annotations

import random

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that every global generator begins a test with."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - libraries may draw from the global generator
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def threads():
    """Recipes set the number of threads; whoever comes next has the old one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
