"""What a round does, decided from what rounds have shown and what they cost."""

from specdec.control.acceptance import LEAF_EDGES, AcceptanceMemory, AcceptanceModel, monotone
from specdec.control.costs import ForwardCosts, costs_of
from specdec.control.exits import (
    PLAIN,
    ExitChoice,
    ExitControl,
    ExitCosts,
    ExitObjective,
    ExitStatistics,
    TokensPerLayer,
    TokensPerSecond,
)
from specdec.control.rounds import Plan, RoundControl, Yield, YieldAverage, YieldMemory, affordable, first_beliefs

__all__ = [
    "LEAF_EDGES",
    "PLAIN",
    "AcceptanceMemory",
    "AcceptanceModel",
    "ExitChoice",
    "ExitControl",
    "ExitCosts",
    "ExitObjective",
    "ExitStatistics",
    "ForwardCosts",
    "Plan",
    "RoundControl",
    "TokensPerLayer",
    "TokensPerSecond",
    "Yield",
    "YieldAverage",
    "YieldMemory",
    "affordable",
    "costs_of",
    "first_beliefs",
    "monotone",
]
