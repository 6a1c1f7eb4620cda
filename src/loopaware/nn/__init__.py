"""Building blocks of bodies: attention, feed-forward, norms, positions, fusions and the transformer block.

In and out: tensors. Nothing here knows of loops; everything works in a plain torch model.
Deliberately elsewhere: the loop and its parts (`loopaware.body` and its siblings), whole models (`loopaware.models`).
"""

from loopaware.nn.attention import Attention, AttentionPositions, Relative, Rotary, adjacency, causal, padding
from loopaware.nn.block import Block
from loopaware.nn.feedforward import FeedForward, SwiGLU
from loopaware.nn.fusion import Add, Concat, CrossAttention, Diagonal, Gated
from loopaware.nn.lowrank import LowRank
from loopaware.nn.norms import LayerNorm, Placement, Post, Pre, Residual, RMSNorm, Sandwich
from loopaware.nn.positions import LearnedPositions, Sinusoidal
from loopaware.nn.spectral import held, spectral_norm

__all__ = [
    "Add",
    "Attention",
    "AttentionPositions",
    "Block",
    "Concat",
    "CrossAttention",
    "Diagonal",
    "FeedForward",
    "Gated",
    "LayerNorm",
    "LearnedPositions",
    "LowRank",
    "Placement",
    "Post",
    "Pre",
    "RMSNorm",
    "Relative",
    "Residual",
    "Rotary",
    "Sandwich",
    "Sinusoidal",
    "SwiGLU",
    "adjacency",
    "causal",
    "held",
    "padding",
    "spectral_norm",
]
