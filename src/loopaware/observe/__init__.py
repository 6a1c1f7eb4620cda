"""Seeing what loops do: recordings of their trajectories, their cost from shapes, and reports with pictures."""

from loopaware.observe.cost import Cost, cost
from loopaware.observe.record import Tape, Trajectory, record
from loopaware.observe.report import Report

__all__ = ["Cost", "Report", "Tape", "Trajectory", "cost", "record"]
