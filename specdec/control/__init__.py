"""What a round does, decided from what rounds have shown and what they cost. Knows no model."""

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

__all__ = [
    "PLAIN",
    "ExitChoice",
    "ExitControl",
    "ExitCosts",
    "ExitObjective",
    "ExitStatistics",
    "TokensPerLayer",
    "TokensPerSecond",
]
