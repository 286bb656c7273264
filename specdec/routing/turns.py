"""Where the rows of a routed run stand in their steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain
from time import perf_counter
from typing import NamedTuple

from routers import Decision, DraftedStep


class Phase(Enum):
    """Where a row's step stands."""

    NEW = auto()
    """Nothing has been written."""
    PEEK = auto()
    """The draft writes the first tokens, at which the router looks."""
    DRAFT = auto()
    """The draft writes."""
    TARGET = auto()
    """The target writes."""


class Judged(NamedTuple):
    """A drafted step, and its verdict once that has fallen."""

    step: DraftedStep
    decision: Decision | None = None


@dataclass(kw_only=True)
class Turn:
    """A row's step in the making.

    Args:
        decision: once it has fallen; the draft may still have to write what is kept.
        drafted: what the draft wrote, once it is the target's turn; `beyond` what it had written after that.
        ahead: finished steps before it that are still to be judged.
    """

    phase: Phase = Phase.NEW
    started: float = field(default_factory=perf_counter)
    decision: Decision | None = None
    drafted: Sequence[int] = ()
    beyond: Sequence[int] = ()
    ahead: list[Judged] = field(default_factory=list)


@dataclass(kw_only=True)
class Chain:
    """Steps of a row that are judged one after the other; the first one that is escalated cuts the rest.

    Args:
        steps: in order, at least one.
        kept: how many of them are.
    """

    steps: list[Judged]
    kept: int = 0

    @property
    def next(self) -> Judged | None:
        """The step that is to be judged; None once the chain is kept to its end, or cut."""
        return None if self.kept == len(self.steps) or self.is_cut else self.steps[self.kept]

    @property
    def is_cut(self) -> bool:
        return self.kept < len(self.steps) and _escalates(self.steps[self.kept].decision)

    def judge(self, decision: Decision) -> None:
        """The verdict on `next`."""
        self.steps[self.kept] = self.steps[self.kept]._replace(decision=decision)
        self.kept += not decision.escalate

    @property
    def tokens(self) -> list[int]:
        return flat(one.step.tokens for one in self.steps)

    @property
    def beyond(self) -> list[int]:
        """Tokens after the step that is escalated."""
        return flat(one.step.tokens for one in self.steps[self.kept + 1 :])


def flat(steps: Iterable[Sequence[int]]) -> list[int]:
    """The tokens of some steps."""
    return list(chain.from_iterable(steps))


def _escalates(decision: Decision | None) -> bool:
    return decision is not None and decision.escalate


class Finished(NamedTuple):
    """A step that is to be committed.

    Args:
        drafted: what the draft wrote in its place.
        in_vain: what was written besides, perhaps the beginning of the step itself.
    """

    decision: Decision
    tokens: Sequence[int]
    drafted: Sequence[int]
    in_vain: Sequence[int]
    is_last: bool
