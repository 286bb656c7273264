"""The loop of steps: the draft writes one, the router decides, and where it says so the target writes it.

Two writers, each a decoding loop of its own, hold the same text. `docs/routing.md` walks through a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from routers import Decision, DraftedStep, Router
from routers.base import Writer
from specdec.recording import Recorder
from specdec.routing.session import WriterSession
from specdec.routing.view import WriterView
from specdec.routing.writer import StepWriter, num_shared
from specdec.stats import StepRecord
from specdec.streaming import StreamFeed


class StepLoop:
    """One routed `generate()` call at work.

    Args:
        draft, target: the writers; the target's session proposes what the draft writes.
        decode: token ids to text.
        ask, token_of: as of `WriterView`.
        recorder: takes the rows that stop.
        feed: gets tokens by step.
        started: `perf_counter()` when the call began.
    """

    def __init__(
        self,
        router: Router,
        draft: StepWriter,
        target: StepWriter,
        *,
        decode: Callable[[Sequence[int]], str],
        ask: Callable[[str, str], list[int]],
        token_of: Callable[[str], int],
        recorder: Recorder,
        feed: StreamFeed | None,
        started: float,
    ):
        self.router, self.draft, self.target = router, draft, target
        self.recorder, self.feed = recorder, feed
        self.stats = target.stats
        self._decode, self._ask, self._token_of = decode, ask, token_of
        self._started = started
        num_rows = len(target.sequences)
        self._prompts = [list(tokens) for tokens in target.sequences.tokens]
        self._steps: list[list[Sequence[int]]] = [[] for _ in range(num_rows)]
        self._writers: list[list[Writer]] = [[] for _ in range(num_rows)]

    def run(self) -> None:
        """Write until every row has stopped."""
        while len(self.target.sequences):
            self.step()
        if self.feed is not None:
            self.feed.end()
        self.stats.target_forwards = self.target.target.num_forwards
        self.stats.draft_forwards = self.draft.target.num_forwards
        self.stats.draft_seconds = self.draft.stats.draft_seconds + self.draft.stats.verify_seconds
        self.stats.finish(perf_counter() - self._started)

    def close(self) -> None:
        """The run is over, also when it ended in an exception."""
        self.draft.session.close()
        self.target.session.close()

    def step(self) -> None:
        """One step of every unfinished row."""
        started = perf_counter()
        rows = range(len(self.target.sequences))
        texts = [list(tokens) for tokens in self.target.sequences.tokens]
        early = self._draft_steps(rows)
        drafted = [self._drafted(row) for row in rows]
        view = self._view()
        decisions = early | self._decide({row: drafted[row] for row in rows if row not in early}, view)
        kept = {row: drafted[row].tokens for row in rows if not decisions[row].escalate}
        view.settle(kept)
        self._let_write({row: drafted[row].tokens for row in rows if row not in kept and row not in view.written})
        steps = [kept[row] if row in kept else self.target.step_tokens(row) for row in rows]
        last = [drafted[row].is_last if row in kept else self.target.stop.steps[row].is_last for row in rows]
        for row in rows:
            self._note(row, decisions[row], drafted[row].tokens, steps[row], view, perf_counter() - started)
        num_drafted = [num_shared(drafted[row].tokens, steps[row]) for row in rows]
        self._commit({row: [*texts[row], *steps[row]] for row in rows}, steps, num_drafted, last)

    def _draft_steps(self, rows: Sequence[int]) -> dict[int, Decision]:
        """Let the draft write every row's step; returns what was decided early."""
        longest = self.router.steps.max_tokens
        early: dict[int, Decision] = {}
        if self.router.peek is not None:
            self.draft.write(dict.fromkeys(rows, min(self.router.peek, longest)))
            decisions = self.router.decide_early([self._drafted(row) for row in rows])
            early = {row: decision for row, decision in zip(rows, decisions, strict=True) if decision is not None}
        relieved = {row for row, decision in early.items() if decision.escalate}
        self.draft.write({row: longest for row in rows if row not in relieved})
        return early

    def _decide(self, drafted: Mapping[int, DraftedStep], view: WriterView) -> dict[int, Decision]:
        if not drafted:
            return {}
        started = perf_counter()
        decisions = self.router.decide(list(drafted.values()), view)
        self.stats.router_seconds += perf_counter() - started - view.seconds
        return dict(zip(drafted, decisions, strict=True))

    def _let_write(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Let the target write these rows' steps; what the draft wrote is its first token-level draft."""
        session = self.target.session
        assert isinstance(session, WriterSession)
        session.hint({row: tokens for row, tokens in drafts.items() if not self.target.step_tokens(row)})
        self.target.write(dict.fromkeys(drafts, self.router.steps.max_tokens))

    def _commit(
        self,
        texts: Mapping[int, Sequence[int]],
        steps: Sequence[Sequence[int]],
        num_drafted: Sequence[int],
        last: Sequence[bool],
    ) -> None:
        """Bring both writers to the same text, pass it on, and let the rows go that have stopped.

        Args:
            num_drafted: how many of a step's first tokens are the draft's as it wrote them.
        """
        for writer in (self.draft, self.target):
            writer.sync(texts)
            writer.begin_steps()
        self.stats.note_tokens(sum(map(len, steps)), perf_counter() - self._started)
        rows = self.target.sequences.rows
        if self.feed is not None:
            self.feed.put_round(rows, steps, num_drafted)
        for index, (row, tokens, is_last) in enumerate(zip(rows, steps, last, strict=True)):
            self._steps[row].append(tokens)
            if self.feed is not None:
                self.feed.put(row, tokens, is_last)
            if is_last:
                self.recorder.finish(row, self.target.sequences.prefix(index), None, index)
        if self.feed is not None:
            self.feed.flush()
        stay = [index for index, is_last in enumerate(last) if not is_last]
        if len(stay) < len(last):
            self.draft.select_rows(stay)
            self.target.select_rows(stay)

    def _note(
        self,
        row: int,
        decision: Decision,
        drafted: Sequence[int],
        step: Sequence[int],
        view: WriterView,
        seconds: float,
    ) -> None:
        place = self.target.sequences.rows[row]
        writer: Writer = "target" if decision.escalate else "draft"
        discarded = len(drafted) - num_shared(drafted, step)
        if row in view.written and not decision.escalate:
            theirs = self.target.step_tokens(row)
            discarded = len(theirs) - num_shared(theirs, step)
        self._writers[place].append(writer)
        self.stats.steps.append(
            StepRecord(
                row=place,
                writer=writer,
                score=decision.score,
                reason=decision.reason,
                num_tokens=len(step),
                num_discarded=discarded,
                seconds=seconds,
            )
        )

    def _view(self) -> WriterView:
        places = {row: place for place, row in enumerate(self.target.sequences.rows)}
        return WriterView(self.target, places, ask=self._ask, token_of=self._token_of, write=self._let_write)

    def _drafted(self, row: int) -> DraftedStep:
        place = self.target.sequences.rows[row]
        return DraftedStep(
            row=place,
            prompt=self._prompts[place],
            previous=tuple(self._steps[place]),
            writers=tuple(self._writers[place]),
            tokens=self.draft.step_tokens(row),
            signals=self.draft.step_signals(row),
            is_last=self.draft.stop.steps[row].is_last,
            decode=self._decode,
        )
