"""Dense models become looped ones: converted, their layers chosen or tied, healed, written.

In: a model of transformers, or a folder with one. Out: one with a loop, which at one step is the same. Needs the extra
`lm`, and `train` to heal. Deliberately elsewhere: the models (`loopaware.models.looped_lm` and its siblings).
"""

from loopaware.convert.choose import Group, groups, least
from loopaware.convert.dense import Split, apart, looped, tied
from loopaware.convert.folder import free, read, tokenizer, write
from loopaware.convert.heal import Curriculum, content, heal, held_out, tokenized

__all__ = [
    "Curriculum",
    "Group",
    "Split",
    "apart",
    "content",
    "free",
    "groups",
    "heal",
    "held_out",
    "least",
    "looped",
    "read",
    "tied",
    "tokenized",
    "tokenizer",
    "write",
]
