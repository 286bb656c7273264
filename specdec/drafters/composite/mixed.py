"""The drafts of several drafters, merged into one tree each round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

from transformers import PreTrainedModel

from specdec.decoding.drafter import Drafter, DraftSession, Outcome, Run
from specdec.errors import DraftError
from trees import Draft, Merged, Merger, TreeBatch


class Mixed(Drafter):
    """Merges what several drafters propose: one verification judges all of it. As exact as they are.

    Shared prefixes are verified once. With sampling each token is tested with the q that its drafter drew it from,
    drafters in the order given but `EarlyExit` last, as it leaves its work in the target's cache
    (`specdec.acceptance.families`). Each drafter's cache follows what was accepted of its own nodes. A `tree` that the
    call names is every drafter's.

    Args:
        drafters: two or more; one `EarlyExit` at most, as a round has one exit.
        budget: most nodes of a row's merged tree; later drafters get what the earlier ones leave. None: no limit.

    Raises:
        ValueError: there are no drafters, or `budget` is not a positive integer.
        DraftError: at the call, if more than one drafter runs layers of the target.
    """

    def __init__(self, drafters: Iterable[Drafter], budget: int | None = None):
        self.drafters = tuple(drafters)
        if not self.drafters:
            raise ValueError("Mixed([]): name at least one drafter")
        for drafter in self.drafters:
            if not isinstance(drafter, Drafter):
                raise ValueError(f"Mixed([...]): {drafter!r} is no drafter; pass specdec.drafters.* instances")
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise ValueError(f"Mixed(budget={budget!r}): budget is a positive integer, or None for no limit")
        self.budget = budget
        self.needs_exits = any(drafter.needs_exits for drafter in self.drafters)

    def models(self) -> Iterator[PreTrainedModel]:
        return chain.from_iterable(drafter.models() for drafter in self.drafters)

    def start(self, run: Run) -> DraftSession:
        with ExitStack() as opened:
            sessions = []
            for drafter in self.drafters:
                sessions.append(drafter.start(run))
                opened.callback(sessions[-1].close)
            if sum(session.runs_target for session in sessions) > 1:
                raise DraftError(
                    "Mixed: more than one of the drafters runs layers of the target ahead (EarlyExit), and a round has "
                    "one exit: mix one of them"
                )
            sessions.sort(key=lambda session: session.runs_target)
            return _MixedSession(run, sessions, self.budget, opened.pop_all())


class _MixedSession(DraftSession):
    def __init__(self, run: Run, sessions: Sequence[DraftSession], budget: int | None, opened: ExitStack):
        self._run = run
        self._sessions = sessions
        self._budget = budget
        self._opened = opened
        self._merged = Merged(draft=Draft(trees=TreeBatch.empty(len(run.sequences), run.device)), nodes=[])
        self.runs_target = any(session.runs_target for session in sessions)

    @property
    def num_forwards(self) -> int:
        return sum(session.num_forwards for session in self._sessions)

    @property
    def control_seconds(self) -> float:
        return sum(session.control_seconds for session in self._sessions)

    def explain(self) -> dict[str, Any]:
        sizes = [[len(row) for row in source] for source in self._merged.nodes]
        return {"proposed": sizes, "sources": [session.explain() for session in self._sessions]}

    def propose(self, max_depths: Sequence[int]) -> Draft:
        merger, on_target = Merger(len(max_depths), self._budget), None
        for index, session in enumerate(self._sessions):
            merger.add(session.propose(merger.within_budget(max_depths)))
            if session.runs_target:
                on_target = index
        self._merged = merger.finish(on_target)
        return self._merged.draft

    def observe(self, outcome: Outcome) -> None:
        if not self._merged.nodes or not (outcome.is_own or outcome.own is not None):
            for session in self._sessions:
                session.observe(outcome)
            return
        verified = self._merged.draft.trees if outcome.verified is None else outcome.verified
        for source, session in enumerate(self._sessions):
            own = self._merged.own_paths(source, outcome.own_paths)
            session.observe(replace(outcome, is_own=False, own=own, verified=verified))

    def select_rows(self, rows: Sequence[int]) -> None:
        for session in self._sessions:
            session.select_rows(rows)

    def close(self) -> None:
        self._opened.close()
