"""The routers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routers.base import Decision, DraftedStep, Reward, Router, Scorer, TargetView, needs_of
from routers.budget import EscalationBudget, Gate
from routers.scorers import Shortfall, TargetGrade
from routers.steps import Steps

_STEPS = Steps()


class AlwaysDraft(Router):
    """Keeps every drafted step: the draft alone."""

    def __init__(self, *, steps: Steps = _STEPS):
        self.steps = steps

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        return [Decision(escalate=False)] * len(steps)


class AlwaysTarget(Router):
    """Lets the target write every step: token-level speculative decoding, and lossless."""

    peek = 0

    def __init__(self, *, steps: Steps = _STEPS):
        self.steps = steps

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        return [Decision(escalate=True)] * len(steps)

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        return [Decision(escalate=True)] * len(steps)


class RandomRouter(Router):
    """Escalates at random: the control that every router has to beat at equal rate.

    Args:
        escalation_rate: chance of each step.
        seed: of the coins.

    Raises:
        ValueError: the rate is no share.
    """

    peek = 0

    def __init__(self, escalation_rate: float, *, seed: int = 0, steps: Steps = _STEPS):
        self.rate = EscalationBudget(escalation_rate).rate
        self.steps = steps
        self._random = random.Random(seed)

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        escalated = [self._random.random() < self.rate for _ in steps]
        return [Decision(escalate=True) if wanted else None for wanted in escalated]

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        return [Decision(escalate=False)] * len(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyEscalation:
    """Gives a step to the target after its first tokens, if the draft was unsure of one (GlimpRouter, 2026).

    Args:
        entropy: nats; above it the draft is unsure.
        tokens: how many are looked at.
    """

    entropy: float
    tokens: int = 1

    def __post_init__(self) -> None:
        if not self.entropy > 0 or not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"{self}: entropy and tokens are positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstainBand:
    """Scores between `low` and `high` are not trusted: there another scorer decides.

    Args:
        judge: asked about the steps in the band.
        threshold: they are escalated where the judge's score is above it.
    """

    low: float
    high: float
    judge: Scorer
    threshold: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"AbstainBand(low={self.low!r}, high={self.high!r}): low is below high")


class ScoringRouter(Router):
    """Escalates steps whose score is above a threshold, or the highest scores at a rate.

    A step whose score is NaN is escalated: the target is the safe choice.

    Args:
        scorer: the higher, the more the step needs the target.
        threshold: escalate above it.
        escalation_rate: share of steps to escalate, held over all calls; instead of a threshold.
        early: looks at the first tokens of a step; None leaves that out.
        band: where another scorer decides; only with a threshold. None leaves that out.
        guard: texts that mark a final answer: a step that contains one is the target's. Empty leaves that out.

    Raises:
        ValueError: not exactly one of threshold and rate, or a band with a rate.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        threshold: float | None = None,
        escalation_rate: float | None = None,
        early: EarlyEscalation | None = None,
        band: AbstainBand | None = None,
        guard: Sequence[str] = (),
        steps: Steps = _STEPS,
    ):
        name = type(self).__name__
        self.gate = Gate(self, threshold, escalation_rate)
        if band is not None and threshold is None:
            raise ValueError(f"{name}: a band lies around a threshold; with an escalation_rate there is none")
        if isinstance(guard, str):
            raise ValueError(f"{name}(guard={guard!r}): pass a sequence of texts, such as ('####', r'\\boxed')")
        self.scorer, self.early, self.band = scorer, early, band
        self.guard, self.steps = tuple(guard), steps
        self.peek = None if early is None else early.tokens
        self.needs = needs_of(scorer)
        if early is not None:
            self.needs |= {"signals"}
        if band is not None:
            self.needs |= needs_of(band.judge)

    def decide_early(self, steps: Sequence[DraftedStep]) -> list[Decision | None]:
        if self.early is None:
            return [None] * len(steps)
        return [self._glimpse(step, self.early) for step in steps]

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        decisions = {
            index: self.gate.force("guard")
            for index, step in enumerate(steps)
            if any(mark in step.text for mark in self.guard)
        }
        rest = [index for index in range(len(steps)) if index not in decisions]
        scored = self.scorer.score([steps[index] for index in rest], target) if rest else []
        scores = dict(zip(rest, scored, strict=True))
        decisions.update(self._judged(steps, scores, target))
        for index in rest:
            if index not in decisions:
                decisions[index] = self.gate.decide(float(scores[index]))
        return [decisions[index] for index in range(len(steps))]

    def _glimpse(self, step: DraftedStep, early: EarlyEscalation) -> Decision | None:
        entropy = float(step.signals.entropies[: early.tokens].max(initial=0.0))
        return self.gate.force("early", entropy) if entropy > early.entropy else None

    def _judged(
        self, steps: Sequence[DraftedStep], scores: dict[int, float], target: TargetView
    ) -> dict[int, Decision]:
        band = self.band
        if band is None:
            return {}
        unsure = [index for index, score in scores.items() if band.low < score < band.high]
        if not unsure:
            return {}
        verdicts = band.judge.score([steps[index] for index in unsure], target)
        return {
            index: Decision(escalate=not verdict <= band.threshold, score=float(scores[index]), reason="band")
            for index, verdict in zip(unsure, verdicts, strict=True)
        }


class Arbitrage(ScoringRouter):
    """Escalates steps on which the target is expected to do *better*, not those that are merely bad.

    Maheswaran et al. 2025, section 4: the score estimates Pr(advantage > 0), the advantage being the reward of the
    target's step less that of the draft's. Here the target's step is drawn only where it is wanted.

    Args:
        scorer: predicts the advantage, such as `routers.load(folder)` of what `specdec train-router` has written.
        options: as of `ScoringRouter`.
    """

    def __init__(self, scorer: Scorer, **options: Any):
        super().__init__(scorer, **options)


class RewardThreshold(ScoringRouter):
    """Escalates steps whose reward is too low (RSD, Liao et al. 2025): the score is 1 - reward.

    Args:
        reward: such as a `routers.RewardModel`.
        threshold: a reward, 0 to 1; steps below it are escalated. None with an `escalation_rate`.
        options: as of `ScoringRouter`.
    """

    def __init__(self, reward: Reward, *, threshold: float | None = None, **options: Any):
        super().__init__(Shortfall(reward), threshold=None if threshold is None else 1 - threshold, **options)


class SelfScore(ScoringRouter):
    """The target grades the drafted step in one forward (SpecReason, Pan et al. 2025): the score is 1 - grade / 9.

    Args:
        threshold: a grade, 0 to 9; steps below it are escalated. None with an `escalation_rate`.
        grade: how the target is asked.
        options: as of `ScoringRouter`.
    """

    def __init__(self, *, threshold: float | None = None, grade: TargetGrade | None = None, **options: Any):
        super().__init__(
            Shortfall(grade or TargetGrade()), threshold=None if threshold is None else 1 - threshold / 9, **options
        )


class Oracle(Router):
    """Lets both write every step and keeps the better one: for analysis, and slower than the target alone.

    Args:
        reward: judges both steps.
        threshold: advantage above which the target's step is kept (Maheswaran et al. 2025, theorem B.1).
    """

    judges_together = True

    def __init__(self, reward: Reward, *, threshold: float = 0.0, steps: Steps = _STEPS):
        self.reward, self.threshold, self.steps = reward, threshold, steps
        self.needs = needs_of(reward)

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        drafted = self.reward.rewards(steps, target)
        written = self.reward.rewards(target.write(steps), target)
        advantages = [float(theirs - ours) for theirs, ours in zip(written, drafted, strict=True)]
        return [Decision(escalate=not gain <= self.threshold, score=gain) for gain in advantages]
