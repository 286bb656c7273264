"""What a router that needs no training scores on real steps, and the threshold that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from routers import Decision, DraftedStep, Router, Steps, TargetRegret, TargetView
from routers.measures import auc, controlled_threshold
from specdec.generation import generate
from specdec.training.routers.collect import INSTRUCTION, Problem, encode_problems


@dataclass(kw_only=True, eq=False)
class Calibrator(Router):
    """Scores every drafted step, and asks the target by how many nats it would have written another.

    The texts go on as those of a good router do: with the target's step where the draft's is the worse one.

    Args:
        score: of a step; the higher, the more it needs the target.
    """

    score: Callable[[DraftedStep], float]
    steps: Steps = field(default_factory=Steps)
    scores: list[float] = field(default_factory=list)
    regrets: list[float] = field(default_factory=list)

    needs = frozenset({"signals", "log_probs"})

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        regrets = [-reward for reward in TargetRegret().rewards(steps, target)]
        self.scores += [self.score(step) for step in steps]
        self.regrets += regrets
        return [Decision(escalate=regret > TargetRegret.margin, score=regret) for regret in regrets]

    @property
    def harms(self) -> np.ndarray:
        """bool [N]: keeping the step would have done harm, as far as the target knows."""
        return np.array(self.regrets) > TargetRegret.margin

    def threshold_at_rate(self, rate: float) -> float:
        """Above which a share `rate` of the steps lies.

        Raises:
            ValueError: no step has been seen.
        """
        return float(np.quantile(self._seen(), 1 - rate))

    def threshold_at_harm(self, level: float) -> float:
        """The highest at which at most a share `level` of all steps is kept and harmful (conformal risk control).

        Raises:
            ValueError: no step has been seen, or none can be kept at that level.
        """
        threshold = controlled_threshold(self._seen(), self.harms, level)
        if threshold == -np.inf:
            raise ValueError(
                f"at a harm level of {level} no step can be kept: allow more, or calibrate on more problems"
            )
        return threshold

    def report(self, threshold: float) -> dict[str, float]:
        """How steps of these scores fare at a threshold."""
        scores = self._seen()
        kept = scores <= threshold
        return {
            "num_steps": len(scores),
            "share_harmful": float(self.harms.mean()),
            "auc": auc(scores, self.harms),
            "threshold": threshold,
            "escalation_rate": float(1 - kept.mean()),
            "share_kept_and_harmful": float((kept & self.harms).mean()),
        }

    def _seen(self) -> np.ndarray:
        if not self.scores:
            raise ValueError("no step was drafted: calibrate on problems that take some")
        return np.nan_to_num(np.array(self.scores), nan=np.inf)


def calibrate(
    target: PreTrainedModel,
    drafter: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    calibrator: Calibrator,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[int]:
    """Fill a calibrator. Yields the number of problems done.

    Args:
        drafter: what writes the steps of the draft, as `specdec.generate` takes it with a router.
    """
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        generate(
            target,
            **encode_problems(tokenizer, batch, INSTRUCTION),
            drafter=drafter,
            router=calibrator,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        yield first + len(batch)
