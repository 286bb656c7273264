"""From a score to a verdict: by a threshold, or by the share of steps that the target is to write."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque

from routers.base import Decision


class EscalationBudget:
    """Escalates the steps of the highest scores, as many as the rate allows.

    The threshold is a quantile of recent scores. The quantile asked for is the rate, corrected by what has been
    escalated too much or too little so far, so that the realised share follows the rate even where scores drift; among
    equal scores the account alone decides.

    Args:
        rate: share of steps to escalate, 0 to 1.
        window: number of recent scores.
        horizon: number of steps over which a deficit is made up for.

    Raises:
        ValueError: the rate is no share.
    """

    def __init__(self, rate: float, *, window: int = 512, horizon: int = 10):
        if not 0 <= rate <= 1:
            raise ValueError(f"escalation_rate={rate!r}: it is a share of steps, from 0 to 1")
        self.rate = rate
        self.num_steps = 0
        self.num_escalated = 0
        self._window, self._horizon = window, horizon
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def decide(self, score: float) -> bool:
        """Whether a step of this score is escalated; counts it."""
        above, _ = self._rank(score)
        # with few scores a rank says little: then, too, the account decides
        is_level = above < self._wanted * (len(self._sorted) + 1)
        escalate = self.is_high(score) or (is_level and self._due >= 0.5)
        self.observe(score, escalate)
        return escalate

    def observe(self, score: float, escalated: bool) -> None:
        """Count a step of an earlier run, as if it had been decided here."""
        self._remember(score)
        self.count(escalated)

    def is_high(self, score: float) -> bool:
        """Whether a step of this score, or of any higher one, would be escalated now; counts nothing."""
        above, equal = self._rank(score)
        return above + equal <= self._wanted * (len(self._sorted) + 1)

    @property
    def _due(self) -> float:
        return self.rate * (self.num_steps + 1) - self.num_escalated

    @property
    def _wanted(self) -> float:
        return min(1.0, max(0.0, self.rate + self._due / self._horizon))

    def _rank(self, score: float) -> tuple[int, int]:
        """How many recent scores are above this one, and how many equal it, itself included."""
        above = len(self._sorted) - bisect_right(self._sorted, score)
        return above, len(self._sorted) - above - bisect_left(self._sorted, score) + 1

    def count(self, escalated: bool) -> None:
        """Count a step that was decided otherwise."""
        self.num_steps += 1
        self.num_escalated += escalated

    def _remember(self, score: float) -> None:
        insort(self._sorted, score)
        self._recent.append(score)
        if len(self._recent) > self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]


class Gate:
    """Escalates above a threshold, or at a rate; one of the two is given.

    A score that is NaN escalates: the target is the safe choice.

    Args:
        owner: whose it is, for messages.
        threshold: escalate above it.
        escalation_rate: share of steps to escalate, held over all calls.

    Raises:
        ValueError: not exactly one of threshold and rate, or the rate is no share.
    """

    def __init__(self, owner: object, threshold: float | None, escalation_rate: float | None):
        if (threshold is None) == (escalation_rate is None):
            raise ValueError(f"{type(owner).__name__}: give either a threshold or an escalation_rate")
        self.threshold = threshold
        self.budget = None if escalation_rate is None else EscalationBudget(escalation_rate)

    def decide(self, score: float) -> Decision:
        """Of a finished step, or of one that will not be looked at again."""
        if math.isnan(score):
            return self.force("no score", score)
        if self.budget is not None:
            return Decision(escalate=self.budget.decide(score), score=score)
        assert self.threshold is not None
        return Decision(escalate=score > self.threshold, score=score)

    def decide_early(self, score: float) -> Decision | None:
        """Of a step whose score can only rise: escalates as soon as that is certain; otherwise None."""
        if math.isnan(score):
            return self.force("no score", score)
        if self.budget is None:
            assert self.threshold is not None
            return Decision(escalate=True, score=score, reason="early") if score > self.threshold else None
        if not self.budget.is_high(score):
            return None
        self.budget.decide(score)
        return Decision(escalate=True, score=score, reason="early")

    def force(self, reason: str, score: float | None = None) -> Decision:
        """Escalate whatever the score."""
        if self.budget is not None:
            self.budget.count(True)
        return Decision(escalate=True, score=score, reason=reason)
