"""Public checks for authors of parts: each raises an AssertionError that says which law a part breaks.

In: a part, and the states or contexts it should work on. Out: nothing, or the broken law. Every part of loopaware
passes them (`tests/parts.py`); so should yours. Deliberately elsewhere: the laws themselves (`loopaware.protocols`).
"""

from loopaware.testing.loops import check_loop, check_traceable
from loopaware.testing.naive import naive
from loopaware.testing.parts import (
    check_body,
    check_execute,
    check_grad,
    check_halt,
    check_init,
    check_module,
    check_readout,
    check_update,
)
from loopaware.testing.tolerance import assert_close

__all__ = [
    "assert_close",
    "check_body",
    "check_execute",
    "check_grad",
    "check_halt",
    "check_init",
    "check_loop",
    "check_module",
    "check_readout",
    "check_traceable",
    "check_update",
    "naive",
]
