"""Who writes the next reasoning step. Knows tokens, texts and scores; knows no KV cache.

Step-level routing is lossy by design and lives beside token-level speculation, which is not.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.base import Decision, DraftedStep, Need, Reward, Router, Scorer, Signals, TargetView
from routers.budget import EscalationBudget
from routers.confidence import FirstTokenEntropy, OwnDoubt, SelfConfidence
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
from routers.scorers import Shortfall, TargetGrade, TargetLikelihood, TargetRegret
from routers.steps import Segmenter, Steps

if TYPE_CHECKING:
    from routers.reward_model import RewardModel
    from routers.text_router import TextRouter

__all__ = [
    "AbstainBand",
    "AlwaysDraft",
    "AlwaysTarget",
    "Arbitrage",
    "Decision",
    "DraftedStep",
    "EarlyEscalation",
    "EscalationBudget",
    "FirstTokenEntropy",
    "LightRouter",
    "Need",
    "Oracle",
    "OwnDoubt",
    "RandomRouter",
    "Reward",
    "RewardModel",
    "RewardThreshold",
    "Router",
    "Scorer",
    "ScoringRouter",
    "Segmenter",
    "SelfConfidence",
    "SelfScore",
    "Shortfall",
    "Signals",
    "Steps",
    "TargetGrade",
    "TargetLikelihood",
    "TargetRegret",
    "TargetView",
    "TextRouter",
    "load",
]


def load(folder: str | Path) -> Scorer:
    """The trained router in a folder: a `LightRouter` or a `TextRouter`.

    Raises:
        ValueError: the folder holds neither.
    """
    if (Path(folder) / "text_router.json").exists():
        from routers.text_router import TextRouter

        return TextRouter.load(folder)
    return LightRouter.load(folder)


def __getattr__(name: str) -> Any:
    """Load torch and transformers only for who needs them."""
    if name == "RewardModel":
        from routers.reward_model import RewardModel

        return RewardModel
    if name == "TextRouter":
        from routers.text_router import TextRouter

        return TextRouter
    raise AttributeError(f"module 'routers' has no attribute {name!r}")
