"""Holds the share of steps that the target writes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque


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
        self._remember(score)
        due = self.rate * (self.num_steps + 1) - self.num_escalated
        wanted = min(1.0, max(0.0, self.rate + due / self._horizon))
        num_recent = len(self._sorted)
        above = num_recent - bisect_right(self._sorted, score)
        equal = num_recent - above - bisect_left(self._sorted, score)
        # with few scores a rank says little: then, too, the account decides
        is_high = above + equal <= wanted * num_recent
        is_level = above < wanted * num_recent
        escalate = is_high or (is_level and due >= 0.5)
        self.count(escalate)
        return escalate

    def count(self, escalated: bool) -> None:
        """Count a step that was decided otherwise."""
        self.num_steps += 1
        self.num_escalated += escalated

    def _remember(self, score: float) -> None:
        insort(self._sorted, score)
        self._recent.append(score)
        if len(self._recent) > self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
