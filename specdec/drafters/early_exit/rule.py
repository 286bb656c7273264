"""The contract of what chooses an exit: `TokensPerSecond` (`exit_choice.py`) and DEL's own rule (`del_rule.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from specdec.decoding.drafter import Outcome
from trees import Draft, GrowthPolicy, TreeBatch

_UNSURE = 0.5
"""Confidence of tokens whose tree does not tell it."""


class ExitChoice(NamedTuple):
    """Which exit drafts the next round, and in which shape."""

    exit_layer: int
    policy: GrowthPolicy


class ExitRule(ABC):
    """Chooses the exit of every round of a run, and learns from what becomes of it.

    Each round that is the run's own: `choose`, `drafted`, `learn`.
    """

    @property
    @abstractmethod
    def control_seconds(self) -> float:
        """Spent on exits that did not draft."""

    @abstractmethod
    def begin(self) -> None:
        """The target has read the prompt."""

    @abstractmethod
    def choose(self, max_depths: Sequence[int]) -> ExitChoice | None:
        """What the next round drafts (see `DraftSession.propose`); None: nothing."""

    def drafted(self, num_steps: int) -> None:
        """The draft has been made, in so many forwards."""

    @abstractmethod
    def learn(self, draft: Draft, outcome: Outcome, slots: Sequence[Sequence[int]]) -> None:
        """Learn from the round that was chosen last.

        Args:
            slots: of every row those that were committed.
        """

    @abstractmethod
    def explain(self) -> dict[str, Any]:
        """See `DraftSession.explain`."""


class ReachedSlot(NamedTuple):
    """A slot of a draft that the target came to: the probabilities of its children, and which was accepted, if any."""

    probs: Sequence[float]
    accepted: int | None


def reached_slots(trees: TreeBatch, paths: Sequence[Sequence[int]]) -> Iterator[ReachedSlot]:
    """The slots along the accepted paths."""
    for row, path in enumerate(paths if trees.width else ()):
        tree = trees.row(row)
        probs = tree.probs or [_UNSURE] * len(tree)
        for slot, after in zip([0, *(node + 1 for node in path)], [*path, None], strict=True):
            children = tree.children[slot]
            if children:
                accepted = None if after is None else children.index(after)
                yield ReachedSlot([probs[child] for child in children], accepted)
