"""Routers that need no training and ask nobody: the draft's own probabilities say where it is unsure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from routers.base import Decision, DraftedStep, Need, Router, TargetView
from routers.budget import Gate
from routers.policies import ScoringRouter
from routers.steps import Steps

_STEPS = Steps()


class OwnDoubt:
    """A score: 1 less the probability of the step's least likely token, by the draft that wrote it; 0 to 1.

    It never falls while the step grows, so that a step can be given up as soon as it is above the threshold.
    """

    needs: frozenset[Need] = frozenset({"signals"})

    def score(self, steps: Sequence[DraftedStep], target: TargetView) -> list[float]:
        return [self.of(step) for step in steps]

    @staticmethod
    def of(step: DraftedStep) -> float:
        """Of a step that may still be growing; NaN where the draft tells nothing."""
        log_probs = step.signals.log_probs
        return 1 - math.exp(float(log_probs.min())) if len(log_probs) else math.nan


class SelfConfidence(ScoringRouter):
    """The draft judges its own step, and hands over where it is unsure of a token (after ConfSpec, Liu and He 2026).

    ConfSpec puts the question to the draft in words; here the draft's probabilities answer it, which costs no forward
    and is known at every token: the step is looked at while it is written, and what has become unsure is not written to
    its end. With a threshold that changes no decision.

    Args:
        threshold: of the doubt, 0 to 1: escalate where a token was less likely than 1 - threshold.
        escalation_rate: share of steps to escalate; instead of a threshold.
        look_every: tokens between two looks at a step that is being written; None judges finished steps only.
        options: `guard` and `steps`, as of `ScoringRouter`.

    Raises:
        ValueError: not exactly one of threshold and rate, or `look_every` is not positive.
    """

    def __init__(
        self,
        *,
        threshold: float | None = None,
        escalation_rate: float | None = None,
        look_every: int | None = 8,
        **options: Any,
    ):
        if look_every is not None and (not isinstance(look_every, int) or look_every < 1):
            raise ValueError(f"SelfConfidence(look_every={look_every!r}): it is a positive integer, or None")
        super().__init__(OwnDoubt(), threshold=threshold, escalation_rate=escalation_rate, **options)
        if self.early is not None:
            raise ValueError("SelfConfidence looks at every token by itself: leave early= out")
        self.peek = self.peek_every = look_every

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        return [self.gate.decide_early(OwnDoubt.of(step)) for step in steps]


class FirstTokenEntropy(Router):
    """Decides by the entropy of a step's first token, before the step is written (GlimpRouter, 2026, arXiv 2601.05110).

    Args:
        threshold: nats; escalate above it.
        escalation_rate: share of steps to escalate; instead of a threshold.

    Raises:
        ValueError: not exactly one of threshold and rate.
    """

    peek = 1
    needs = frozenset({"signals"})

    def __init__(self, *, threshold: float | None = None, escalation_rate: float | None = None, steps: Steps = _STEPS):
        self.gate = Gate(self, threshold, escalation_rate)
        self.steps = steps

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        return [self.gate.decide(self.entropy(step)) for step in steps]

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        return [Decision(escalate=False)] * len(steps)

    @staticmethod
    def entropy(step: DraftedStep) -> float:
        """Of the draft's first token, in nats; NaN where the draft tells nothing."""
        entropies = step.signals.entropies
        return float(entropies[0]) if len(entropies) else math.nan
