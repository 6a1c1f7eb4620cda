"""Which rows of a loop are done: rules without parameters, learned rules, what to make of their logits, depths that are
drawn, rules of rules.

In: the states before and after a step, the rule's memory. Out: a `Verdict` (stop, weight, score) for each row. With
`Loop(rows=1)` a rule speaks for sequences, with `rows=2` for tokens, and `Grouped` for blocks of tokens.
Deliberately elsewhere: freezing rows that stopped (the driver) and skipping their work (`loopaware.execute`).
"""

from loopaware.halt.combine import All, Any, Grouped, Patience, Switched, Watched
from loopaware.halt.drawn import Drawn, Written
from loopaware.halt.free import KL, Below, Confidence, Converged, Entropy, Never
from loopaware.halt.learned import Linear, Residual
from loopaware.halt.sampled import Gumbel, Sampled, StraightThrough
from loopaware.halt.soft import ACT, Before, Ponder, StickBreaking

__all__ = [
    "ACT",
    "KL",
    "All",
    "Any",
    "Before",
    "Below",
    "Confidence",
    "Converged",
    "Drawn",
    "Entropy",
    "Grouped",
    "Gumbel",
    "Linear",
    "Never",
    "Patience",
    "Ponder",
    "Residual",
    "Sampled",
    "StickBreaking",
    "StraightThrough",
    "Switched",
    "Watched",
    "Written",
]
