"""Which steps of a loop are differentiated: all, some, one, or the place where it comes to rest.

In: `run(carry, steps)`, a carry, and how many steps are left. Out: the carry after them, attached to the graph as the
rule says. Without gradients (`torch.no_grad`) every rule is a plain run. Deliberately elsewhere: how steps are run
(`loopaware.execute`).
"""

from loopaware.grad.rest import Implicit, OneStep, Phantom
from loopaware.grad.reversible import Reversible
from loopaware.grad.unrolled import Checkpointed, Full, Truncated

__all__ = ["Checkpointed", "Full", "Implicit", "OneStep", "Phantom", "Reversible", "Truncated"]
