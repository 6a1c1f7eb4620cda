"""Whole models, one file each, the paper cited on top.

In: states or tokens, as each file says. Out: the same. Deliberately elsewhere: building blocks (`loopaware.nn`), tasks
and training.
"""

from loopaware.models.albert import Albert
from loopaware.models.deq import EquilibriumTransformer
from loopaware.models.hrm import HRM
from loopaware.models.pondernet import PonderNet
from loopaware.models.transformer import Transformer
from loopaware.models.trm import TRM
from loopaware.models.universal import UniversalDecoder, UniversalEncoder, UniversalTransformer

__all__ = [
    "HRM",
    "TRM",
    "Albert",
    "EquilibriumTransformer",
    "PonderNet",
    "Transformer",
    "UniversalDecoder",
    "UniversalEncoder",
    "UniversalTransformer",
]
