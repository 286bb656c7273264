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
    "RoundAverages",
    "RoundControl",
    "RunAverages",
    "RunHistory",
    "TokensPerLayer",
    "TokensPerSecond",
    "capped_throughput",
    "costs_of",
    "monotone",
    "prior_averages",
]
