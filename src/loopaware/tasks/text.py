"""English text that every Python brings along, as bytes: pydoc's help topics, parted into what is learned and held out.

In: sizes and a generator of random numbers. Out: tensors of bytes. The topics quote each other at length, so a
paragraph that comes again is left out; else much of what is held out would have been learned by heart. The text
differs between versions of Python: give `Text.about` with every number. Deliberately elsewhere: models and losses
(`loopaware.recipes.text`).
"""

from __future__ import annotations

import hashlib
import platform
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopaware.checks import between, bounded

BYTES = 256
"""Classes of a byte."""


class Text(NamedTuple):
    """Bytes to learn from and bytes that are held out, which stand behind them.

    Shapes: learned (N) uint8, held_out (M) uint8.
    """

    learned: Tensor
    held_out: Tensor

    @property
    def about(self) -> dict[str, Any]:
        """What makes numbers comparable: the version of Python, both sizes in bytes, and the SHA-256 of the whole."""
        whole = torch.cat(self).numpy().tobytes()
        return {
            "python": platform.python_version(),
            "learned": len(self.learned),
            "held_out": len(self.held_out),
            "sha256": hashlib.sha256(whole).hexdigest(),
        }


def topics(share: float = 0.1) -> Text:
    """Python's help topics, each paragraph once; the last `share` of the bytes is held out, in one piece.

    Args:
        share: above 0 and below 1.

    Raises:
        ValueError: the share is out of range.

    >>> text = topics()
    >>> len(text.learned) // len(text.held_out)
    9
    """
    from pydoc_data.topics import topics as told

    between("share", share, 0.0, 1 - 1e-9, "Something must be learned, and something held out.")
    return parted(once("\n\n".join(told[name] for name in sorted(told))), share)


def once(text: str) -> str:
    r"""The paragraphs of a text, each once: where it stands last, as it was written first; spaces tell none apart.

    >>> once("a\n\nc\n\n a")
    'c\n\na'
    """
    paragraphs = {" ".join(each.split()): each for each in reversed(re.split(r"\n\s*\n", text)) if each.strip()}
    return "\n\n".join(reversed(paragraphs.values()))


def parted(text: str, share: float) -> Text:
    """The front of a text, and behind it its last share."""
    whole = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    cut = len(whole) - round(share * len(whole))
    return Text(whole[:cut].clone(), whole[cut:].clone())


def drawn(text: Text, count: int, length: int, *, generator: torch.Generator) -> Tensor:
    """Pieces of the learned bytes, from places drawn evenly. Shapes: -> (count, length) long.

    Raises:
        ValueError: count is below 1, or length is below 2 or more than there is.

    >>> drawn(topics(), 3, 8, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 8])
    """
    bounded("count", count, "Draw at least one piece.")
    starts = torch.randint(0, places(text.learned, length), (count, 1), generator=generator)
    return text.learned[starts + torch.arange(length)].long()


def pieces(text: Text, length: int) -> Tensor:
    """The held-out bytes in pieces side by side, what is left over not. Shapes: -> (many, length) long.

    Raises:
        ValueError: length is below 2 or more than there is.
    """
    places(text.held_out, length)
    many = len(text.held_out) // length
    return text.held_out[: many * length].view(many, length).long()


def places(part: Tensor, length: int) -> int:
    """How many places a piece may begin at."""
    bounded("length", length, "The first byte predicts the second.", least=2)
    if length > len(part):
        raise ValueError(
            f"length must be at most the {len(part)} bytes of the text, got {length}. Take shorter pieces."
        )
    return len(part) - length + 1
