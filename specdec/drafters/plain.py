"""No speculation: the base line, through the same loop."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.decoding.drafter import Drafter, DraftSession, Run
from trees import Draft, TreeBatch


class Plain(Drafter):
    """Drafts nothing; every round commits the target's next token."""

    supports_rollback = True

    def start(self, run: Run) -> DraftSession:
        return _PlainSession(run)


class _PlainSession(DraftSession):
    takes_rows = True

    def __init__(self, run: Run):
        self._run = run

    def join(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def propose(self, max_depths: Sequence[int]) -> Draft:
        return Draft(trees=TreeBatch.empty(len(max_depths), self._run.device))
