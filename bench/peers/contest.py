"""Configurations taking turns on the same prompts, and what each call measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench._script import log
from specdec.bench.peers import LLAMA_CPP
from specdec.bench.running import Run
from specdec.suites import Prompt
from specdec.testing.equality import Verdict

INT8, FLOAT, GGUF = "int8", "float32", "gguf"
METRICS = {"decode": "decode tok/s", "end_to_end": "end-to-end"}
PAUSE_S = 0.05
"""Between two calls, so that one side's idle workers do not spin into the other's time."""
NUM_WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timed call. `output` is token ids, or text from llama.cpp; `num_decoded`: tokens after the first commit."""

    num_tokens: int
    seconds: float
    num_decoded: int
    decode_seconds: float
    num_drafted: int
    num_accepted: int
    output: list[int] | str

    @classmethod
    def of(cls, run: Run) -> Sample:
        """What the harness or a peer noted of one prompt."""
        first, last = run.token_seconds[0], run.token_seconds[-1]
        return cls(
            num_tokens=run.num_tokens,
            seconds=run.seconds,
            num_decoded=sum(stamp > first for stamp in run.token_seconds),
            decode_seconds=last - first,
            num_drafted=(run.counts and run.counts.num_drafted) or 0,
            num_accepted=(run.counts and run.counts.num_accepted) or 0,
            output=run.tokens[0] if run.text is None else run.text,
        )

    @property
    def rates(self) -> dict[str, float | None]:
        decode = self.num_decoded / self.decode_seconds if self.num_decoded else None
        return {"decode": decode, "end_to_end": self.num_tokens / self.seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    prompt: Prompt
    ids: list[int]


Decode = Callable[[Task, int], Sample]
"""A task and the number of new tokens."""


@dataclass(slots=True, kw_only=True)
class Configuration:
    """One way of decoding. `judge` says whether an output is what the plain output (second) is."""

    side: str
    method: str
    decode: Decode | None = None
    judge: Callable[[Task, Any, Any], Verdict] | None = None
    unavailable: str | None = None
    samples: list[list[Sample]] = field(default_factory=list)  # by task, then by repetition

    @property
    def name(self) -> str:
        return f"{self.side} {self.method}"

    def rate(self, task: int, metric: str) -> float | None:
        rates = [sample.rates[metric] for sample in self.samples[task]]
        return None if None in rates else statistics.median(rates)


def warm_up(configurations: list[Configuration], task: Task, max_new_tokens: int) -> None:
    """One short call each. A peer that fails here is not available; specdec failing is a failed run."""
    for configuration in configurations:
        if configuration.decode is None:
            continue
        log(f"warming up {configuration.name}")
        try:
            configuration.decode(task, min(max_new_tokens, NUM_WARMUP_TOKENS))
        except RuntimeError as error:
            if configuration.side != LLAMA_CPP:
                raise
            configuration.decode, configuration.unavailable = None, f"failed: {error}"


def measure(configurations: list[Configuration], tasks: list[Task], max_new_tokens: int, repetitions: int) -> int:
    """Fills the samples; returns how many tasks are complete, fewer than all after Ctrl-C."""
    for index, task in enumerate(tasks):
        rounds: list[dict[str, Sample]] = []
        try:
            for repetition in range(repetitions):
                log(f"{task.prompt.category}: prompt {index + 1} of {len(tasks)}, repetition {repetition + 1}")
                first = repetition % len(configurations)  # nobody always runs after the same neighbour
                turns = configurations[first:] + configurations[:first]
                rounds.append({one.name: timed(one, task, max_new_tokens) for one in turns})
        except KeyboardInterrupt:
            return index
        for configuration in configurations:
            configuration.samples.append([samples[configuration.name] for samples in rounds])
    return len(tasks)


def timed(configuration: Configuration, task: Task, max_new_tokens: int) -> Sample:
    time.sleep(PAUSE_S)
    return configuration.decode(task, max_new_tokens)
