"""Seeing what loops do: recordings of their trajectories, their cost from shapes, their stability, and reports."""

from loopaware.observe.cost import Cost, Energy, cost
from loopaware.observe.memory import Peak, peak
from loopaware.observe.record import Tape, Trajectory, record
from loopaware.observe.report import Report
from loopaware.observe.stability import Health, contraction, gradients, spectral_radius

__all__ = [
    "Cost",
    "Energy",
    "Health",
    "Peak",
    "Report",
    "Tape",
    "Trajectory",
    "contraction",
    "cost",
    "gradients",
    "peak",
    "record",
    "spectral_radius",
]
