"""The audit: every case alone, several at once, among requests that come and go, and at the end of the context."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from specdec.audit.answers import Answer, Reference, placed
from specdec.audit.cases import BOUNDARY, COPIES, DEPTHS, Case, boundary_case
from specdec.audit.client import Server
from specdec.audit.verdicts import Comparison, Verdict, compare, diagnose
from specdec.errors import SpecdecError
from specdec.stages import stage

ALONE, JOINS_AND_LEAVES, AFTER = "alone", "joins and leaves", "after the boundary"
REFERENCE_AGAIN = "the reference itself, 4 at once"
LEAST_TIE_BOUND = 1e-3
_NOISE_FACTOR = 4.0
_LONGEST_CONTEXT = 16_384
"""Beyond this a prompt as long as the context is sent only where the user has said how long that is."""
_DEPTHS = (1, 2, 3, 5, 8)
_ROOM = 48
"""Tokens of an answer at the boundary, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """An answer to a case in one phase of the audit, beside the reference's."""

    phase: str
    case: Case
    comparison: Comparison
    diagnosis: str = ""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What an audit has found.

    Args:
        noise: by how much the reference's log-probabilities of the same tokens differ between two runs of it; None if
            that was not measured.
        num_drafted, num_accepted: None if the server does not say.
        notes: what was not checked, and why.
    """

    endpoint: str
    reference: str
    version: str | None
    tie_bound: float
    noise: float | None = None
    num_drafted: int | None = None
    num_accepted: int | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, *verdicts: Verdict, phase: str | None = None, group: str | None = None) -> int:
        return sum(
            check.comparison.verdict in verdicts and phase in (None, check.phase) and group in (None, check.case.group)
            for check in self.checks
        )

    @property
    def errors(self) -> list[Check]:
        return [check for check in self.checks if check.comparison.verdict in (Verdict.DIFFERENT, Verdict.FAILED)]

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(check.phase for check in self.checks))

    @property
    def is_clean(self) -> bool:
        """Whether answers were compared, and none is wrong."""
        return not self.errors and self.count(Verdict.IDENTICAL, Verdict.TIE) > 0


_NONSENSE = {"speculation": "an audit's question"}
"""A server that refuses this looks at the field."""


def without_speculation(server: Server, case: Case) -> Server:
    """The same server, asked not to speculate in each request.

    Raises:
        SpecdecError: it does not look at that field, so that its answers would be compared with themselves.
    """
    if not server.refuses(_NONSENSE, case) or server.refuses({"speculation": False}, case):
        raise SpecdecError(
            "this server cannot turn speculation off for one request: start it again without speculation and give "
            "that address with --reference, or name the model that it serves"
        )
    return server.with_extra({"speculation": False})


def audit(
    server: Server,
    reference: Reference,
    cases: Sequence[Case],
    *,
    concurrency: Sequence[int] = (1, 2, 4, 8),
    tie_bound: float | None = None,
    context_length: int | None = None,
    on_phase: Callable[[Findings, str], None] = lambda findings, phase: None,
) -> Findings:
    """Ask all cases, in each of these numbers at once, and compare greedy answers token by token.

    Args:
        tie_bound: natural logarithms by which the reference prefers its own token where rounding may decide; None
            takes four times the noise of the reference, and at least 0.001.
        context_length: tokens; None asks the server.
        on_phase: is told of each phase that is over.
    """
    return _Audit(server, reference, list(cases), tie_bound, on_phase).run(concurrency, context_length)


class _Audit:
    def __init__(
        self,
        server: Server,
        reference: Reference,
        cases: list[Case],
        tie_bound: float | None,
        on_phase: Callable[[Findings, str], None],
    ):
        self._server, self._reference, self._cases, self._on_phase = server, reference, cases, on_phase
        self._bound = tie_bound if tie_bound is not None else reference.tie_bound
        self._known: dict[str, Answer] = {}
        """case -> the reference's answer."""
        self._answers: list[Answer] = []
        self._random = random.Random(0)
        self._findings = Findings(
            endpoint=server.describe(),
            reference=reference.describe(),
            version=server.version(),
            tie_bound=self._bound or LEAST_TIE_BOUND,
        )

    def run(self, concurrency: Sequence[int], context_length: int | None) -> Findings:
        started, drafted_before = time.monotonic(), self._server.drafted_so_far()
        self._ask_reference()
        for number in concurrency:
            self._phase(ALONE if number == 1 else f"{number} at once", self._cases, number)
        self._drafted_depths()
        self._joins_and_leaves(max(concurrency))
        self._boundary(context_length)
        self._count_drafts(drafted_before)
        self._findings.seconds = time.monotonic() - started
        return self._findings

    def _ask_reference(self) -> None:
        with stage("asking the reference"):
            for case in self._cases:
                self._known[case.name] = self._reference.answer(case, with_logprobs=True)
            failed = [answer.error for answer in self._known.values() if answer.error is not None]
            if len(failed) == len(self._cases):
                raise SpecdecError(f"the reference answers nothing: {failed[0]}")
            if not self._reference.takes_several:
                return
            again = self._ask_at_once(self._cases, 4, lambda case: self._reference.answer(case, with_logprobs=True))
        self._findings.noise = max(_noise(self._known[name], answer) for name, answer in again.items())
        if self._bound is None:
            self._findings.tie_bound = max(LEAST_TIE_BOUND, _NOISE_FACTOR * self._findings.noise)
        self._compare(REFERENCE_AGAIN, again)

    def _phase(self, name: str, cases: Sequence[Case], number: int, server: Server | None = None) -> None:
        order = list(cases)
        self._random.shuffle(order)  # so that others meet than before
        with stage(f"asking the server, {name}"):
            answers = self._ask_at_once(order, number, (server or self._server).answer)
        self._answers += answers.values()
        self._compare(name, answers)

    def _drafted_depths(self) -> None:
        """Where requests can limit what is drafted (`specdec serve`), each of some depths."""
        asked = {depth: {"speculation": {"num_speculative_tokens": depth}} for depth in _DEPTHS}
        first, copies = self._cases[0], [case for case in self._cases if case.group in (COPIES, DEPTHS)]
        if not copies or not self._server.refuses(_NONSENSE, first) or self._server.refuses(asked[1], first):
            return
        for depth, extra in asked.items():
            self._phase(f"at most {depth} drafted", copies, 2, self._server.with_extra(extra))

    def _joins_and_leaves(self, number: int) -> None:
        """Requests begin at different times, some are streams, and some clients hang up after a few parts."""
        plans = {case.name: (self._random.random() * 0.05, self._random.random() < 0.5) for case in self._cases}
        leavers = [
            replace(case, name=f"{case.name}, left") for case in self._cases if case.max_tokens > 9 and not case.is_chat
        ]
        leave_after = {case.name: self._random.randrange(1, 6) for case in leavers}

        def ask(case: Case) -> Answer:
            if case.name in leave_after:
                return self._server.stream(case, leave_after=leave_after[case.name])
            pause, is_streamed = plans[case.name]
            time.sleep(pause)
            return self._server.stream(case) if is_streamed else self._server.answer(case)

        order = [*self._cases, *leavers]
        self._random.shuffle(order)
        with stage(f"asking the server, {JOINS_AND_LEAVES}"):
            answers = self._ask_at_once(order, max(2, number), ask)
        stayed = {name: answer for name, answer in answers.items() if name in self._known}
        self._answers += stayed.values()
        self._compare(JOINS_AND_LEAVES, stayed)

    def _boundary(self, context_length: int | None) -> None:
        length = context_length or self._server.context_length()
        if length is None:
            return self._note("the server does not tell its context's length: give it with --context-length")
        if context_length is None and length > _LONGEST_CONTEXT:
            return self._note(f"so long a context ({length} tokens) is filled only where --context-length asks for it")
        with stage(f"asking the server, {BOUNDARY}"):
            full = self._fill(length)
            if full is None:
                return self._note("the server does not tell how many tokens a prompt has")
            self._known[full.name] = self._reference.answer(full, with_logprobs=True)
            answers = self._ask_at_once([full], 1, self._server.answer)
            longer = boundary_case("beyond the context", 2 * full.prompt.count("\n"), 8)
            self._server.answer(longer)  # refused or cut: what counts is what the next ones get
        self._compare(BOUNDARY, answers)
        self._phase(AFTER, [case for case in self._cases if case.group == COPIES], 2)
        return None

    def _fill(self, length: int) -> Case | None:
        """A case that ends with the last token of the context."""
        few, more = (self._num_tokens(count) for count in (10, 20))
        if few is None or more is None or more <= few:
            return None
        num_lines = int((length - _ROOM - few) / ((more - few) / 10)) + 10
        used = self._num_tokens(num_lines)
        if used is None or used >= length:
            return None
        return boundary_case(f"up to token {length}", num_lines, length - used)

    def _num_tokens(self, num_lines: int) -> int | None:
        return self._server.answer(boundary_case("its length", num_lines, 1)).num_prompt_tokens

    def _ask_at_once(self, cases: Sequence[Case], number: int, ask: Callable[[Case], Answer]) -> dict[str, Answer]:
        with ThreadPoolExecutor(number) as pool:
            return dict(zip((case.name for case in cases), pool.map(ask, cases), strict=True))

    def _compare(self, phase: str, answers: Mapping[str, Answer]) -> None:
        cases = {case.name: case for case in self._cases}
        for name, answer in answers.items():
            case = cases.get(name) or boundary_case(name, 0, 0)
            compared = compare(case, self._known[name], answer, tie_bound=self._findings.tie_bound)
            is_wrong = compared.verdict is Verdict.DIFFERENT
            diagnosis = diagnose(case, answer, compared, self._known) if is_wrong else ""
            check = Check(phase=phase, case=case, comparison=compared, diagnosis=diagnosis)
            self._findings.checks.append(check)
        self._on_phase(self._findings, phase)

    def _note(self, why: str) -> None:
        self._findings.notes.append(f"{BOUNDARY}: not checked; {why}")

    def _count_drafts(self, before: float | None) -> None:
        told = [answer for answer in self._answers if answer.num_drafted is not None]
        if told:
            self._findings.num_drafted = sum(answer.num_drafted or 0 for answer in told)
            self._findings.num_accepted = sum(answer.num_accepted or 0 for answer in told)
        elif before is not None and (after := self._server.drafted_so_far()) is not None:
            self._findings.num_drafted = int(after - before)


def _noise(one: Answer, other: Answer) -> float:
    """By how much two answers differ in the log-probabilities of the tokens up to their first difference."""
    return max((abs(a - b) for a, b in _same_tokens(one, other)), default=0.0)


def _same_tokens(one: Answer, other: Answer) -> Iterator[tuple[float, float]]:
    for (_, a), (_, b) in zip(placed(one), placed(other), strict=False):
        if a.text != b.text:
            return
        yield a.log_prob, b.log_prob


def tally(findings: Findings, phase: str) -> Counter[Verdict]:
    """How often each verdict was reached in a phase."""
    return Counter(check.comparison.verdict for check in findings.checks if check.phase == phase)
