"""What a round does, decided from what rounds have shown and what they cost."""

from specdec.control.costs import ForwardCosts, costs_of
from specdec.control.estimates import LEAF_EDGES, AcceptanceMemory, AcceptanceModel, monotone
from specdec.control.rounds import Plan, RoundControl, Yield, YieldAverage, YieldMemory, affordable, first_beliefs

__all__ = [
    "LEAF_EDGES",
    "AcceptanceMemory",
    "AcceptanceModel",
    "ForwardCosts",
    "Plan",
    "RoundControl",
    "Yield",
    "YieldAverage",
    "YieldMemory",
    "affordable",
    "costs_of",
    "first_beliefs",
    "monotone",
]
