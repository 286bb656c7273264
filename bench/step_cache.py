"""Greedy steps, written once for every text before them.

A greedy step is a function of the text before it. So a step that one router's text has needed is good for every other
router whose text comes by: `StepCache` keeps them (JSON lines, one a step, appended at once), and `StepSource` has the
models write those that are missing, several problems at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha1
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from routers import AlwaysTarget, Steps
from specdec.decoding.recording import Recorder
from specdec.decoding.sampling import Sampler
from specdec.routing import RoutedCall, Routing, StepLoop
from specdec.routing.view import log_probs_of, regrets_of
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
        seconds: from its beginning to its end, beside as many others as there were rows at the end.
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
        self._begun: dict[int, tuple[Request, float]] = {}
        """By row the request that is being written, and when it was begun."""

    def write(self, requests: Sequence[Request]) -> list[CachedStep]:
        """Go on until one step or several are over, of requests of one kind and of different problems.

        Nobody waits for the longest step: the other requests are to be made again, beside new ones.
        """
        rows = {self._row_of[request.problem]: request for request in requests}
        kind, started = requests[0].kind, perf_counter()
        new = {row: request for row, request in rows.items() if self._begun.get(row, (None,))[0] != request}
        self._begun |= {row: (request, started) for row, request in new.items()}
        texts = {row: [*self.prompts[request.problem], *request.text] for row, request in new.items()}
        for writer in (self._draft,) if kind == DRAFT else (self._draft, self._target):
            writer.sync(texts)
            writer.begin_steps(texts)
        if kind == SCORE:
            found = self._scored(rows)
        else:
            writer = self._draft if kind == DRAFT else self._target
            if kind == TARGET:
                writer.append_draft_step({row: request.drafted for row, request in new.items()})
            writer.begin(dict.fromkeys(new, self._longest))
            while all(writer.stop.steps[row].writing for row in rows):
                writer.round()
            over = [row for row in rows if not writer.stop.steps[row].writing]
            found = {row: (writer.step_tokens(row), self._values(row) if kind == DRAFT else []) for row in over}
        now = perf_counter()
        return [
            CachedStep(
                kind=kind,
                problem=rows[row].problem,
                after=rows[row].key[2],
                tokens=list(tokens),
                is_last=kind != SCORE and bool(writer.stop.steps[row].is_last),
                values=values,
                seconds=round(now - self._begun.pop(row)[1], 4),
                num_rows=len(rows),
            )
            for row, (tokens, values) in found.items()
        ]

    def _scored(self, rows: Mapping[int, Request]) -> dict[int, tuple[Sequence[int], list[list[float]]]]:
        logits_of = self._target.score_drafts({row: list(request.drafted) for row, request in rows.items()})
        found: dict[int, tuple[Sequence[int], list[list[float]]]] = {}
        for row, request in rows.items():
            logits_TV = logits_of[row][: len(request.drafted)]
            columns = log_probs_of(logits_TV, request.drafted), regrets_of(logits_TV, request.drafted)
            found[row] = request.drafted, _rounded(columns)
        # a text most often goes on with the step: what has been read of it need not be read again
        self._target.commit_scored({row: [list(request.drafted)] for row, request in rows.items()})
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
