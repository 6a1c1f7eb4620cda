"""Answering many requests with a loop: padding, batches of requests that belong together, and answers in order.

In: requests of unequal length and a model around a loop. Out: an answer for each request, as if it had been asked
alone. Deliberately elsewhere: leaving out rows of a batch that have stopped (`loopaware.execute`), training
(`loopaware.train`).
"""

from loopaware.serve.batching import ByDepth, ByLength, InOrder, Policy
from loopaware.serve.continuous import Continuous
from loopaware.serve.depth import DepthPredictor, Quality, pooled
from loopaware.serve.encode import Encoded, encode
from loopaware.serve.padding import Request, padded, unpadded

__all__ = [
    "ByDepth",
    "ByLength",
    "Continuous",
    "DepthPredictor",
    "Encoded",
    "InOrder",
    "Policy",
    "Quality",
    "Request",
    "encode",
    "padded",
    "pooled",
    "unpadded",
]
