"""Training: one readable loop, objectives, schedules, averages of weights, and runs that go on after a kill.

In: a model, an objective, batches as a function of the step. Out: a trained model, `metrics.jsonl`, checkpoints.
Deliberately elsewhere: recordings (`loopaware.observe`), which objectives read.
"""

from loopaware.train import objectives, stability
from loopaware.train.average import Average
from loopaware.train.checkpoint import latest, load, load_model, save, save_model
from loopaware.train.fit import fit
from loopaware.train.journal import Journal
from loopaware.train.schedule import Constant, Cosine, Drop, Warmup

__all__ = [
    "Average",
    "Constant",
    "Cosine",
    "Drop",
    "Journal",
    "Warmup",
    "fit",
    "latest",
    "load",
    "load_model",
    "objectives",
    "save",
    "save_model",
    "stability",
]
