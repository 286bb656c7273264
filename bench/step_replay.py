"""Routers replayed on greedy steps that are kept (`bench/step_cache.py`).

`replay` walks a router through them as `specdec.routing.StepLoop` would, looks at unfinished steps included. What a
router decides, and with it the text, is that of a live run (up to numerical ties); how long it takes is not measured
here, it is counted: tokens and forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from bench.step_cache import DRAFT, SCORE, TARGET, CachedStep, Request, StepCache
from routers import DraftedStep, Router, Signals, TargetView
from routers.base import Decision, Writer
from specdec.decoding.sequences import num_shared
from specdec.routing.writer import READ_AT_ONCE


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


@dataclass(kw_only=True)
class _Step:
    """What stands after a text so far.

    Args:
        drafted: the draft's whole step, `num_drafted` its tokens that the router has let it write.
        written: the target's, where that has been needed.
        score: the target's opinion of the drafted one.
    """

    text: tuple[int, ...]
    decision: Decision | None = None
    drafted: CachedStep | None = None
    num_drafted: int = 0
    written: CachedStep | None = None
    score: CachedStep | None = None


@dataclass(kw_only=True)
class _Replay:
    """One problem's text under a router; `done` is what it came to."""

    router: Router
    prompt: Sequence[int]
    decode: Callable[[Sequence[int]], str]
    done: Replayed
    num_unread: int = 0
    """Kept tokens that the target has not read."""

    def draft(self) -> Generator[Request, CachedStep, _Step]:
        """Up to the router's decision."""
        step = _Step(text=tuple(self.done.tokens))
        if self.router.peek == 0:
            step.decision = self._look(self._as_drafted(None, 0))
        if step.decision is not None and step.decision.escalate:
            return step
        node = step.drafted = yield Request(DRAFT, self.done.problem, step.text)
        for length in _looks(self.router, len(node.tokens)):
            step.num_drafted = length
            step.decision = self._look(self._as_drafted(node, length))
            if step.decision is not None:
                break
        if step.decision is None:
            step.num_drafted = len(node.tokens)
            yield from self._judge(step, node)
        elif not step.decision.escalate:
            step.num_drafted = len(node.tokens)
        return step

    def _judge(self, step: _Step, node: CachedStep) -> Generator[Request, CachedStep, None]:
        """The router decides on a whole step."""
        whole = tuple(node.tokens)
        if "log_probs" in self.router.needs:
            step.score = yield Request(SCORE, self.done.problem, step.text, whole)
            self.done.num_verifications += 1
            self.done.num_verified += len(whole)
        if self.router.judges_together:
            step.written = yield Request(TARGET, self.done.problem, step.text, whole)
        other = None if step.written is None else self._as_drafted(step.written, 0)
        step.decision = self._look(self._as_drafted(node, len(whole)), _CachedView(step.score, other))

    def commit(self, step: _Step) -> Generator[Request, CachedStep, bool]:
        """Append the step that the decision is for; returns whether it is the last."""
        assert step.decision is not None
        done = self.done
        if step.decision.escalate:
            chosen = yield from self._write(step)
        else:
            assert step.drafted is not None
            chosen = step.drafted
            done.num_kept += len(chosen.tokens)
            self.num_unread += len(chosen.tokens) if step.score is None else 0
        done.tokens += chosen.tokens
        done.ends.append(len(done.tokens))
        done.writers.append("target" if step.decision.escalate else "draft")
        return chosen.is_last

    def _write(self, step: _Step) -> Generator[Request, CachedStep, CachedStep]:
        """The target's step."""
        done, node, num_drafted = self.done, step.drafted, step.num_drafted
        drafted = () if node is None else tuple(node.tokens[:num_drafted])
        written = step.written
        if written is None:
            written = yield Request(TARGET, done.problem, step.text, drafted)
        if drafted and step.score is None:
            done.num_verifications += 1
            done.num_verified += _num_read(num_drafted, num_shared(drafted, written.tokens))
        done.num_written += len(written.tokens)
        done.num_caught_up, self.num_unread = done.num_caught_up + self.num_unread, 0
        if node is not None:
            shared = num_shared(node.tokens, written.tokens)
            done.num_taken_over += min(shared, num_drafted)
            done.num_vain += num_drafted - min(shared, num_drafted)
            done.num_vain_unlooked += len(node.tokens) - shared
        return written

    def _as_drafted(self, node: CachedStep | None, length: int) -> DraftedStep:
        """The first `length` tokens of a step, as a router sees them."""
        values = node.values[:length] if node else []
        columns = np.array(values, np.float32).reshape(len(values), 3)
        starts = [0, *self.done.ends]
        return DraftedStep(
            row=0,
            prompt=self.prompt,
            previous=[self.done.tokens[a:b] for a, b in zip(starts, self.done.ends, strict=False)],
            writers=list(self.done.writers),
            tokens=[] if node is None else node.tokens[:length],
            signals=Signals(log_probs=columns[:, 0], entropies=columns[:, 1], margins=columns[:, 2]),
            is_last=node is not None and node.is_last and length == len(node.tokens),
            decode=self.decode,
        )

    def _look(self, step: DraftedStep, view: TargetView | None = None) -> Decision | None:
        started = perf_counter()
        (decision,) = self.router.decide_early([step]) if view is None else self.router.decide([step], view)
        self.done.router_seconds += perf_counter() - started
        return decision


def replay(
    router: Router, problem: int, prompt: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Generator[Request, CachedStep, Replayed]:
    """One problem's text under a router: yields what it needs, is sent it, and returns what it came to."""
    run = _Replay(router=router, prompt=prompt, decode=decode, done=Replayed(problem=problem))
    is_last = False
    while not is_last:
        step = yield from run.draft()
        is_last = yield from run.commit(step)
    return run.done


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
    """Some problems side by side, so that what is missing of several of them is written at once.

    Args:
        write: returns some of what is asked for, one step at least.
    """
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
