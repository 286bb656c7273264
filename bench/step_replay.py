"""Greedy steps, written once for every text before them, and routers replayed on them.

A greedy step is a function of the text before it. So a step that one router's text has needed is good for every other
router whose text comes by: `StepCache` keeps them (JSON lines, one a step, appended at once), `StepSource` has the
models write those that are missing, several problems at a time, and `replay` walks a router through them as
`specdec.routing.StepLoop` would, looks at unfinished steps included. What a router decides, and with it the text, is
that of a live run (up to numerical ties); how long it takes is not measured here, it is counted: tokens and forwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha1
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from routers import AlwaysTarget, DraftedStep, Router, Signals, Steps, TargetView
from routers.base import Decision, Writer
from specdec.decoding.recording import Recorder
from specdec.decoding.sampling import Sampler
from specdec.decoding.sequences import num_shared
from specdec.routing import RoutedCall, Routing, StepLoop
from specdec.routing.view import log_probs_of, regrets_of
from specdec.routing.writer import READ_AT_ONCE
from specdec.training.routers.collect import Problem, encode_problems

DRAFT, TARGET, SCORE = "draft", "target", "score"
_DIGITS = 5


class Request(NamedTuple):
    """A step that a replay cannot go on without.

    Args:
        kind: DRAFT or TARGET: their step after the text; SCORE: what the target thinks of the draft's.
        text: token ids after the prompt.
        drafted: of the draft's step, what the target is given.
    """

    kind: str
    problem: int
    text: tuple[int, ...]
    drafted: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        return self.kind, self.problem, sha1(np.array(self.text, np.int64).tobytes()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedStep:
    """A step after a text, or the target's opinion of it.

    Args:
        after: digest of the text's token ids.
        values: for each token log p, entropy and margin of the draft (DRAFT), log p and regret of the target (SCORE).
        seconds: that it took, with as many others as there were rows.
    """

    kind: str
    problem: int
    after: str
    tokens: list[int]
    is_last: bool
    values: list[list[float]]
    seconds: float
    num_rows: int

    def column(self, index: int) -> np.ndarray:
        return np.array([value[index] for value in self.values], np.float32)


class StepCache:
    """Steps in a file.

    Args:
        plan: everything that they depend on, as json takes it.

    Raises:
        ValueError: the file holds steps of another plan.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]):
        self._path, self._steps = path, dict[tuple[str, int, str], CachedStep]()
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            path.write_text(json.dumps(dict(plan)) + "\n")
        elif json.loads(lines[0]) != dict(plan):
            raise ValueError(f"{path} holds steps of other models or settings: {lines[0]}; choose another --output")
        for line in lines[1:]:
            self._add(CachedStep(**json.loads(line)))

    def __len__(self) -> int:
        return len(self._steps)

    def get(self, request: Request) -> CachedStep | None:
        return self._steps.get(request.key)

    def put(self, steps: Sequence[CachedStep]) -> None:
        with self._path.open("a") as file:
            file.writelines(json.dumps(asdict(step)) + "\n" for step in steps)
        for step in steps:
            self._add(step)

    def _add(self, step: CachedStep) -> None:
        self._steps[step.kind, step.problem, step.after] = step


class StepSource:
    """Has the two writers of a routed run write any step of some problems.

    Args:
        loop: of a call on their prompts; a row each, in the order of `problems`.
    """

    def __init__(self, loop: StepLoop, problems: Sequence[int]):
        self._draft, self._target = loop.draft, loop.target
        self._longest = loop.router.steps.max_tokens
        self.prompts = {problem: list(row) for problem, row in zip(problems, loop.target.sequences.tokens, strict=True)}
        self._row_of = {problem: row for row, problem in enumerate(problems)}

    def write(self, requests: Sequence[Request]) -> list[CachedStep]:
        """What is asked for, of requests of one kind and of different problems."""
        rows = {self._row_of[request.problem]: request for request in requests}
        texts = {row: [*self.prompts[request.problem], *request.text] for row, request in rows.items()}
        started = perf_counter()
        kind = requests[0].kind
        for writer in (self._draft,) if kind == DRAFT else (self._draft, self._target):
            writer.sync(texts)
            writer.begin_steps(texts)
        if kind == SCORE:
            found = self._scored(rows)
        else:
            writer = self._draft if kind == DRAFT else self._target
            if kind == TARGET:
                writer.append_draft_step({row: request.drafted for row, request in rows.items()})
            writer.write(dict.fromkeys(rows, self._longest))
            found = [(writer.step_tokens(row), self._values(row) if kind == DRAFT else []) for row in rows]
        seconds = perf_counter() - started
        lasts = [kind != SCORE and writer.stop.steps[row].is_last for row in rows]
        return [
            CachedStep(
                kind=kind,
                problem=request.problem,
                after=request.key[2],
                tokens=list(tokens),
                is_last=bool(is_last),
                values=values,
                seconds=round(seconds, 4),
                num_rows=len(rows),
            )
            for request, (tokens, values), is_last in zip(rows.values(), found, lasts, strict=True)
        ]

    def _scored(self, rows: Mapping[int, Request]) -> list[tuple[Sequence[int], list[list[float]]]]:
        logits_of = self._target.score_drafts({row: list(request.drafted) for row, request in rows.items()})
        found = []
        for row, request in rows.items():
            logits_TV = logits_of[row][: len(request.drafted)]
            columns = log_probs_of(logits_TV, request.drafted), regrets_of(logits_TV, request.drafted)
            found.append((request.drafted, _rounded(columns)))
        self._target.discard()
        return found

    def _values(self, row: int) -> list[list[float]]:
        signals = self._draft.step_signals(row)
        return _rounded((signals.log_probs, signals.entropies, signals.margins))


def _rounded(columns: Sequence[np.ndarray]) -> list[list[float]]:
    return [[round(float(value), _DIGITS) for value in values] for values in zip(*columns, strict=True)]


def with_source(
    target: PreTrainedModel,
    drafter: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Mapping[int, Problem],
    job: Callable[[StepSource], None],
    *,
    max_new_tokens: int,
    steps: Steps,
) -> None:
    """Do a job with the two writers of a greedy routed call on some problems, by their numbers."""

    def method(model: PreTrainedModel, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        call = RoutedCall(
            input_ids=input_ids,
            attention_mask=inputs.get("attention_mask"),
            others={},
            sampler=Sampler(logits_processor, do_sample=False, verify="topdown", generator=None),
            criteria=stopping_criteria,
            capacity=input_ids.shape[1] + max_new_tokens,
            config=generation_config,
            recorder=Recorder(len(input_ids), scores=False, logits=False, states=False),
            feed=None,
            started=perf_counter(),
        )
        routing = Routing(
            router=AlwaysTarget(steps=steps), target=None, draft=drafter, tokenizer=tokenizer, chooses=True
        )
        loop = routing.start(model, call)
        try:
            job(StepSource(loop, list(problems)))
        finally:
            loop.close()
        return input_ids

    inputs = encode_problems(tokenizer, list(problems.values()))
    target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, custom_generate=method)


@dataclass(kw_only=True)
class Replayed:
    """What a router came to on one problem.

    Args:
        num_kept: tokens of the draft's steps that were kept; `num_written` those of the target's.
        num_taken_over: of these the drafted ones that the target agreed with.
        num_vain: drafted tokens that did not become text; `num_vain_unlooked`: had every step been drafted to its end.
        num_verified: drafted tokens that the target has read to judge or to write a step, in `num_verifications`
            forwards.
        num_caught_up: tokens of kept steps that the target has read later, to write one after them; in one cache it
            would not.
        ends: where each step ends, in `tokens`.
    """

    problem: int
    tokens: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    writers: list[Writer] = field(default_factory=list)
    num_kept: int = 0
    num_written: int = 0
    num_taken_over: int = 0
    num_vain: int = 0
    num_vain_unlooked: int = 0
    num_verified: int = 0
    num_verifications: int = 0
    num_caught_up: int = 0
    router_seconds: float = 0.0

    @property
    def num_escalated(self) -> int:
        return sum(writer == TARGET for writer in self.writers)


class _CachedView:
    """The `routers.TargetView` of one cached step."""

    def __init__(self, score: CachedStep | None, written: DraftedStep | None):
        self._score, self._written = score, written

    def log_probs(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        if steps[0] is self._written:
            return [np.zeros(len(steps[0].tokens), np.float32)]
        assert self._score is not None
        return [self._score.column(0)]

    def regrets(self, steps: Sequence[DraftedStep]) -> list[np.ndarray]:
        if steps[0] is self._written:
            return [np.zeros(len(steps[0].tokens), np.float32)]
        assert self._score is not None
        return [self._score.column(1)]

    def write(self, steps: Sequence[DraftedStep]) -> list[DraftedStep]:
        assert self._written is not None
        return [self._written]

    def answers(self, steps: Sequence[DraftedStep], question: str, opening: str, choices: Sequence[str]) -> Any:
        raise AssertionError("they are not kept with the steps: `bench.arbitrage` refuses routers that ask for them")


def replay(
    router: Router, problem: int, prompt: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Generator[Request, CachedStep, Replayed]:
    """One problem's text under a router: yields what it needs, is sent it, and returns what it came to."""
    done, asks_target, num_unread = Replayed(problem=problem), "log_probs" in router.needs, 0
    while True:
        text = tuple(done.tokens)

        def step_of(node: CachedStep | None, length: int) -> DraftedStep:
            values = node.values[:length] if node else []
            columns = np.array(values, np.float32).reshape(len(values), 3)
            starts = [0, *done.ends]
            return DraftedStep(
                row=0,
                prompt=prompt,
                previous=[done.tokens[a:b] for a, b in zip(starts, done.ends, strict=False)],
                writers=list(done.writers),
                tokens=[] if node is None else node.tokens[:length],
                signals=Signals(log_probs=columns[:, 0], entropies=columns[:, 1], margins=columns[:, 2]),
                is_last=node is not None and node.is_last and length == len(node.tokens),
                decode=decode,
            )

        def look(step: DraftedStep, view: TargetView | None = None) -> Decision | None:
            started = perf_counter()
            (decision,) = router.decide_early([step]) if view is None else router.decide([step], view)
            done.router_seconds += perf_counter() - started
            return decision

        node, written, score, num_drafted, decision = None, None, None, 0, None
        if router.peek == 0:
            decision = look(step_of(None, 0))
        if decision is None or not decision.escalate:
            node = yield Request(DRAFT, problem, text)
            for length in _looks(router, len(node.tokens)):
                num_drafted = length
                if (decision := look(step_of(node, length))) is not None:
                    break
            if decision is None:
                num_drafted = len(node.tokens)
                whole = tuple(node.tokens)
                if asks_target:
                    score = yield Request(SCORE, problem, text, whole)
                    done.num_verifications += 1
                    done.num_verified += num_drafted
                if router.judges_together:
                    written = yield Request(TARGET, problem, text, whole)
                other = None if written is None else step_of(written, 0)
                decision = look(step_of(node, len(node.tokens)), _CachedView(score, other))
            elif not decision.escalate:
                num_drafted = len(node.tokens)
        assert decision is not None
        if decision.escalate:
            drafted = () if node is None else tuple(node.tokens[:num_drafted])
            if written is None:
                written = yield Request(TARGET, problem, text, drafted)
            if drafted and score is None:
                done.num_verifications += 1
                done.num_verified += _num_read(num_drafted, num_shared(drafted, written.tokens))
            done.num_written += len(written.tokens)
            done.num_caught_up, num_unread = done.num_caught_up + num_unread, 0
            if node is not None:
                shared = num_shared(node.tokens, written.tokens)
                done.num_taken_over += min(shared, num_drafted)
                done.num_vain += num_drafted - min(shared, num_drafted)
                done.num_vain_unlooked += len(node.tokens) - shared
            chosen = written
        else:
            assert node is not None
            done.num_kept += len(node.tokens)
            num_unread += len(node.tokens) if score is None else 0
            chosen = node
        done.tokens += chosen.tokens
        done.ends.append(len(done.tokens))
        done.writers.append("target" if decision.escalate else "draft")
        if chosen.is_last:
            return done


def _num_read(num_drafted: int, num_agreed: int) -> int:
    """Tokens of a rejected step that the target reads: part by part, as long as it agrees with all of them."""
    num_read = 0
    while num_drafted > 0:
        part = min(READ_AT_ONCE, num_drafted)
        num_read += part
        num_drafted, num_agreed = num_drafted - part - 1, num_agreed - part - 1
        if num_agreed < 0:
            break
    return num_read


def _looks(router: Router, length: int) -> Iterator[int]:
    """Numbers of drafted tokens at which a router looks at a step of this length."""
    if not router.peek:
        return
    place = min(router.peek, length)
    yield place
    while router.peek_every is not None and place < length:
        place = min(place + router.peek_every, length)
        yield place


def replay_all(
    router: Router,
    problems: Sequence[int],
    prompts: Mapping[int, Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    cache: StepCache,
    write: Callable[[Sequence[Request]], list[CachedStep]],
) -> list[Replayed]:
    """Some problems in step, so that what is missing of several of them is written at once."""
    runs = {problem: replay(router, problem, prompts[problem], decode) for problem in problems}
    waiting = {problem: next(run) for problem, run in runs.items()}
    done: dict[int, Replayed] = {}
    while waiting:
        for kind in (DRAFT, SCORE, TARGET):
            missing = [one for one in waiting.values() if one.kind == kind and cache.get(one) is None]
            if missing:
                cache.put(write(missing))
                break
        for problem, request in list(waiting.items()):
            if (step := cache.get(request)) is not None:
                try:
                    waiting[problem] = runs[problem].send(step)
                except StopIteration as stop:
                    done[problem] = stop.value
                    del waiting[problem]
    return [done[problem] for problem in problems]
