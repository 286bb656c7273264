"""Who writes the next reasoning step. Knows tokens, texts and scores; knows no KV cache.

Step-level routing is lossy by design and lives beside token-level speculation, which is not.
"""

from typing import TYPE_CHECKING, Any

from routers.base import Decision, DraftedStep, Reward, Router, Scorer, Signals, TargetView
from routers.budget import EscalationBudget
from routers.light import LightRouter
from routers.policies import (
    AbstainBand,
    AlwaysDraft,
    AlwaysTarget,
    Arbitrage,
    EarlyEscalation,
    Oracle,
    RandomRouter,
    RewardThreshold,
    ScoringRouter,
    SelfScore,
)
from routers.scorers import Shortfall, TargetGrade, TargetLikelihood
from routers.steps import Segmenter, Steps

if TYPE_CHECKING:
    from routers.reward_model import RewardModel

__all__ = [
    "AbstainBand",
    "AlwaysDraft",
    "AlwaysTarget",
    "Arbitrage",
    "Decision",
    "DraftedStep",
    "EarlyEscalation",
    "EscalationBudget",
    "LightRouter",
    "Oracle",
    "RandomRouter",
    "Reward",
    "RewardModel",
    "RewardThreshold",
    "Router",
    "Scorer",
    "ScoringRouter",
    "Segmenter",
    "SelfScore",
    "Shortfall",
    "Signals",
    "Steps",
    "TargetGrade",
    "TargetLikelihood",
    "TargetView",
]


def __getattr__(name: str) -> Any:
    """Load torch and transformers only for who needs a reward model."""
    if name == "RewardModel":
        from routers.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module 'routers' has no attribute {name!r}")
