"""What a router is trained on: of each step the draft's version and the target's, and their rewards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routers.base import Decision, DraftedStep, Reward, Router, TargetView, needs_of
from routers.features import NAMES, features
from routers.steps import Steps

MIN_TEXTS = 8
"""Fewer texts are not split into those to learn from and those to test on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTuple:
    """One step of one text, written by both.

    Args:
        problem: index of the text; steps of one text are never split between training and test.
        index: of the step.
        prompt, previous, drafted, written: texts: before all steps, of the steps before, and of this one twice.
        writers: of the steps before.
        features: of the drafted step, see `routers.features`.
        hidden: of the drafted step, see `Signals.hidden`; empty if it was not kept.
        draft_reward, target_reward: the better the higher.
    """

    problem: int
    index: int
    prompt: str
    previous: list[str]
    writers: list[str]
    drafted: str
    written: str
    features: list[float]
    hidden: list[float]
    draft_reward: float
    target_reward: float

    @property
    def advantage(self) -> float:
        """Of the target's step over the draft's."""
        return self.target_reward - self.draft_reward


class Collector(Router):
    """Has both write every step, keeps a record, and goes on with either at random.

    The texts then come from a mixture of both, whatever router is made of them; the paper's go on with the better step,
    which no router at work can.

    Args:
        reward: of steps.
        problems: index of the text in each row of the call.
        target_share: chance of going on with the target's step.
        seed: of that choice.
        keeps_hidden: whether to keep hidden states.
    """

    judges_together = True

    def __init__(
        self,
        reward: Reward,
        problems: Sequence[int],
        *,
        target_share: float = 0.5,
        seed: int = 0,
        keeps_hidden: bool = False,
        steps: Steps | None = None,
    ):
        self.reward, self.problems, self.target_share = reward, problems, target_share
        self.steps = steps or Steps()
        self.needs = needs_of(reward) | {"signals"}
        if keeps_hidden:
            self.needs |= {"hidden"}
        self.tuples: list[StepTuple] = []
        self._random = random.Random(f"{seed} {list(problems)}")

    def decide(self, steps: Sequence[DraftedStep], target: TargetView) -> list[Decision]:
        drafted = self.reward.rewards(steps, target)
        theirs = target.write(steps)
        written = self.reward.rewards(theirs, target)
        for step, other, draft_reward, target_reward in zip(steps, theirs, drafted, written, strict=True):
            hidden = step.signals.hidden if "hidden" in self.needs else None
            self.tuples.append(
                StepTuple(
                    problem=self.problems[step.row],
                    index=step.index,
                    prompt=step.prompt_text,
                    previous=step.previous_texts,
                    writers=list(step.writers),
                    drafted=step.text,
                    written=other.text,
                    features=[round(float(value), 5) for value in features(step)],
                    hidden=[] if hidden is None else [round(float(value), 3) for value in hidden],
                    draft_reward=float(draft_reward),
                    target_reward=float(target_reward),
                )
            )
        return [Decision(escalate=self._random.random() < self.target_share) for _ in steps]


class Collection:
    """A folder of tuples, in parts that appear whole or not at all, so that collecting can be resumed.

    Args:
        folder: made if it is not there.
        plan: everything that the tuples depend on, as json takes it.

    Raises:
        ValueError: the folder holds tuples of another plan.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "plan.json"
        text = json.dumps({**plan, "features": NAMES}, indent=2, sort_keys=True)
        if written.exists() and written.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{folder} holds steps collected with other settings (see plan.json there): repeat the command with "
                "those, or choose another folder"
            )
        written.write_text(text, encoding="utf-8")

    def has(self, part: int) -> bool:
        return self._part(part).exists()

    def write(self, part: int, tuples: Iterable[StepTuple]) -> None:
        unfinished = self.folder / f"{part:05d}.part"
        lines = [json.dumps(asdict(item), ensure_ascii=False) for item in tuples]
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        unfinished.replace(self._part(part))

    def read(self) -> list[StepTuple]:
        """All tuples, in the order of their parts."""
        return [
            StepTuple(**json.loads(line))
            for part in sorted(self.folder.glob("*.jsonl"))
            for line in part.read_text(encoding="utf-8").splitlines()
        ]

    def _part(self, part: int) -> Path:
        return self.folder / f"{part:05d}.jsonl"


def matrix(tuples: Sequence[StepTuple]) -> np.ndarray:
    """float32 [N, F + C]: features, then hidden states."""
    return np.array([[*item.features, *item.hidden] for item in tuples], np.float32)


def is_usable(item: StepTuple) -> bool:
    """Whether both rewards are numbers."""
    return bool(np.isfinite([item.draft_reward, item.target_reward]).all())


def split_texts(tuples: Sequence[StepTuple], share: float, seed: int, *, margin: float) -> np.ndarray:
    """bool [N]: the steps of a share of the texts, chosen at random; the steps of a text stay together.

    Args:
        margin: advantage above which the target does better.

    Raises:
        ValueError: there are too few texts, or a part has steps of one kind only.
    """
    texts = np.array([item.problem for item in tuples])
    names = np.unique(texts)
    if len(names) < MIN_TEXTS:
        raise ValueError(f"{len(names)} texts are too few to train and to test on: collect {MIN_TEXTS} or more")
    chosen = np.isin(texts, np.random.default_rng(seed).permutation(names)[: max(1, round(share * len(names)))])
    labels = np.array([item.advantage > margin for item in tuples])
    for part in (labels[~chosen], labels[chosen]):
        if part.all() or not part.any():
            raise ValueError("the target does better on all of the steps, or on none: there is nothing to learn")
    return chosen
