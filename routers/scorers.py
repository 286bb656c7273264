"""What steps can be judged by without any training: the target's own likelihood, and its own grade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from routers.base import DraftedStep, Need, Reward, TargetView, needs_of

_GRADE_QUESTION = (
    "Judge the last step of the reasoning above, only for whether it is logically valid and factually correct. "
    "Give a score from 0 (wrong) to 9 (perfect)."
)
_GRADE_OPENING = "I think the quality score is: "


class Shortfall:
    """A reward as a score: 1 - reward, the need for a better step."""

    def __init__(self, reward: Reward):
        self.reward = reward
        self.needs = needs_of(reward)

    def score(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        return [1 - float(reward) for reward in self.reward.rewards(steps, target)]


class TargetLikelihood:
    """A reward: the geometric mean of the target's probabilities of the step's tokens, 0 to 1."""

    needs: frozenset[Need] = frozenset({"log_probs"})

    def rewards(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        return [float(np.exp(log_probs.mean())) for log_probs in target.log_probs(steps)]


class TargetRegret:
    """A reward: what the step costs the target in likelihood against its own choice at every token, in nats, negative.

    It is an advantage by itself: the target's own greedy step costs nothing, however unsure the target is of it. The
    likelihood alone is low for hard steps, be they right or wrong.
    """

    needs: frozenset[Need] = frozenset({"log_probs"})

    margin: ClassVar[float] = 3.0
    """Nats above which a step is taken for a worse one, rather than for another wording."""

    def rewards(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        return [-float(regrets.sum()) for regrets in target.regrets(steps)]


class TargetGrade:
    """A reward: the target's grade of the step over 9, read off the next-token probabilities of the ten digits.

    SpecReason (Pan et al. 2025, section 4.1) asks so, in one forward that generates nothing.

    Args:
        question: asked after the step, in a turn of the user if the tokenizer has a chat template.
        opening: of the target's answer, up to the digit.
        mean: take the mean of the digits under their probabilities; otherwise the likeliest digit.
    """

    needs: frozenset[Need] = frozenset({"answers"})

    def __init__(self, question: str = _GRADE_QUESTION, opening: str = _GRADE_OPENING, *, mean: bool = True):
        self.question, self.opening, self.mean = question, opening, mean

    def rewards(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        digits = np.arange(10)
        probs = target.answers(steps, self.question, self.opening, [str(digit) for digit in digits])
        return [float((p @ digits if self.mean else p.argmax()) / 9) for p in probs]
