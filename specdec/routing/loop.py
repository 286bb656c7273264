"""The loop of steps: the draft writes one, the router decides, and where it says so the target writes it.

Two writers, each a decoding loop of its own, hold the same text. The rows of a batch do not wait for each other: while
the target writes in some, the draft goes on in others. `docs/routing.md` walks through a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter
from typing import TypeAlias

from routers import Decision, DraftedStep, Router
from routers.base import Writer
from specdec.decoding.recording import Recorder
from specdec.decoding.sequences import num_shared
from specdec.decoding.stats import StepRecord
from specdec.errors import EndpointError
from specdec.routing.remote.view import RemoteView
from specdec.routing.remote.writer import RemoteWriter
from specdec.routing.turns import Chain, Finished, Judged, Phase, Turn, flat
from specdec.routing.view import WriterView
from specdec.routing.writer import StepWriter
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
        self._turns = [Turn() for _ in range(num_rows)]
        self._is_local = isinstance(draft, StepWriter) and isinstance(target, StepWriter)
        self._lost: Writer | None = None
        """Whose endpoint has failed for good: the other one goes on alone."""

    def run(self) -> None:
        """Write until every row has stopped."""
        while len(self.target.sequences):
            self._attend()
            self._round()
        if self.feed is not None:
            self.feed.end()
        self._finish()

    def keep_partial(self) -> None:
        """After an exception: finish every row with what it has, the unfinished step included."""
        for row, caller_row in enumerate(self.target.sequences.rows):
            drafted, written = self.draft.step_tokens(row), self.target.step_tokens(row)
            if written or drafted:
                decision = Decision(escalate=bool(written), reason="broken off")
                self._record(row, decision, drafted, written or drafted)
                self.stats.record_tokens(len(written or drafted), perf_counter() - self._started)
            if not written:
                self.target.sync({row: [*self.target.sequences.tokens[row], *drafted]})
            self.recorder.finish(caller_row, self.target.sequences.prefix(row), None, row)
        self._finish()

    def close(self) -> None:
        """The run is over, also when it ended in an exception."""
        self.draft.close()
        self.target.close()

    def _round(self) -> None:
        """One forward for every row, by whichever model is writing it."""
        drafting, writing = self.draft.stop.writing, self.target.stop.writing
        if not drafting and not writing:
            return
        # the draft helps the target, and takes its own rows along; servers are asked for as many rows as there will be
        writer = self.target if writing and (self._is_local or not drafting) else self.draft
        try:
            writer.round()
        except EndpointError as error:
            self._handle_endpoint_failure(error)

    def _attend(self) -> None:
        """See to every row that does not write, until all of them do or have stopped."""
        attend = {
            Phase.NEW: self._begin,
            Phase.PEEK: self._peek,
            Phase.DRAFT: self._judge,
            Phase.TARGET: self._take,
        }
        while pausing := {phase: rows for phase in attend if (rows := self._pausing(phase))}:
            phase, rows = next(iter(pausing.items()))
            attend[phase](rows)

    def _pausing(self, phase: Phase) -> list[int]:
        if phase is Phase.DRAFT and self.router.judges_together and self.draft.stop.writing:
            return []
        steps = (self.target if phase is Phase.TARGET else self.draft).stop.steps
        return [row for row, turn in enumerate(self._turns) if turn.phase is phase and not steps[row].writing]

    def _begin(self, rows: Sequence[int]) -> None:
        """A step begins."""
        if self._lost == "draft":
            self._escalate(dict.fromkeys(rows, self._alone()), {})
        elif self.router.peek is None or self._lost is not None:
            self._let_draft(rows)
        else:
            for row in rows:
                self._turns[row].phase = Phase.PEEK
            self.draft.begin(dict.fromkeys(rows, min(self.router.peek, self._longest)))

    def _peek(self, rows: Sequence[int]) -> None:
        """The draft has written the first tokens: the router looks. Undecided, it may look again some tokens later."""
        decisions: dict[int, Decision | None] = dict.fromkeys(rows)
        every = None
        if self._lost is None:
            every, started = self.router.peek_every, perf_counter()
            decisions.update(zip(rows, self.router.decide_early([self._drafted(row) for row in rows]), strict=True))
            self.stats.router_seconds += perf_counter() - started
        again = {}
        for row, decision in decisions.items():
            self._turns[row].decision = decision
            if decision is None and every is not None and not self.draft.stop.steps[row].is_over:
                again[row] = min(len(self.draft.step_tokens(row)) + every, self._longest)
        escalated = {row: decision for row, decision in decisions.items() if decision is not None and decision.escalate}
        self.draft.begin(again)
        self._let_draft([row for row in rows if row not in escalated and row not in again])
        behind = [row for row in escalated if self._turns[row].ahead]
        alone = {row: decision for row, decision in escalated.items() if row not in behind}
        self._escalate(alone, {row: self.draft.step_tokens(row) for row in alone})
        self._settle(behind)

    def _let_draft(self, rows: Sequence[int]) -> None:
        """The draft writes these rows' steps."""
        for row in rows:
            self._turns[row].phase = Phase.DRAFT
        self.draft.begin(dict.fromkeys(rows, self._longest))

    def _judge(self, rows: Sequence[int]) -> None:
        """The draft has written a step: the router decides, or lets the draft go on first."""
        rest = []
        for row in rows:
            turn, most = self._turns[row], self.router.lookahead if self._is_local else 1
            if len(turn.ahead) + 1 < most and not self.draft.stop.steps[row].is_last:
                turn.ahead.append(Judged(self._drafted(row), turn.decision))
                turn.phase, turn.decision = Phase.NEW, None
                self.draft.begin_steps([row])
            else:
                rest.append(row)
        self._settle(rest)

    def _settle(self, rows: Sequence[int]) -> None:
        """Judge these rows' steps, one after the other, and go on from what is kept."""
        if not rows:
            return
        chains = {
            row: Chain(steps=[*turn.ahead, Judged(self._drafted(row), turn.decision)])
            for row, turn in enumerate(self._turns)
            if row in rows
        }
        view = self._view({row: chain.tokens for row, chain in chains.items()})
        while waiting := {row: chain.next for row, chain in chains.items() if chain.next is not None}:
            known = {row: one.decision for row, one in waiting.items() if one.decision is not None}
            known |= self._decide({row: one.step for row, one in waiting.items() if row not in known}, view)
            for row, decision in known.items():
                chains[row].judge(decision)
        cut = {row: chain for row, chain in chains.items() if chain.is_cut}
        kept = {row: [one.step.tokens for one in chain.steps[: chain.kept]] for row, chain in chains.items()}
        scored = view.commit_scored({row: steps for row, steps in kept.items() if steps}, cut.keys())
        self._commit({row: self._finished(row, chain, view) for row, chain in cut.items() if chain.kept}, scored)
        for row, chain in cut.items():
            self._turns[row].beyond = chain.beyond
        rejected = {row: chain.steps[chain.kept] for row, chain in cut.items()}
        self._escalate(
            {row: one.decision for row, one in rejected.items() if one.decision is not None},
            {row: one.step.tokens for row, one in rejected.items()},
        )
        self._commit({row: self._finished(row, chain, view) for row, chain in chains.items() if row not in cut})

    def _finished(self, row: int, chain: Chain, view: View) -> list[Finished]:
        """The steps of a chain that are kept."""
        finished = []
        for step, decision in chain.steps[: chain.kept]:
            assert decision is not None
            in_vain = self.target.step_tokens(row) if row in view.written else step.tokens
            finished.append(Finished(decision, step.tokens, step.tokens, in_vain, step.is_last))
        return finished

    def _decide(self, drafted: Mapping[int, DraftedStep], view: View) -> dict[int, Decision]:
        if not drafted:
            return {}
        if self._lost == "target":
            return dict.fromkeys(drafted, self._alone())
        started = perf_counter()
        try:
            decisions = self.router.decide(list(drafted.values()), view)
        except EndpointError as error:
            self._handle_endpoint_failure(error)
            return dict.fromkeys(drafted, self._alone())
        self.stats.router_seconds += perf_counter() - started - view.seconds
        return dict(zip(drafted, decisions, strict=True))

    def _escalate(self, decisions: Mapping[int, Decision], drafts: Mapping[int, Sequence[int]]) -> None:
        """The target writes these rows' steps, unless it has for the router."""
        for row, decision in decisions.items():
            turn = self._turns[row]
            turn.phase, turn.decision, turn.drafted = Phase.TARGET, decision, drafts.get(row, ())
        self._hand_over({row: drafts.get(row, ()) for row in decisions})

    def _hand_over(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """The target goes on with these rows' steps; what the draft wrote is its first token-level draft."""
        self.target.append_draft_step(
            {row: tokens for row, tokens in drafts.items() if not self.target.step_tokens(row)}
        )
        self.target.begin(dict.fromkeys(drafts, self._longest))

    def _let_write(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """The target writes these rows' steps now: the router has asked for them."""
        self._hand_over(drafts)
        self.target.write(dict.fromkeys(drafts, self._longest))

    def _take(self, rows: Sequence[int]) -> None:
        """The target has written a step."""
        finished = {}
        for row in rows:
            turn = self._turns[row]
            assert turn.decision is not None
            tokens, is_last = self.target.step_tokens(row), self.target.stop.steps[row].is_last
            in_vain = [*turn.drafted, *turn.beyond]
            finished[row] = [Finished(turn.decision, tokens, turn.drafted, in_vain, is_last)]
        self._commit(finished)

    def _handle_endpoint_failure(self, error: EndpointError) -> None:
        """Go on without an endpoint that has failed for good, if it allows that and the other writer is there."""
        if self._lost is not None or error.endpoint.on_failure == "raise":
            raise error
        turns = list(enumerate(self._turns))
        if error.endpoint is self.draft.endpoint:
            self._lost = "draft"
            drafts = {
                row: self.draft.step_tokens(row) for row, turn in turns if turn.phase in (Phase.PEEK, Phase.DRAFT)
            }
            self._escalate(dict.fromkeys(drafts, self._alone()), drafts)
            return
        self._lost = "target"
        for step in self.target.stop.steps:
            step.writing = False
        begun = [bool(self.target.step_tokens(row)) or step.is_last for row, step in enumerate(self.target.stop.steps)]
        left = [row for row, turn in turns if turn.phase is Phase.TARGET and not begun[row]]
        for row in left:
            self._turns[row].decision = self._alone()
        self._let_draft(left)

    def _alone(self) -> Decision:
        return Decision(escalate=self._lost == "draft", reason=f"{self._lost} lost")

    def _commit(self, finished: Mapping[int, Sequence[Finished]], scored: Collection[int] = ()) -> None:
        """Bring both writers to the same text, pass it on, and let the rows go that have stopped.

        Args:
            scored: rows in which the target holds these steps, and goes on after them.
        """
        if not finished:
            return
        rows = self.target.sequences.rows
        texts = {}
        for row, steps in finished.items():
            before = self._prompts[rows[row]], flat(self._steps[rows[row]])
            texts[row] = flat([*before, *(step.tokens for step in steps)])
            for step in steps:
                self._record(row, step.decision, step.in_vain, step.tokens)
            self._turns[row] = Turn()
        for writer, others in ((self.draft, ()), (self.target, scored)):
            ours = {row: text for row, text in texts.items() if row not in others}
            writer.sync(ours)
            writer.begin_steps(ours)
        flattened = [(row, rows[row], step) for row, steps in finished.items() for step in steps]
        self.stats.record_tokens(sum(len(step.tokens) for *_, step in flattened), perf_counter() - self._started)
        if self.feed is not None:
            shared = [num_shared(step.drafted, step.tokens) for *_, step in flattened]
            caller_rows = [caller_row for _, caller_row, _ in flattened]
            self.feed.put_round(caller_rows, [step.tokens for *_, step in flattened], shared)
        for row, caller_row, step in flattened:
            self._steps[caller_row].append(step.tokens)
            if self.feed is not None:
                self.feed.put(caller_row, step.tokens, step.is_last)
            if step.is_last:
                self.recorder.finish(caller_row, self.target.sequences.prefix(row), None, row)
        if self.feed is not None:
            self.feed.flush()
        gone = {row for row, _, step in flattened if step.is_last}
        if gone:
            stay = [row for row in range(len(self._turns)) if row not in gone]
            self.draft.select_rows(stay)
            self.target.select_rows(stay)
            self._turns = [self._turns[row] for row in stay]

    @property
    def _longest(self) -> int:
        return self.router.steps.max_tokens

    def _record(self, row: int, decision: Decision, in_vain: Sequence[int], step: Sequence[int]) -> None:
        """Record a step.

        Args:
            in_vain: what was written besides, perhaps the beginning of the step itself.
        """
        caller_row = self.target.sequences.rows[row]
        writer: Writer = "target" if decision.escalate else "draft"
        self._writers[caller_row].append(writer)
        self.stats.steps.append(
            StepRecord(
                row=caller_row,
                writer=writer,
                score=decision.score,
                reason=decision.reason,
                num_tokens=len(step),
                num_discarded=len(in_vain) - num_shared(in_vain, step),
                seconds=perf_counter() - self._turns[row].started,
            )
        )

    def _finish(self) -> None:
        """Settle the statistics."""
        stats, draft = self.stats, self.draft
        stats.target_forwards, stats.draft_forwards = self.target.num_forwards, draft.num_forwards
        stats.target_requests, stats.draft_requests = self.target.num_requests, draft.num_requests
        stats.draft_seconds = draft.stats.draft_seconds + draft.stats.verify_seconds
        stats.finish(perf_counter() - self._started)

    def _view(self, chains: Mapping[int, Sequence[int]]) -> View:
        writer_rows = {row: index for index, row in enumerate(self.target.sequences.rows)}
        if isinstance(self.target, RemoteWriter):
            return RemoteView(self.target, writer_rows, ask=self._ask, write=self._let_write)
        return WriterView(
            self.target, writer_rows, chains, ask=self._ask, token_of=self._token_of, write=self._let_write
        )

    def _drafted(self, row: int) -> DraftedStep:
        caller_row, ahead = self.target.sequences.rows[row], self._turns[row].ahead
        ours: Writer = "draft"
        return DraftedStep(
            row=caller_row,
            prompt=self._prompts[caller_row],
            previous=(*self._steps[caller_row], *(one.step.tokens for one in ahead)),
            writers=(*self._writers[caller_row], *(ours for _ in ahead)),
            tokens=self.draft.step_tokens(row),
            signals=self.draft.step_signals(row),
            is_last=self.draft.stop.steps[row].is_last,
            decode=self._decode,
        )
