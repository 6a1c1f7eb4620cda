"""How the steps of a loop are run: all of them, until no row is left, without the rows that have stopped, compiled.

In: `advance` (`loopaware.protocols.Advance`), which makes one step, a carry, and a number of steps. Out: the carry
after them. Deliberately elsewhere: what a step is (`loopaware.loop`), which ones are differentiated (`loopaware.grad`).
"""

from loopaware.execute.compacted import Compacted
from loopaware.execute.compiled import Compiled
from loopaware.execute.eager import Eager, Unrolled
from loopaware.execute.graphed import Graphed

__all__ = ["Compacted", "Compiled", "Eager", "Graphed", "Unrolled"]
