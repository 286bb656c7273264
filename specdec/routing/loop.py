"""The loop of steps: the draft writes one, the router decides, and where it says so the target writes it.

Two writers, each a decoding loop of its own, hold the same text. `docs/routing.md` walks through a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TypeAlias

from routers import Decision, DraftedStep, Router
from routers.base import Writer
from specdec.errors import EndpointError
from specdec.recording import Recorder
from specdec.routing.remote import RemoteWriter
from specdec.routing.view import RemoteView, WriterView
from specdec.routing.writer import StepWriter
from specdec.sequences import num_shared
from specdec.stats import StepRecord
from specdec.streaming import StreamFeed

AnyWriter: TypeAlias = StepWriter | RemoteWriter
View: TypeAlias = WriterView | RemoteView


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
        draft: AnyWriter,
        target: AnyWriter,
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
        self._lost: Writer | None = None
        """Whose endpoint has failed for good: the other one goes on alone."""

    def run(self) -> None:
        """Write until every row has stopped."""
        while len(self.target.sequences):
            self.step()
        if self.feed is not None:
            self.feed.end()
        self._finish()

    def salvage(self) -> None:
        """After an exception: finish every row with what it has, the unfinished step included."""
        for row, place in enumerate(self.target.sequences.rows):
            drafted, written = self.draft.step_tokens(row), self.target.step_tokens(row)
            if written or drafted:
                decision = Decision(escalate=bool(written), reason="broken off")
                self._note(row, decision, drafted, written or drafted)
                self.stats.note_tokens(len(written or drafted), perf_counter() - self._started)
            if not written:
                self.target.sync({row: [*self.target.sequences.tokens[row], *drafted]})
            self.recorder.finish(place, self.target.sequences.prefix(row), None, row)
        self._finish()

    def close(self) -> None:
        """The run is over, also when it ended in an exception."""
        self.draft.close()
        self.target.close()

    def step(self) -> None:
        """One step of every unfinished row."""
        started = perf_counter()
        rows = range(len(self.target.sequences))
        texts = [list(tokens) for tokens in self.target.sequences.tokens]
        decisions = self._draft_steps(rows)
        drafted = [self._drafted(row) for row in rows]
        view = self._view()
        decisions |= self._decide({row: drafted[row] for row in rows if row not in decisions}, view)
        view.settle({row: drafted[row].tokens for row in rows if not decisions[row].escalate})
        escalated = [row for row in rows if decisions[row].escalate and row not in view.written]
        for row in self._escalate({row: drafted[row].tokens for row in escalated}):
            decisions[row], drafted[row] = self._alone(), self._drafted(row)
        theirs = [self.target.step_tokens(row) for row in rows]
        steps = [theirs[row] if decisions[row].escalate else drafted[row].tokens for row in rows]
        their_last = [self.target.stop.steps[row].is_last for row in rows]
        last = [their_last[row] if decisions[row].escalate else drafted[row].is_last for row in rows]
        for row in rows:
            in_vain = theirs[row] if row in view.written and not decisions[row].escalate else drafted[row].tokens
            self._note(row, decisions[row], in_vain, steps[row], perf_counter() - started)
        num_drafted = [num_shared(drafted[row].tokens, steps[row]) for row in rows]
        self._commit({row: [*texts[row], *steps[row]] for row in rows}, steps, num_drafted, last)

    def _draft_steps(self, rows: Sequence[int]) -> dict[int, Decision]:
        """Let the draft write every row's step; returns what was decided early."""
        if self._lost == "draft":
            return dict.fromkeys(rows, self._alone())
        try:
            return self._draft_until_decided(rows)
        except EndpointError as error:
            self._lose(error)
            return dict.fromkeys(rows, self._alone())

    def _draft_until_decided(self, rows: Sequence[int]) -> dict[int, Decision]:
        longest = self.router.steps.max_tokens
        early: dict[int, Decision] = {}
        if self.router.peek is not None and self._lost is None:
            self.draft.write(dict.fromkeys(rows, min(self.router.peek, longest)))
            decisions = self.router.decide_early([self._drafted(row) for row in rows])
            early = {row: decision for row, decision in zip(rows, decisions, strict=True) if decision is not None}
        relieved = {row for row, decision in early.items() if decision.escalate}
        self.draft.write({row: longest for row in rows if row not in relieved})
        return early

    def _decide(self, drafted: Mapping[int, DraftedStep], view: View) -> dict[int, Decision]:
        if not drafted:
            return {}
        if self._lost == "target":
            return dict.fromkeys(drafted, self._alone())
        started = perf_counter()
        try:
            decisions = self.router.decide(list(drafted.values()), view)
        except EndpointError as error:
            self._lose(error)
            return dict.fromkeys(drafted, self._alone())
        self.stats.router_seconds += perf_counter() - started - view.seconds
        return dict(zip(drafted, decisions, strict=True))

    def _escalate(self, drafts: Mapping[int, Sequence[int]]) -> list[int]:
        """Let the target write these rows' steps; returns the rows of which it was lost before it wrote anything."""
        try:
            self._let_write(drafts)
        except EndpointError as error:
            self._lose(error)
            begun = [row for row in drafts if self.target.step_tokens(row) or self.target.stop.steps[row].is_last]
            left = [row for row in drafts if row not in begun]
            self.draft.write(dict.fromkeys(left, self.router.steps.max_tokens))
            return left
        return []

    def _lose(self, error: EndpointError) -> None:
        """Go on without an endpoint that has failed for good, if it allows that and the other writer is there."""
        if self._lost is not None or error.endpoint.on_failure == "raise":
            raise error
        self._lost = "draft" if error.endpoint is self.draft.endpoint else "target"

    def _alone(self) -> Decision:
        return Decision(escalate=self._lost == "draft", reason=f"{self._lost} lost")

    def _let_write(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """Let the target write these rows' steps; what the draft wrote is its first token-level draft."""
        self.target.suggest({row: tokens for row, tokens in drafts.items() if not self.target.step_tokens(row)})
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
        self, row: int, decision: Decision, in_vain: Sequence[int], step: Sequence[int], seconds: float = 0.0
    ) -> None:
        """Record a step.

        Args:
            in_vain: what was written besides, perhaps the beginning of the step itself.
        """
        place = self.target.sequences.rows[row]
        writer: Writer = "target" if decision.escalate else "draft"
        self._writers[place].append(writer)
        self.stats.steps.append(
            StepRecord(
                row=place,
                writer=writer,
                score=decision.score,
                reason=decision.reason,
                num_tokens=len(step),
                num_discarded=len(in_vain) - num_shared(in_vain, step),
                seconds=seconds,
            )
        )

    def _finish(self) -> None:
        """Settle the statistics."""
        stats, draft = self.stats, self.draft
        stats.target_forwards, stats.draft_forwards = self.target.num_forwards, draft.num_forwards
        stats.target_requests, stats.draft_requests = self.target.num_requests, draft.num_requests
        stats.draft_seconds = draft.stats.draft_seconds + draft.stats.verify_seconds
        stats.finish(perf_counter() - self._started)

    def _view(self) -> View:
        places = {row: place for place, row in enumerate(self.target.sequences.rows)}
        if isinstance(self.target, RemoteWriter):
            return RemoteView(self.target, places, ask=self._ask, write=self._let_write)
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
