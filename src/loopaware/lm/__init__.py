"""What recurrent-depth language models share: the cache, the frame around the loop, exits, layers of transformers.

In: the pieces of a causal model that has a loop in its middle. Out: a model that transformers can load, train and
generate with, in which stopped tokens cost nothing. Needs the extra `lm`. Deliberately elsewhere: the models
(`loopaware.models.looped_lm`), halting rules and the other parts of a loop.
"""

from loopaware.lm.cache import LoopCache
from loopaware.lm.exits import EveryExit, ExitGate, Exits, GatedExit, LastExit
from loopaware.lm.frame import Attention, current
from loopaware.lm.layers import Dense, Layers
from loopaware.lm.model import LoopOutput, RecurrentForCausalLM
from loopaware.lm.operations import TokenCost, token_cost
from loopaware.lm.policies import Exact, First, Last, Latest
from loopaware.lm.start import Noise

__all__ = [
    "Attention",
    "Dense",
    "EveryExit",
    "Exact",
    "ExitGate",
    "Exits",
    "First",
    "GatedExit",
    "Last",
    "LastExit",
    "Latest",
    "Layers",
    "LoopCache",
    "LoopOutput",
    "Noise",
    "RecurrentForCausalLM",
    "TokenCost",
    "current",
    "token_cost",
]
