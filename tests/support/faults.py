"""What breaks a run off when it is told to, and what notices whether a session was closed."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafters import Drafter, DraftSession, Outcome, Run
from trees import Draft


class Bomb:
    """Goes off when it is touched for the n-th time."""

    def __init__(self, error: BaseException, fuse: int):
        self.error = error
        self.fuse = fuse

    def touch(self) -> None:
        self.fuse -= 1
        if self.fuse == 0:
            raise self.error


class Watched(Drafter):
    """Another drafter, of which we know how many sessions were opened and closed; calls may be bombed."""

    def __init__(self, drafter: Drafter, bombs: dict[str, Bomb] | None = None):
        self.drafter = drafter
        self.bombs = bombs or {}
        self.num_opened = self.num_closed = 0
        self.supports_rollback, self.needs_exits = drafter.supports_rollback, drafter.needs_exits

    def start(self, run: Run) -> DraftSession:
        self.touch("start")
        self.num_opened += 1
        return _WatchedSession(self, self.drafter.start(run))

    def touch(self, call: str) -> None:
        if call in self.bombs:
            self.bombs[call].touch()


class _WatchedSession(DraftSession):
    def __init__(self, drafter: Watched, session: DraftSession):
        self.drafter = drafter
        self.session = session

    def rollback(self) -> None:
        self.session.rollback()

    def propose(self, max_depths: Sequence[int]) -> Draft:
        self.drafter.touch("propose")
        return self.session.propose(max_depths)

    def observe(self, outcome: Outcome) -> None:
        self.drafter.touch("observe")
        self.session.observe(outcome)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.session.select_rows(rows)

    def close(self) -> None:
        self.drafter.num_closed += 1
        self.session.close()
