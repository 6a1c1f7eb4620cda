"""Data that loops are tried on: one file per task, with its test sets and its own measure.

In: sizes and a generator of random numbers. Out: named tuples of tensors. Deliberately elsewhere: models, losses and
training (`loopaware.train`, `loopaware.recipes`).
"""

from loopaware.tasks import bits, graphs, pointers, strings, sudoku, text

__all__ = ["bits", "graphs", "pointers", "strings", "sudoku", "text"]
