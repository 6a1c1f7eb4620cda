"""What of a token that took few steps serves later tokens that take more: which keys and values a cache keeps.

In: a step. Out: which slot of a layer that step uses, and whether it writes to it. Deliberately elsewhere: the tensors
(`loopaware.lm.cache`).

A policy belongs to the model and not to the cache alone: it decides what later tokens see, with a cache or without one.
`exact` policies give the same answer in pieces as in one pass over the whole text, whatever steps the tokens take;
where all tokens take the same number of steps, `Exact`, `Latest` and no policy at all agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Policy(Protocol):
    """Which keys and values of a token later tokens look at, step by step.

    `exact`: in pieces as in one pass. `frozen`: a token that has stopped goes on making keys and values from the state
    it stopped in, so that nothing is saved when it stops.
    """

    @property
    def exact(self) -> bool: ...
    @property
    def frozen(self) -> bool: ...

    def slots(self, steps: int, /) -> int: ...
    def slot(self, step: int, /) -> int: ...
    def writes(self, step: int, /) -> bool: ...


@dataclass(frozen=True)
class Exact:
    """The law of loops: K_t(s) = K(h_t) at every step s, of the state in which t stopped if it did.

    Equals the loop over the whole text without a cache, for any mix of steps. Each token costs all steps, whenever it
    stops: take it as the reference, and `Latest` to save work.

    >>> Exact().slots(8)
    8
    """

    exact = True
    frozen = True

    def slots(self, steps: int) -> int:
        """How many slots a layer has for so many steps."""
        return steps

    def slot(self, step: int) -> int:
        """The slot that a step reads."""
        return step

    def writes(self, step: int) -> bool:
        """Whether a step writes to it."""
        return True


@dataclass(frozen=True)
class Latest:
    """A token that stopped after N steps serves later ones by its last step: K_t(s) = K_t(min(s, N - 1)).

    The default: a stopped token costs nothing more, and text read in pieces equals text read at once.

    >>> Latest().exact, Latest().frozen
    (True, False)
    """

    exact = True
    frozen = False

    def slots(self, steps: int) -> int:
        """How many slots a layer has for so many steps."""
        return steps

    def slot(self, step: int) -> int:
        """The slot that a step reads."""
        return step

    def writes(self, step: int) -> bool:
        """Whether a step writes to it."""
        return True


@dataclass(frozen=True)
class First:
    """Keys and values of the first step serve all steps: K_t(s) = K_t(0).

    One slot for each layer, the memory of a model that does not loop. A model must be trained with it.

    References: S. Bae et al., "Mixture-of-Recursions", 2025, arXiv 2507.10524 (recursive key-value sharing).

    >>> First().slots(8)
    1
    """

    exact = True
    frozen = False

    def slots(self, steps: int) -> int:
        """How many slots a layer has for so many steps."""
        return 1

    def slot(self, step: int) -> int:
        """The slot that a step reads."""
        return 0

    def writes(self, step: int) -> bool:
        """Whether a step writes to it."""
        return step == 0


@dataclass(frozen=True)
class Last:
    """Keys and values of the last step a token took serve all steps: K_t(s) = K_t(N - 1).

    One slot for each layer, without training for it. Not exact: tokens that are read together see each other's current
    step, not the last one, so the answer depends on how the text is cut into pieces.

    >>> Last().exact
    False
    """

    exact = False
    frozen = False

    def slots(self, steps: int) -> int:
        """How many slots a layer has for so many steps."""
        return 1

    def slot(self, step: int) -> int:
        """The slot that a step reads."""
        return 0

    def writes(self, step: int) -> bool:
        """Whether a step writes to it."""
        return True
