"""Several drafters, of which the first one that has something to propose drafts the round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specdec.drafters.base import Drafter, DraftSession, Outcome, Run
from trees import Draft, TreeBatch


class FirstOf(Drafter):
    """Asks drafters in turn, and takes the first draft that is not empty.

    A round has the draft of one of them, so it is as exact as they are.

    Args:
        drafters: in the order in which they are asked, the cheapest first: a `PromptLookup` that insists on a long
            match before an `EarlyExit`, for instance.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, *drafters: Drafter):
        if not drafters:
            raise ValueError("FirstOf(): name at least one drafter")
        self.drafters = drafters

    def start(self, run: Run) -> DraftSession:
        return _FirstOfSession(run, [drafter.start(run) for drafter in self.drafters])


class _FirstOfSession(DraftSession):
    def __init__(self, run: Run, sessions: Sequence[DraftSession]):
        self._run = run
        self._sessions = sessions
        self._drafting: int | None = None

    @property
    def num_forwards(self) -> int:
        return sum(session.num_forwards for session in self._sessions)

    @property
    def control_seconds(self) -> float:
        return sum(session.control_seconds for session in self._sessions)

    def explain(self) -> dict[str, Any]:
        reasons = {} if self._drafting is None else self._sessions[self._drafting].explain()
        return {"drafter": self._drafting, **reasons}

    def propose(self, max_depths: Sequence[int]) -> Draft:
        for index, session in enumerate(self._sessions):
            draft = session.propose(max_depths)
            if any(draft.trees.sizes):
                self._drafting = index
                return draft
        self._drafting = None
        return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))

    def observe(self, outcome: Outcome) -> None:
        for index, session in enumerate(self._sessions):
            # a proposal without nodes is part of any tree
            is_own = self._drafting is None or index == self._drafting
            session.observe(outcome if is_own else replace(outcome, is_own=False))

    def select_rows(self, rows: Sequence[int]) -> None:
        for session in self._sessions:
            session.select_rows(rows)

    def close(self) -> None:
        for session in self._sessions:
            session.close()
