"""What a round does, decided from what rounds have shown and what they cost."""

from specdec.control.costs import ForwardCosts, StepSeconds, costs_of
from specdec.control.estimates import LEAF_EDGES, AcceptanceMemory, AcceptanceModel, monotone
from specdec.control.rounds import (
    Plan,
    RoundAverages,
    RoundControl,
    RunAverages,
    RunHistory,
    capped_throughput,
    prior_averages,
)

__all__ = [
    "LEAF_EDGES",
    "AcceptanceMemory",
    "AcceptanceModel",
    "ForwardCosts",
    "Plan",
    "RoundAverages",
    "RoundControl",
    "RunAverages",
    "RunHistory",
    "StepSeconds",
    "capped_throughput",
    "costs_of",
    "monotone",
    "prior_averages",
]
